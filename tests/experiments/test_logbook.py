"""The logbook never runs behind a checkpoint and never holds half a line."""

import json
import os
import resource
import signal

import pytest

from experiments import logbook
from experiments.cli import UserError
from experiments.logbook import Logbook


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


def test_a_damaged_line_of_the_logbook_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"st{"step": 1}\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"log.jsonl, line 2 is damaged; put a copy of the file back"):
        Logbook(tmp_path / "log.jsonl", next_step=2)


def test_a_line_that_is_written_in_part_is_taken_back(tmp_path):
    with Logbook(tmp_path / "log.jsonl", next_step=0) as book:
        book.write({"step": 0})
        size = (tmp_path / "log.jsonl").stat().st_size
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, before[1]))
        try:
            with pytest.raises(UserError, match=r"output: .*log.jsonl cannot be written \(File too large\); make room"):
                book.write({"step": 1})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, ignored)
        book.write({"step": 1})
    assert [entry["step"] for entry in logbook.read(tmp_path / "log.jsonl")] == [0, 1]


def test_a_logbook_on_a_full_disk_says_how_to_go_on(tmp_path):
    with Logbook(tmp_path / "log.jsonl", next_step=0) as book, open("/dev/full", "wb", buffering=0) as full:
        os.dup2(full.fileno(), book._file.fileno())
        with pytest.raises(
            UserError, match=r"output: .*log.jsonl cannot be written \(No space left on device\); make room"
        ):
            book.write({"step": 0})
