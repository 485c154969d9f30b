"""The trials have teeth: what they are there to find is found, counted, told on the page, and ends in exit status 1."""

import dataclasses
import json
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from experiments import cli
from experiments.checkpoints import store
from experiments.reliability import __main__ as command
from experiments.reliability import disks, elastic, kills, mounted, poisons, restores, slowed, terminations
from experiments.reliability.config import ALL, ReliabilityConfig
from experiments.reliability.corruptions import swap_folders
from experiments.reliability.courses import same
from experiments.reliability.kills import Kill, account
from experiments.reliability.launched import write_corpus
from experiments.reliability.page import Outcome, page
from experiments.reliability.terminations import COMPILING, Left
from experiments.runs import RunConfig
from mesanet_jax.loss import Batch


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of small texts."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def attentive(corpus: Path, output: Path) -> RunConfig:
    """The run that is poisoned, as a Transformer, which compiles sooner."""
    config = poisons.small(corpus, output)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, pattern=("attention",)))


@pytest.fixture(scope="module")
def poisoned(corpus, tmp_path_factory):
    """A run with a token beyond the vocabulary now and then, and what was wrong with it."""
    config = attentive(corpus, tmp_path_factory.mktemp("runs") / "token")
    return config, list(poisons.poison(config, "a token"))


@pytest.fixture(scope="module")
def saved(poisoned):
    """What that run left in its folder of checkpoints."""
    return restores.saved_by(poisoned[0].output)


def test_a_poisoned_token_costs_its_steps_and_nothing_else(poisoned):
    assert poisoned[1] == []


def test_a_poisoned_loss_costs_its_steps_and_nothing_else(corpus, tmp_path):
    assert list(poisons.poison(attentive(corpus, tmp_path / "loss"), "the loss")) == []


def test_a_run_that_does_not_skip_what_it_should_is_found(poisoned, monkeypatch):
    monkeypatch.setattr(poisons, "BAD", (*poisons.BAD, 20))
    wrong = list(poisons._wrong_entries(poisoned[0], "to {row})"))
    assert wrong[:2] == ["at step 20 4 had been skipped", "of step 20 the logbook says nothing"]


def test_twenty_corruptions_are_found_or_harmless(saved, tmp_path):
    found = restores.spoil(saved, 20, random.Random(1), tmp_path)
    assert found.failures == [] and found.outcomes.total() == 20 and list(tmp_path.iterdir()) == []
    assert found.found.startswith("20 corruptions: ") and found.found.endswith(" 0 silent.")


