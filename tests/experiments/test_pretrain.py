"""The command a user types: it trains, it goes on exactly, and it says what is wrong before it touches anything."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from experiments import cli, goodput, logbook, loop, runs
from experiments.checkpoints import Checkpoints
from experiments.cli import UserError
from experiments.feed import Feed
from experiments.journal import Journal
from experiments.mesanet.pretrain import PRESETS, main
from experiments.mesh import MeshConfig, make_mesh
from experiments.reliability.launched import SMALL, Host, curve, write_corpus
from experiments.runs import LEFT_BEHIND, RunConfig, claimed, open_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of small texts."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run(corpus, folder)
    return folder


def run(corpus, output, *more: str) -> None:
    """Runs the command in this process."""
    args = [*SMALL, "--data.source", str(corpus), "--output", str(output), *more]
    cli.run_preset(main, PRESETS, default="tiny", args=args)


def complaint(capsys, corpus, output, *more: str) -> str:
    """Runs the command, which must fail with status 2 and nothing but one sentence."""
    with pytest.raises(SystemExit) as stopped:
        run(corpus, output, *more)
    assert stopped.value.code == 2
    return re.sub(r"\s*[│╭╰─╮╯\n]+\s*", " ", capsys.readouterr().err)


def test_every_step_has_a_line_with_all_measurements(finished):
    entries = logbook.read(finished / "log.jsonl")
    assert [e["step"] for e in entries] == list(range(12))
    fields = {
        "loss",
        "grad_norm",
        "num_targets",
        "solver_steps",
        "solver_residual",
        "learning_rate",
        *logbook.CLOCK[:4],
    }
    assert all(fields < e.keys() for e in entries)
    assert [e["step"] for e in entries if "held_out_loss" in e] == [3, 7, 11]
    assert entries[-1]["held_out_loss"] < entries[3]["held_out_loss"]
    assert all(0 < e["flops_utilisation"] < 1 and e["solver_residual"] <= 1.001e-3 for e in entries)


def test_a_run_that_is_killed_at_any_time_draws_the_same_curve_to_the_last_bit(corpus, finished, tmp_path):
    folder = tmp_path / "killed"
    for lines in (2, 7):  # before the first checkpoint, and between two
        with Host(corpus, folder) as host:
            host.wait_for_lines(lines)
            host.send(signal.SIGKILL)
            assert host.end()[0] == -signal.SIGKILL
    run(corpus, folder)
    assert curve(folder) == curve(finished)
    ours, theirs = open_run(folder), open_run(finished)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def ask_to_leave(place: str, monkeypatch) -> None:
    """Has SIGTERM sent to this process, once, when the run comes to a place."""
    sent, waiting = [], threading.Event()

    def send() -> None:
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    def before(owner, name: str, due=lambda *args: True, then=lambda: None) -> None:
        call = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if due(*args):
                send()
                then()
            return call(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    if place == "a step":
        before(Journal, "begin", lambda _, step: step == 5)
    elif place == "a wait for data":
        before(Feed, "_read", lambda _, step: step == 5 and not sent, lambda: waiting.wait(60))
    elif place == "an evaluation":
        before(loop, "split")
    else:
        before(Checkpoints, "save", lambda _, step, *state: step == 6)


@pytest.mark.parametrize("place", ["a step", "a wait for data", "an evaluation", "a save"])
def test_a_run_that_is_asked_to_leave_saves_all_it_has_done_and_goes_on_exactly(corpus, finished, tmp_path, place):
    with pytest.MonkeyPatch.context() as monkeypatch:
        ask_to_leave(place, monkeypatch)
        begin = time.monotonic()
        with pytest.raises(SystemExit) as left:
            run(corpus, tmp_path / "run")
    assert left.value.code == 128 + signal.SIGTERM and time.monotonic() - begin < 60
    entries = logbook.read(tmp_path / "run" / "log.jsonl")
    assert 3 <= len(entries) < 10 and open_run(tmp_path / "run").step == len(entries)
    assert place != "an evaluation" or "held_out_loss" not in entries[-1]  # it is made good by the next process
    run(corpus, tmp_path / "run")
    assert curve(tmp_path / "run") == curve(finished)


def test_a_run_that_cannot_save_in_time_leaves_with_what_was_saved_before(corpus, tmp_path):
    with Host(corpus, tmp_path / "run", "--grace-seconds", "0.01", "--num-steps", "100000") as host:
        host.wait_for_lines(100)
        host.send(signal.SIGTERM)
        status, printed = host.end(seconds=30)
    assert status == 143
    assert "grace_seconds: 0.01 s after signal 15 not everything is saved" in printed
    assert open_run(tmp_path / "run").step >= 3


def test_a_run_says_what_its_time_went_into(finished, capsys):
    events = [json.loads(line) for line in (finished / "events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events[:2]] == ["start", "compiled"] and events[-1]["host_peak_bytes"] > 2**26
    spent = goodput.goodput(finished)
    assert min(spent) >= 0 and spent.steps > 0 and spent.compiling > 0 and spent.saving > 0
    assert spent.steps == pytest.approx(sum(e["seconds"] for e in logbook.read(finished / "log.jsonl")))
    cli.run(goodput.main, goodput.GoodputConfig, [str(finished)])
    assert re.fullmatch(r"goodput \d+\.\d% of .* s in steps that count; the rest: start .*\n", capsys.readouterr().out)


def test_time_without_data_is_not_counted_as_steps(corpus, tmp_path, monkeypatch):
    read = Feed._read
    monkeypatch.setattr(Feed, "_read", lambda self, step: time.sleep(0.3) or read(self, step))
    run(corpus, tmp_path / "run", "--eval-every", "0", "--save-every", "100")
    spent = goodput.goodput(tmp_path / "run")
    assert spent.waiting > 6 * 0.3 > spent.steps
    waited = [entry["waited_seconds"] for entry in logbook.read(tmp_path / "run" / "log.jsonl")]
    assert all(seconds > 0.1 for seconds in waited[4:])


def test_a_second_start_in_a_folder_is_refused(capsys, corpus, finished):
    before = (finished / "log.jsonl").read_bytes()
    with claimed(finished):
        assert "output: another process trains in" in complaint(capsys, corpus, finished)
    assert (finished / "log.jsonl").read_bytes() == before


def test_another_folder_on_another_host_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "PATIENCE", 0.1)
    with pytest.raises(UserError, match="is not the folder that host 0 writes to; give one that all hosts share"):
        runs.join_run(RunConfig(output=tmp_path), text=0)


def test_events_cut_short_by_a_crash_do_not_spoil_what_follows(corpus, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "sta')
    run(corpus, folder)
    assert goodput.goodput(folder).steps > 0


def test_a_profile_is_written_where_the_user_is_told(corpus, tmp_path, capsys):
    run(corpus, tmp_path / "run", "--num-steps", "4", "--profile-steps", "1", "3")
    assert f"profile: {tmp_path / 'run' / 'profile'}" in capsys.readouterr().out
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_a_finished_run_stays_as_it_is(corpus, finished):
    before = (finished / "log.jsonl").read_bytes()
    run(corpus, finished)
    assert (finished / "log.jsonl").read_bytes() == before


def test_a_run_opens_with_its_model_parameters_and_tokenizer(finished):
    opened = open_run(finished)
    assert opened.step == 12 and opened.name == "finished"
    assert opened.tokenizer.vocab_size == 257
    tokens = np.asarray(opened.tokenizer.encode("document 3 counts:"))[None]
    logits, _ = opened.model.apply(opened.params, tokens)
    assert logits.shape == (1, 18, 257)


def test_a_run_opens_where_there_are_other_devices_than_it_was_trained_on(finished):
    code = "import pathlib, sys; from experiments.runs import open_run; print(open_run(pathlib.Path(sys.argv[1])).step)"
    opened = subprocess.run(  # one CPU device, while this process and the run have two
        [sys.executable, "-c", code, str(finished)], capture_output=True, text=True, timeout=120, check=True
    )
    assert opened.stdout.strip() == "12"


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--model.num-layers", "2", "model.num_layers: the run in .* was started with 1, not 2"),
        ("--num-steps", "24", "num_steps: the run in .* was started with 12, not 24"),
        ("--data.seed", "5", "data.seed: the run in .* was started with 0, not 5"),
        ("--model.pattern", "attention", r"model.pattern: the run in .* was started with \('mesa',\)"),
    ],
)
def test_going_on_with_another_configuration_is_refused(capsys, corpus, finished, option, value, words):
    before = sorted((p, p.stat().st_mtime_ns) for p in finished.rglob("*"))
    assert re.search(words, complaint(capsys, corpus, finished, option, value))
    assert sorted((p, p.stat().st_mtime_ns) for p in finished.rglob("*")) == before


def test_what_does_not_change_the_numbers_may_change_on_going_on(corpus, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "12")
    run(corpus, folder, "--save-every", "2", "--log-every", "1", "--keep", "3")
    assert curve(folder) == curve(finished)
    assert Checkpoints.open(folder / "checkpoints").steps() == [9, 10, 12]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.vocab-size", "100"], "model.vocab_size: 100 is below the 257 tokens of the tokenizer"),
        (["--data.source", "/no/such/file"], "data.source: /no/such/file is no readable file or folder"),
        (["--data.length", "1"], "length=1 must be at least 2"),
        (["--micro-batches", "3"], "micro_batches=3 does not divide data.batch_size=4"),
        (
            ["--micro-batches", "4"],
            "data.batch_size: 4 in micro_batches=4 gives 1 sequences at a time, which 2 devices",
        ),
        (["--seed", "99999999999999999999"], "seed=99999999999999999999 must lie between 0 and"),
        (["--data.seed", "-1"], "seed=-1 must lie between 0 and"),
        (["--eval-every", "-1"], "eval_every=-1 is negative; 0 evaluates only at the end"),
        (["--model.logit-cap", "-1"], "logit_cap must not be negative, norm_eps and rope_base must be positive"),
        (["--model.pattern", "mamba"], "mamba"),
        (["--model.solver.tolerance", "2"], r"tolerance=2.0 is outside \[0, 1\)"),
        (["--optimizer.peak-lr", "-1"], "peak_lr=-1.0 must be positive"),
        (["--mesh.tensor", "3"], "mesh: data=.* x fsdp=1 x sequence=1 x tensor=3 needs .* devices, but there are 2"),
        (
            ["--mesh.sequence", "2", "--data.length", "31"],
            "data.length: 31 tokens cannot be shared evenly by mesh.sequence=2",
        ),
        (
            ["--mesh.tensor", "2", "--model.num-heads", "3"],
            "mesh.tensor: 3 heads cannot be shared evenly by 2 devices; take a divisor",
        ),
        (["--mesh.cpu-devices", "5"], "mesh.cpu_devices: 5 cannot be had, this process already uses 2"),
    ],
)
def test_nonsense_on_the_command_line_ends_in_a_sentence(capsys, corpus, tmp_path, monkeypatch, options, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert re.search(words, complaint(capsys, corpus, tmp_path / "run", *options))


def test_options_without_a_size_are_those_of_the_smallest(capsys, corpus, tmp_path):
    with pytest.raises(SystemExit):
        cli.run_preset(main, PRESETS, default="tiny", args=["--num-steps", "0"])
    assert "num_steps=0 must be at least 1" in re.sub(r"\s*[│╭╰─╮╯\n]+\s*", " ", capsys.readouterr().err)


def test_an_unknown_size_names_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        cli.run_preset(main, PRESETS, default="tiny", args=["2b"])
    shown = capsys.readouterr().err
    assert all(size in shown for size in ("2b", "tiny", "145m", "400m", "1b"))


def test_help_shows_every_field_with_its_meaning(capsys):
    with pytest.raises(SystemExit):
        cli.run_preset(main, PRESETS, default="tiny", args=["tiny", "--help"])
    shown = capsys.readouterr().out
    for option in (
        "--model.gate-bound",
        "--model.solver.tolerance",
        "--optimizer.b2",
        "--data.tokenizer",
        "--mesh.fsdp",
    ):
        assert option in shown
    assert "largest forget gate at full input strength" in shown


def test_an_output_that_cannot_be_written_is_refused_before_anything_happens(capsys, corpus, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert re.search("output: .* cannot be written", complaint(capsys, corpus, tmp_path / "file" / "run"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_with_something_else_in_it_is_left_alone(capsys, corpus, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    assert "is not empty and not a run; give a new folder" in complaint(capsys, corpus, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_steps_that_are_not_finite_are_skipped_and_too_many_in_a_row_stop_the_run(capsys, corpus, tmp_path):
    overflowing = ("--optimizer.peak-lr", "1e30", "--optimizer.warmup-steps", "0", "--max-skips", "4")
    text = complaint(capsys, corpus, tmp_path / "run", *overflowing)
    assert re.search("max_skips: 4 steps in a row had to be skipped, .* is not finite; .*peak-lr below 1e.30", text)
    entries = logbook.read(tmp_path / "run" / "log.jsonl")
    assert [entry["skipped"] for entry in entries[-5:]] == [0, 1, 2, 3, 4]
    assert all("params/" in entry["why_skipped"] for entry in entries[-4:])
    again = complaint(capsys, corpus, tmp_path / "run", *overflowing)
    assert "max_skips: 4 steps in a row" in again  # from wherever it goes on, it comes to the same end
    opened = open_run(tmp_path / "run")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(opened.params))
    run(corpus, tmp_path / "run", *overflowing[:4], "--max-skips", "100")
    assert len(logbook.read(tmp_path / "run" / "log.jsonl")) == 12


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model": 3}', '{"colour": 3}', '{"num_steps": 0}'])
def test_a_folder_that_is_no_run_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"run: .* is not (a run, it has no|the) config"):
        open_run(tmp_path)


def test_a_tokenizer_file_that_was_swapped_is_noticed(corpus, tmp_path):
    vocabulary = {"<s>": 0, "[UNK]": 1} | {f"w{i}": i for i in range(2, 257)}
    file = tmp_path / "t.json"
    Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")).save(str(file))
    run(corpus, tmp_path / "run", "--data.tokenizer", str(file))
    vocabulary |= {"w2": 3, "w3": 2}  # as large as before
    Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")).save(str(tmp_path / "run" / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer.json is not the file the checkpoint was trained with"):
        open_run(tmp_path / "run")


def test_a_text_that_changed_is_noticed(capsys, corpus, tmp_path):
    texts = shutil.copytree(corpus, tmp_path / "texts")
    run(texts, tmp_path / "run")
    (texts / "3.txt").write_text("something else")
    assert re.search(
        "data.source: the text of .* is not the one that the run", complaint(capsys, texts, tmp_path / "run")
    )


def test_a_start_that_failed_or_was_killed_is_in_nobodys_way(capsys, corpus, tmp_path):
    folder = tmp_path / "run"
    complaint(capsys, "/no/such/text", folder)
    assert not folder.exists()
    folder.mkdir()
    for name in LEFT_BEHIND:
        (folder / name).write_text("{")
    run(corpus, folder, "--num-steps", "1")
    assert open_run(folder).step == 1


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(capsys, corpus, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    largest = max((folder / "checkpoints" / "12").rglob("*"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    assert open_run(folder).step == 9
    assert "12 is damaged" in capsys.readouterr().out
    run(corpus, folder)
    assert curve(folder) == curve(finished)
    jax.tree.map(np.testing.assert_array_equal, open_run(folder).params, open_run(finished).params)


def test_a_lost_logbook_is_noticed(capsys, corpus, tmp_path):
    run(corpus, tmp_path, "--num-steps", "2", "--save-every", "1")
    (tmp_path / "log.jsonl").write_text("")
    text = complaint(capsys, corpus, tmp_path, "--num-steps", "2", "--save-every", "1")
    assert re.search("output: .*log.jsonl lacks steps before 2", text)


def test_mesh_axes_multiply_to_the_devices_there_are():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 2, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert dict(make_mesh(MeshConfig(tensor=2)).shape) == {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 2}
    with pytest.raises(UserError, match="data=1 x fsdp=1 x sequence=1 x tensor=1 needs 1 devices, but there are 2"):
        make_mesh(MeshConfig(data=1))
