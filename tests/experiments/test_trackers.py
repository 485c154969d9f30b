"""A tracker shows every step once, whatever happens to the run; whatever happens to a tracker, the run goes on."""

import importlib.util
import json
import math
import shutil
import socket
import struct
import sys
import types
from pathlib import Path

import pytest

from experiments import trackers
from experiments.cli import UserError
from experiments.trackers import PROJECT, SENDERS, TRACKERS, Trackers, check

BOTH = ("tensorboard", "trackio")


class Store:
    """What trackio's store is asked for, in memory."""

    rows: dict[tuple[str, str], list[tuple[int, dict]]]

    @classmethod
    def get_logs(cls, project, run):
        return [{**numbers, "timestamp": "now", "step": step} for step, numbers in cls.rows.get((project, run), [])]

    @classmethod
    def bulk_log(cls, project, run, metrics, steps, config):
        cls.rows.setdefault((project, run), []).extend(zip(steps, metrics, strict=True))


@pytest.fixture(autouse=True)
def trackio_in_memory(monkeypatch):
    Store.rows = {}
    module = types.ModuleType("trackio.sqlite_storage")
    monkeypatch.setattr(module, "SQLiteStorage", Store, raising=False)
    monkeypatch.setitem(sys.modules, "trackio", types.ModuleType("trackio"))
    monkeypatch.setitem(sys.modules, "trackio.sqlite_storage", module)


@pytest.fixture
def crashed():
    """Takes copies that are never closed, and lets go of their files when the test is over."""
    crashed: list[Trackers] = []
    yield crashed
    for copies in crashed:
        for copy in copies._copies.values():
            copy.close()


@pytest.fixture(params=BOTH)
def name(request):
    if request.param == "tensorboard":
        pytest.importorskip("tensorboardX")
    return request.param


def entry(step: int) -> dict:
    return {"step": step, "loss": 1 / (step + 1), "solver_steps": None, "rate": math.nan, "host": "a", "num_targets": 3}


def train(folder: Path, names, first: int, last: int, close: bool = True) -> Trackers:
    """Does steps as the loop does: the logbook is cut at the checkpoint, a copy lags behind."""
    log = folder / "log.jsonl"
    kept = log.read_text().splitlines(keepends=True)[:first] if log.exists() else []
    log.write_text("".join(kept))
    copies = Trackers(names, folder, folder.name, {"output": folder}, first)
    with log.open("a") as file:
        for step in range(first, last):
            file.write(json.dumps({**entry(step), "rate": None}) + "\n")
            copies.write(entry(step))
    if close:
        copies.close()
    return copies


def shown(folder: Path, name: str) -> list[tuple[int, dict]]:
    """The steps that a tracker shows, with their numbers."""
    if name == "trackio":
        return Store.rows.get((PROJECT, (folder / "trackio.name").read_text().strip()), [])
    files = sorted((folder / "tensorboard").iterdir(), key=lambda file: int(file.suffix[1:]))
    events = [event for file in files for event in read_events(file)]
    rows = [(e.step, {v.tag: v.simple_value for v in e.summary.value if v.HasField("simple_value")}) for e in events]
    return [row for row in rows if row[1]]


def read_events(file: Path) -> list:
    """The records that TensorBoard would read: up to the first that is cut short or has a wrong checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, events = file.read_bytes(), []
    while len(data) >= 12:
        (size,) = struct.unpack("<Q", data[:8])
        record, check_size, check_record = data[12 : 12 + size], data[8:12], data[12 + size : 16 + size]
        if check_size != checksum(data[:8]) or check_record != checksum(record):
            break
        events.append(Event.FromString(record))
        data = data[16 + size :]
    return events


def checksum(data: bytes) -> bytes:
    """CRC-32C, rotated and shifted as TensorFlow's record format has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def steps(folder: Path, name: str) -> list[int]:
    return [step for step, _ in shown(folder, name)]


def test_a_tracker_shows_the_numbers_of_a_step_and_nothing_else(name, tmp_path):
    train(tmp_path, [name], 0, 3)
    assert shown(tmp_path, name) == [
        (step, {"loss": pytest.approx(1 / (step + 1)), "num_targets": 3}) for step in range(3)
    ]


def test_steps_that_are_done_again_are_not_shown_again(name, tmp_path):
    train(tmp_path, [name], 0, 7)
    train(tmp_path, [name], 4, 9)
    assert steps(tmp_path, name) == list(range(9))


def test_rows_that_a_crash_kept_from_a_tracker_are_taken_from_the_logbook(name, tmp_path, crashed):
    train(tmp_path, [name], 0, 4)
    crashed.append(train(tmp_path, [name], 4, 8, close=False))
    assert steps(tmp_path, name) == list(range(4)), "the rows were to be lost"
    train(tmp_path, [name], 6, 9)
    assert steps(tmp_path, name) == list(range(9))


def test_a_tracker_that_is_switched_on_late_has_the_whole_curve(name, tmp_path):
    train(tmp_path, [], 0, 5)
    train(tmp_path, [name], 5, 6)
    assert steps(tmp_path, name) == list(range(6))