def test_a_corruption_that_nobody_notices_is_called_silent_and_kept(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(store.manifest, "verify", lambda *_: None)
    monkeypatch.setattr(restores, "corrupt", flip_largest)
    found = restores.spoil(saved, 1, random.Random(0), tmp_path)
    assert found.outcomes == Counter({"silent": 1}) and "is not what was saved" in found.failures[0]
    assert (tmp_path / "failed-0" / "24").is_dir()


def flip_largest(rng: random.Random, folder: Path) -> str:
    """Changes the last bit of the arrays."""
    file = max((file for file in (folder / "24").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return "flipped a bit"


def test_passing_over_a_checkpoint_that_is_whole_is_a_failure(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(restores, "corrupt", lambda rng, folder: swap_folders(rng, folder))
    assert restores.spoil(saved, 1, random.Random(0), tmp_path / "swapped").failures == []
    monkeypatch.setattr(restores, "_content", lambda checkpoint: dict(saved.contents[checkpoint.name]))
    found = restores.spoil(saved, 1, random.Random(0), tmp_path)
    assert "step 16 was taken, step 24 is intact" in found.failures[0]


def test_kills_account_for_what_is_done_again():
    killed = [Kill(1, "", 150, 100), Kill(1, "", 150, 100), Kill(2, "", 320, 200)]
    assert account(killed, [0, 100, 200]) == ([50, 120], [])
    assert account(killed, [0, 0, 200])[1] == ["a run went on at step 0, though step 100 was saved"]
    assert account([Kill(1, "", 320, 100)], [0, 100])[1] == [
        "after step 320 the newest checkpoint was that of step 100"
    ]


def write_lines(file: Path, *entries) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_the_moment_of_a_kill_is_told_from_what_is_left(tmp_path):
    start, compiled = {"event": "start", "time": 1.0}, {"event": "compiled", "time": 2.0}
    (tmp_path / "checkpoints").mkdir()
    assert kills._left(tmp_path, []).situation == "while starting"
    write_lines(tmp_path / "events.jsonl", start)
    assert kills._left(tmp_path, []).situation == "while compiling"
    assert kills._left(tmp_path, [Kill(1, "", 0, 0)]).situation == "while starting"
    write_lines(tmp_path / "events.jsonl", start, compiled)
    write_lines(tmp_path / "log.jsonl", *({"step": i} for i in range(kills.EVAL_EVERY)))
    assert kills._left(tmp_path, []) == Kill(1, "while evaluating", kills.EVAL_EVERY, 0)
    (tmp_path / "checkpoints" / "100.unsealed").mkdir()
    assert kills._left(tmp_path, []).situation == "while saving"


def test_leaving_late_with_another_status_or_without_saving_is_a_failure(tmp_path):
    assert terminations._complaints(tmp_path, COMPILING, Left(1.0, -15, "")) == []
    write_lines(tmp_path / "log.jsonl", {"step": 0})
    assert terminations._complaints(tmp_path, "in training", Left(31.0, -15, "so\nlong")) == [
        "in training: status -15 instead of 143: long",
        "in training: gone only after 31 s",
        "in training: 1 steps were done, the newest checkpoint is 0",
    ]


def test_rows_that_were_read_ahead_do_not_count_and_rows_read_twice_do(tmp_path):
    write_lines(tmp_path / "phase-0-0", [0, 7], [2, 7], [4, 7], [8, 7])
    write_lines(tmp_path / "phase-0-1", [1, 7], [3, 7], [3, 7], [5, 7])
    rows = elastic._read(tmp_path, "phase-0-*", 0, 1)
    assert rows == Counter({(0, 7): 1, (1, 7): 1, (2, 7): 1, (3, 7): 2})


def test_a_sentence_is_the_last_line_and_ends_in_a_stop():
    assert mounted.SENTENCE.search("step 3\nerror: output: full; make room.\n")
    assert not mounted.SENTENCE.search("error: output: full.\nTraceback\n")
    assert not mounted.SENTENCE.search("error: output: full\n")


def test_where_nobody_may_mount_a_disk_the_page_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(disks, "NAMESPACE", ("no-such-command",))
    found = disks.trial(ReliabilityConfig(), tmp_path, tmp_path)
    assert found.failures == [] and found.found == "not tried: this machine has no command no-such-command."


def test_a_slow_part_marks_its_beginning_and_changes_nothing(tmp_path):
    class Part:
        def double(self, x):
            return 2 * x

    slowed._slow(Part, "double", 2, 0.3, tmp_path / "mark")
    assert Part().double(2) == 4 and not (tmp_path / "mark").exists()
    call = threading.Thread(target=Part().double, args=(3,))
    begin = time.monotonic()
    call.start()
    call.join()
    assert time.monotonic() - begin >= 0.3 and (tmp_path / "mark").exists()


def test_recorded_rows_are_the_rows(tmp_path):
    rows = [Batch(np.full(3, i), np.zeros(3)) for i in range(2)]
    recorded = slowed.Recorded(rows, tmp_path / "record")
    assert recorded[1] is rows[1] and recorded[0] is rows[0]
    lines = [json.loads(line) for line in (tmp_path / "record").read_text().splitlines()]
    assert [number for number, _ in lines] == [1, 0] and lines[0][1] != lines[1][1]


def test_the_slowed_command_says_what_it_takes(capsys):
    slowed.start(["--help"])
    assert "options of experiments.mesanet.pretrain follow" in capsys.readouterr().out
    for args in ([], ["data"], ["date", "mark"]):
        with pytest.raises(SystemExit) as left:
            slowed.start(args)
        complaint = "error: name what is slowed, one of data, evaluation, save, rows, and a file; --help says more.\n"
        assert left.value.code == 2 and capsys.readouterr().err == complaint


class Made(NamedTuple):
    """A result that was made up."""

    failures: list[str]
    found: str = "Tried."


def fail(config, scratch, folder) -> Made:
    """Leaves something behind and fails."""
    (folder / "left").touch()
    return Made(["it hangs"])


def test_what_a_broken_trial_left_is_kept_and_named_and_the_rest_is_not(monkeypatch, tmp_path, capsys):
    trials = {name: command.Trial(lambda *_: Made([]), "promise", "how") for name in ALL}
    monkeypatch.setattr(command, "TRIALS", trials | {"hosts": command.Trial(fail, "promise", "how")})
    scratch = tmp_path / "scratch"
    with pytest.raises(SystemExit):
        command.main(ReliabilityConfig(output=str(scratch), page=tmp_path / "page.md"))
    assert [path.name for path in scratch.iterdir()] == ["hosts"] and (scratch / "hosts" / "left").exists()
    assert f"error: broken: hosts; see {scratch / 'hosts'}\n" in capsys.readouterr().err


def test_a_folder_with_something_in_it_is_refused(tmp_path, capsys):
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit) as left:
        cli.run(command.main, ReliabilityConfig, ["--output", str(tmp_path)])
    assert left.value.code == 2 and "is not empty; give a new folder" in capsys.readouterr().err


def test_only_an_earlier_page_is_replaced(monkeypatch, tmp_path, capsys):
    held = {name: command.Trial(lambda *_: Made([]), "promise", "how") for name in ALL}
    tried = {name: command.Trial(lambda *_: pytest.fail("work was done"), "promise", "how") for name in ALL}
    notes, own = tmp_path / "notes.md", tmp_path / "page.md"
    notes.write_text("mine")
    monkeypatch.setattr(command, "TRIALS", tried)
    with pytest.raises(SystemExit) as left:
        cli.run(command.main, ReliabilityConfig, ["--page", str(notes)])
    assert left.value.code == 2 and notes.read_text() == "mine"
    assert f"page: {notes} is no page of this command; give a new file." in capsys.readouterr().err
    monkeypatch.setattr(command, "TRIALS", held)
    for promise in ("promise", "vow"):
        held |= {"kills": command.Trial(lambda *_: Made([]), promise, "how")}
        monkeypatch.setattr(command, "TRIALS", held)
        command.main(ReliabilityConfig(page=own))
    assert "| vow |" in own.read_text()


def test_nothing_to_try_is_refused():
    with pytest.raises(ValueError, match="kills=0 must be at least 1"):
        ReliabilityConfig(kills=0)


def test_two_trees_are_the_same_to_the_last_bit_or_not_at_all():
    nan, zero = float("nan"), {"a": 0.0, "b": [1]}
    assert same({"a": nan}, {"a": nan}) and same(zero, {"a": 0.0, "b": [1]})
    assert not same(zero, {"a": -0.0, "b": [1]}) and not same(zero, {"a": 0.0}) and not same({"a": 1}, {"a": 1.0})


def test_an_outcome_is_told_in_one_row():
    text = page([Outcome("kills", "it goes on", "killed", "two\nlines", ["a | b"], 61.0)])
    assert "| it goes on | killed | **Broken, 1 times:** a \\| b. two lines 61 s |" in text
    assert "in 1 minutes" in text
