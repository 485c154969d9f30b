"""The table of costs: how it is kept, printed and compared, and what the command says of a mistake."""

import dataclasses
import subprocess

import pytest

from experiments.cli import UserError
from experiments.lower import __main__ as lower
from experiments.lower import costs, tables
from experiments.lower.costs import Cost, Record

FAST = Cost(
    kernel="descent",
    case="5m",
    chip="v5e",
    per="input",
    cycles=3000,
    step=2.25,
    once=20.5,
    bundles=443,
    loop_bundles=245,
    mxu=0.5,
    vpu=0.75,
    spills=0,
    loop_spills=0,
    fills=0,
    loop_fills=0,
    vmem_bytes=445_000,
    code_bytes=92_000,
)
REFUSED = Cost(kernel="descent", case="5m", chip="v6e", per="input", refused="out of memory")
UNKNOWN = Cost(kernel="descent", case="5m", chip="tpu7x", per="input", no_estimate="ended by SIGSEGV", spills=0)


def changed(**fields) -> Cost:
    return dataclasses.replace(FAST, **fields)


def record(*rows: Cost, compiler: str = "libtpu 1, jax 2") -> Record:
    return Record(compiler, {row.key: row for row in rows})


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Where the command runs: a compiler of a known version, and no compilation."""
    (tmp_path / "experiments" / "lower").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(costs, "this_compiler", lambda: "libtpu 1, jax 2")
    monkeypatch.setattr(lower, "KERNELS", lower.KERNELS[:1])
    measured = changed(kernel=lower.KERNELS[0].name, case=lower.KERNELS[0].case)
    monkeypatch.setattr(lower, "measure", lambda kernel, chip: dataclasses.replace(measured, chip=chip))
    return tmp_path


def commit(repository, text: str) -> None:
    (repository / "experiments/lower/costs.json").write_text(text)
    for words in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "costs"],
    ):
        subprocess.run(["git", *words], cwd=repository, check=True)


def test_a_record_has_a_sorted_row_per_line_and_is_read_back():
    kept = record(FAST, REFUSED, UNKNOWN)
    text = costs.to_text(kept)
    assert costs.from_text(text) == kept
    assert [line.split('"chip": ')[1][:6] for line in text.splitlines()[1:-1]] == ['"tpu7x', '"v5e",', '"v6e",']
    assert text == costs.to_text(record(UNKNOWN, REFUSED, FAST))


def test_growth_is_of_the_call_or_of_a_step_whichever_is_worse():
    assert costs.growth(FAST, changed(cycles=3300, step=1.0)) == pytest.approx(0.1)
    assert costs.growth(FAST, changed(cycles=2700, step=2.25)) == 0
    assert costs.growth(FAST, REFUSED) is None


@pytest.mark.parametrize(
    ("now", "complaint"),
    [
        (FAST, ""),
        (changed(cycles=3090), ""),
        (changed(cycles=3120), "takes 4.0% more cycles"),
        (changed(step=2.5), "takes 11.1% more cycles"),
        (changed(cycles=1500, step=1.0), ""),
        (changed(spills=2), "spills registers, which it did not"),
        (changed(cycles=None, step=None, no_estimate="aborted"), "has no estimate any more (aborted)"),
        (REFUSED, "no longer compiles (out of memory)"),
    ],
)
def test_a_row_is_worse_if_it_grows_by_more_than_three_percent_or_begins_to_spill_or_is_lost(now, complaint):
    assert "; ".join(costs.complaints(FAST, now)) == complaint


def test_a_row_that_was_bad_before_is_not_worse_unless_it_begins_to_spill_in_the_loop():
    assert costs.complaints(REFUSED, REFUSED) == []
    assert costs.complaints(UNKNOWN, UNKNOWN) == []
    assert costs.complaints(changed(spills=5), changed(spills=9)) == []
    assert costs.complaints(changed(spills=5), changed(spills=9, loop_spills=2)) != []


def test_the_console_shows_numbers_beside_the_earlier_ones_and_says_why_there_are_none():
    lines = tables.console([changed(step=2.5), REFUSED, UNKNOWN], record(FAST, UNKNOWN))
    numbers = "descent 5m v5e input 2.50 20.50 2.25 +11.1% ! 443 245 50% 75% 0, 0 0, 0 435 90"
    assert " ".join(lines[2].split()) == numbers
    assert len({len(line) for line in lines[:5]}) == 1
    assert "descent, 5m, v6e: does not compile: out of memory" in lines
    assert "descent, 5m, tpu7x: no estimate: ended by SIGSEGV" in lines


def test_markdown_has_a_row_per_kernel_and_case_and_a_column_per_chip():
    lines = tables.markdown(record(FAST, REFUSED, UNKNOWN, changed(case="9m", step=None)))
    assert lines[0] == "| kernel | case | cycles per | v5e | v5p | v6e | tpu7x |"
    assert lines[2] == "| descent | 5m | input | 2.25; 20.50 |  | does not compile | no estimate |"
    assert lines[3] == "| descent | 9m | input | 20.50 |  |  |  |"
    assert "libtpu 1, jax 2" in lines[-1]


def test_a_first_run_records_and_says_that_there_is_nothing_to_compare_with(repository, capsys):
    lower.main(lower.LowerConfig())
    found = costs.read(repository / "experiments/lower/costs.json")
    assert found is not None and len(found.costs) == len(lower.CHIPS)
    assert "nothing to compare with: experiments/lower/costs.json is in no commit" in capsys.readouterr().out


def test_check_compares_with_the_last_commit_and_writes_nothing(repository, capsys, monkeypatch):
    lower.main(lower.LowerConfig())
    path = repository / "experiments/lower/costs.json"
    commit(repository, path.read_text())
    path.write_text("as it was")
    with pytest.raises(SystemExit) as good:
        lower.main(lower.LowerConfig(check=True))
    before = lower.measure
    monkeypatch.setattr(lower, "measure", lambda *row: dataclasses.replace(before(*row), cycles=4000))
    with pytest.raises(SystemExit) as bad:
        lower.main(lower.LowerConfig(check=True, chips=("v6e",)))
    assert (good.value.code, bad.value.code, path.read_text()) == (0, 1, "as it was")
    row = f"{lower.KERNELS[0].name}, {lower.KERNELS[0].case}, v6e"
    assert f"{row}: takes 33.3% more cycles" in capsys.readouterr().out


def test_check_without_anything_of_this_compiler_to_compare_with_is_an_error(repository):
    with pytest.raises(UserError, match=r"^check: .* is in no commit.*; commit a record of this compiler first\."):
        lower.main(lower.LowerConfig(check=True))
    commit(repository, costs.to_text(record(FAST, compiler="libtpu 0")))
    with pytest.raises(UserError, match=r"is of libtpu 0, and this is libtpu 1, jax 2; commit"):
        lower.main(lower.LowerConfig(check=True))


def test_rows_that_are_not_compiled_stay_unless_their_kernel_is_gone_or_their_compiler_is_another(repository):
    lower.main(lower.LowerConfig())
    path = repository / "experiments/lower/costs.json"
    full = costs.read(path)
    path.write_text(costs.to_text(Record(full.compiler, full.costs | record(FAST).costs)))
    lower.main(lower.LowerConfig(chips=("v5p",)))
    assert costs.read(path) == full
    path.write_text(costs.to_text(full._replace(compiler="libtpu 0")))
    with pytest.raises(UserError, match="has rows of libtpu 0, and this is libtpu 1, jax 2; compile all"):
        lower.main(lower.LowerConfig(chips=("v5p",)))
    lower.main(lower.LowerConfig())
    assert costs.read(path) == full


def test_markdown_prints_what_is_recorded_and_compiles_nothing(repository, capsys, monkeypatch):
    with pytest.raises(UserError, match="run without --markdown first"):
        lower.main(lower.LowerConfig(markdown=True))
    lower.main(lower.LowerConfig())
    monkeypatch.setattr(lower, "measure", None)
    capsys.readouterr()
    lower.main(lower.LowerConfig(markdown=True))
    assert capsys.readouterr().out.startswith("| kernel | case |")


def test_without_libtpu_one_sentence_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise costs.PackageNotFoundError(name)

    monkeypatch.setattr(costs, "version", missing)
    with pytest.raises(UserError, match=r"^libtpu, the TPU compiler, is not installed; `make lower` installs it"):
        lower.main(lower.LowerConfig())


@pytest.mark.parametrize(
    "field", [dict(kernels=("mesa",)), dict(chips=()), dict(chips=("v4",)), dict(jobs=3), dict(jobs=0)], ids=str
)
def test_a_config_that_cannot_be_compiled_names_its_field(field):
    ((name, value),) = field.items()
    with pytest.raises(UserError) as caught:
        lower.LowerConfig(**field)
    assert str(caught.value).startswith(f"{name}={value} must be ")


def test_a_config_that_contradicts_itself_or_has_nowhere_to_write_is_refused(tmp_path):
    with pytest.raises(UserError, match="check and markdown exclude each other"):
        lower.LowerConfig(check=True, markdown=True)
    with pytest.raises(UserError, match=r"^output=.* is in no folder"):
        lower.LowerConfig(output=tmp_path / "nowhere" / "costs.json")


def test_a_file_that_is_no_record_is_not_written_over(repository):
    path = repository / "experiments/lower/costs.json"
    path.write_text('{"compiler": 1}')
    with pytest.raises(UserError, match=r"costs\.json is not a record of costs; name another file"):
        lower.main(lower.LowerConfig())
    assert path.read_text() == '{"compiler": 1}'