def test_rows_reach_a_tracker_while_the_training_goes_on(name, tmp_path, crashed, monkeypatch):
    monkeypatch.setattr(trackers, "SECONDS_BETWEEN_WRITES", 0.0)
    crashed.append(train(tmp_path, [name], 0, 5, close=False))
    assert steps(tmp_path, name) == list(range(5))


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_an_evaluation_that_follows_its_step_is_shown_once(seconds, name, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "SECONDS_BETWEEN_WRITES", seconds)
    copies = train(tmp_path, [name], 0, 4, close=False)
    copies.write({"step": 3, "held_out_loss": 2.5})
    copies.close()
    for _ in range(2):
        copies = train(tmp_path, [name], 2, 4, close=False)
        copies.write({"step": 3, "held_out_loss": 2.5})
        copies.write({"step": 3, "other_loss": 1.5})  # as after a crash before the evaluation was told
        copies.close()
    told = [(step, key) for step, numbers in shown(tmp_path, name) for key in numbers]
    keys = [(step, key) for step in range(4) for key in ("loss", "num_targets")]
    assert sorted(told) == sorted([*keys, (3, "held_out_loss"), (3, "other_loss")])


def test_a_record_that_a_crash_cut_short_is_written_anew(tmp_path):
    pytest.importorskip("tensorboardX")
    train(tmp_path, ["tensorboard"], 0, 5)
    (file,) = (tmp_path / "tensorboard").iterdir()
    whole = file.read_bytes()
    for lost in (1, 4, 5, 30):  # in the checksum, at its edges, in the record
        file.write_bytes(whole[:-lost])
        assert steps(tmp_path, "tensorboard") == list(range(4))
        train(tmp_path, ["tensorboard"], 5, 6)
        assert steps(tmp_path, "tensorboard") == list(range(6))
        for later in set((tmp_path / "tensorboard").iterdir()) - {file}:
            later.unlink()


def test_tensorboard_shows_the_config_once(tmp_path):
    pytest.importorskip("tensorboardX")
    train(tmp_path, ["tensorboard"], 0, 2)
    train(tmp_path, ["tensorboard"], 2, 4)
    events = [event for file in (tmp_path / "tensorboard").iterdir() for event in read_events(file)]
    texts = [value.tensor.string_val[0] for e in events for value in e.summary.value if value.tag.startswith("config")]
    assert len(texts) == 1 and str(tmp_path).encode() in texts[0]


def test_a_run_of_the_same_name_in_a_new_folder_is_another_one(tmp_path):
    folder = tmp_path / "tiny"
    for _ in range(2):
        folder.mkdir()
        train(folder, ["trackio"], 0, 3)
        assert steps(folder, "trackio") == [0, 1, 2]
        shutil.rmtree(folder)
    assert len(Store.rows) == 2 and all(run.startswith("tiny-") for _, run in Store.rows)


class Broken:
    """A tracker that fails in one of its functions."""

    def __init__(self, where: str):
        self.where, self.last = where, {}
        self.fail("open")

    def fail(self, here: str) -> None:
        if here == self.where:
            raise OSError(28, "No space left on device")

    def append(self, rows) -> None:
        self.fail("append")

    def close(self) -> None:
        self.fail("close")


@pytest.mark.parametrize("where", ["open", "append", "close"])
def test_a_tracker_that_fails_says_so_once_and_harms_nobody(where, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setitem(TRACKERS, "tensorboard", lambda folder, run_name, config: Broken(where))
    train(tmp_path, BOTH, 0, 5)
    said = capsys.readouterr().err
    assert said.count("\n") == said.count("track: tensorboard stops here") == said.count("No space left") == 1
    assert steps(tmp_path, "trackio") == list(range(5))


def test_a_library_that_is_missing_is_named_before_anything_is_written(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == "tensorboardX" else object())
    check([])
    check(["trackio"])
    with pytest.raises(UserError, match=r"^track: tensorboard needs tensorboardX, .* pip install .*\[track\]"):
        check(BOTH)


@pytest.mark.parametrize("variable", SENDERS)
def test_trackio_is_refused_where_it_would_send_the_run_elsewhere(variable, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: object())
    monkeypatch.setenv(variable, "somebody/somewhere")
    check(["tensorboard"])
    with pytest.raises(UserError, match=f"^track: .* unset {variable}"):
        check(["trackio"])


def test_the_real_trackio_opens_no_connection(tmp_path, monkeypatch):
    for module in ("trackio", "trackio.sqlite_storage"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    monkeypatch.setenv("HF_TOKEN", "hf_whose")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    calls = []
    monkeypatch.setattr(socket.socket, "connect", lambda *args: calls.append(args))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: calls.append(args))
    train(tmp_path, ["trackio"], 0, 4)
    train(tmp_path, ["trackio"], 2, 6)
    run = (tmp_path / "trackio.name").read_text().strip()
    assert [row["step"] for row in storage.get_logs(PROJECT, run)] == list(range(6))
    assert storage.get_run_config(PROJECT, run)["output"] == str(tmp_path)
    assert not calls
