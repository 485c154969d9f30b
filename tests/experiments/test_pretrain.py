"""The command a user types: it trains, it goes on exactly, and it says what is wrong before it touches anything."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from experiments import cli, logbook
from experiments.checkpoints import Checkpoints
from experiments.cli import UserError
from experiments.logbook import Logbook
from experiments.mesanet.pretrain import PRESETS, main
from experiments.mesh import MeshConfig, make_mesh
from experiments.runs import LEFT_BEHIND, open_run

TIMINGS = ("tokens_per_second", "flops_utilisation")
SMALL = shlex.split(
    "tiny --num-steps 12 --save-every 3 --eval-every 4 --eval-batches 1 --log-every 4 --micro-batches 2 "
    "--model.num-layers 1 --model.model-dim 32 --model.num-heads 2 --model.key-dim 16 --model.value-dim 16 "
    "--model.solver.tolerance 1e-3 --data.length 32 --data.batch-size 4 --mesh.cpu-devices 2"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of small texts."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"document {i} counts: " + " ".join(str(j * i) for j in range(30)))
    return folder


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


def curve(folder: Path) -> list[dict]:
    """The logbook without what a clock measured."""
    return [{k: v for k, v in e.items() if k not in TIMINGS} for e in logbook.read(folder / "log.jsonl")]


def complaint(capsys, corpus, output, *more: str) -> str:
    """Runs the command, which must fail with status 2 and nothing but one sentence."""
    with pytest.raises(SystemExit) as stopped:
        run(corpus, output, *more)
    assert stopped.value.code == 2
    return re.sub(r"\s*[│╭╰─╮╯\n]+\s*", " ", capsys.readouterr().err)


def test_every_step_has_a_line_with_all_measurements(finished):
    entries = logbook.read(finished / "log.jsonl")
    assert [e["step"] for e in entries] == list(range(12))
    fields = {"loss", "grad_norm", "num_targets", "solver_steps", "solver_residual", "learning_rate", *TIMINGS}
    assert all(fields < e.keys() for e in entries)
    assert [e["step"] for e in entries if "held_out_loss" in e] == [3, 7, 11]
    assert entries[-1]["held_out_loss"] < entries[3]["held_out_loss"]
    assert all(0 < e["flops_utilisation"] < 1 and e["solver_residual"] <= 1.001e-3 for e in entries)


def test_a_run_that_is_killed_at_any_time_draws_the_same_curve_to_the_last_bit(corpus, finished, tmp_path):
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "experiments.mesanet.pretrain", *SMALL]
    command += ["--data.source", str(corpus), "--output", str(folder)]
    for lines in (2, 7):  # before the first checkpoint, and between two
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline and count_lines(folder) < lines:
                time.sleep(0.005)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert count_lines(folder) >= lines
    run(corpus, folder)
    assert curve(folder) == curve(finished)
    ours, theirs = open_run(folder), open_run(finished)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def count_lines(folder: Path) -> int:
    file = folder / "log.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


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


def test_what_does_not_change_the_numbers_may_change_on_going_on(corpus, finished):
    before = (finished / "log.jsonl").read_bytes()
    run(corpus, finished, "--save-every", "4", "--log-every", "1", "--keep", "3")
    assert (finished / "log.jsonl").read_bytes() == before


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
        (["--data.seed", "-1"], "seed=-1 is negative"),
        (["--model.logit-cap", "0"], "logit_cap, norm_eps and rope_base must be positive"),
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


def test_a_full_disk_keeps_the_checkpoints_there_are(tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"x": np.arange(4.0)})
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(100, 90, 10))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        with pytest.raises(UserError, match="MiB left, a checkpoint needs"):
            checkpoints.save(2, {"x": np.arange(4.0)})
        assert checkpoints.steps() == [1]
        np.testing.assert_array_equal(checkpoints.restore(1, {"x": np.zeros(4)})["x"], np.arange(4.0))


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing_more(capsys, corpus, tmp_path):
    text = complaint(capsys, corpus, tmp_path / "run", "--optimizer.peak-lr", "1e30", "--optimizer.warmup-steps", "0")
    assert re.search("optimizer.peak_lr: the loss or gradient of step .* is not finite", text)
    assert all(np.isfinite(x).all() for x in saved_parameters(tmp_path / "run"))


def saved_parameters(folder: Path) -> list:
    """Arrays of the last checkpoint; none if there is no checkpoint."""
    try:
        return jax.tree.leaves(open_run(folder).params)
    except UserError:
        return []


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


def test_a_damaged_checkpoint_is_named_with_the_one_before_it(capsys, corpus, tmp_path):
    run(corpus, tmp_path)
    for file in (tmp_path / "checkpoints" / "12").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoint .*12 cannot be read .* to go on from step 9"):
        open_run(tmp_path)


def test_a_lost_logbook_is_noticed(capsys, corpus, tmp_path):
    run(corpus, tmp_path, "--num-steps", "2", "--save-every", "1")
    (tmp_path / "log.jsonl").write_text("")
    text = complaint(capsys, corpus, tmp_path, "--num-steps", "2", "--save-every", "1")
    assert re.search("output: .*log.jsonl lacks steps before 2", text)


def test_a_line_cut_short_by_a_crash_and_steps_ahead_of_the_checkpoint_are_dropped(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    with Logbook(file, next_step=2) as book:
        book.write({"step": 2, "loss": float("nan")})
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"step": 0},
        {"step": 1},
        {"step": 2, "loss": None},
    ]


def test_a_logbook_on_a_full_disk_says_how_to_go_on(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with Logbook(tmp_path / "other.jsonl", next_step=0) as book:
        book._file.close()
        book._file = (tmp_path / "log.jsonl").open("ab", buffering=0)
        with pytest.raises(
            UserError, match=r"output: .*log.jsonl cannot be written \(No space left on device\); make room"
        ):
            book.write({"step": 0})


def test_mesh_axes_multiply_to_the_devices_there_are():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 2, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert dict(make_mesh(MeshConfig(tensor=2)).shape) == {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 2}
    with pytest.raises(UserError, match="data=1 x fsdp=1 x sequence=1 x tensor=1 needs 1 devices, but there are 2"):
        make_mesh(MeshConfig(data=1))
