"""Copies of the logbook for TensorBoard and trackio; log.jsonl stays the truth, and no copy can stop a training.

A copy has every number once, whatever happened to the run. When a run goes on, what a crash kept from the copy is taken
from the logbook, and steps that are done again are not written again: they are bit-equal to what the copy has (another
mesh rounds otherwise, and then the logbook has the newer rounding). So rows may wait in memory, and a copy that is
switched on late has the whole curve.

  tensorboard --logdir runs                 reads the folder `tensorboard` of each run
  trackio show --project mesanet-jax        reads trackio's own store, on this machine
"""

import importlib.util
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from tqdm import tqdm

from experiments import logbook
from experiments.cli import UserError

MODULES = {"tensorboard": "tensorboardX", "trackio": "trackio"}
SENDERS = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_DATASET_ID")
PROJECT = "mesanet-jax"
SECONDS_BETWEEN_WRITES = 5.0  # a training waits for its disk this often, not at every step


class Row(NamedTuple):
    """What was measured in a step; its evaluation may be a row of its own."""

    step: int
    numbers: dict[str, float]


class Copy(Protocol):
    """The same for every tracker."""

    last: dict[str, int]  # newest step of each number that it had when it was opened

    def append(self, rows: Sequence[Row]) -> None:
        """Writes rows so that a crash of this process does not lose them."""
        ...

    def close(self) -> None:
        """Lets go of the files."""
        ...


def check(names: Sequence[str]) -> None:
    """Checks that these trackers can be had; writes nothing.

    Raises:
      UserError: a library is missing, or would send what is tracked to another machine.
    """
    for name in names:
        if importlib.util.find_spec(MODULES[name]) is None:
            raise UserError(
                f"track: {name} needs {MODULES[name]}, which is not installed; install it with "
                f'pip install -c constraints.txt -e ".[track]", or leave {name} out.'
            )
    sender = next((variable for variable in SENDERS if os.environ.get(variable)), None)
    if "trackio" in names and sender:
        raise UserError(f"track: trackio would send the run elsewhere, because {sender} is set; unset {sender}.")


class Trackers:
    """Hands each entry of the logbook to all trackers; one that fails says so once and is then left out."""

    def __init__(self, names: Sequence[str], folder: Path, run_name: str, config: Mapping[str, Any], first: int):
        """Opens the copies and brings them up to date; the logbook in the folder has the steps before `first`.

        Args:
          names: of TRACKERS; each once or more.
          folder: of the run.
          run_name: what the run is called where several are shown.
          config: of the run, shown beside it.
          first: step that is done next.
        """
        self._copies: dict[str, Copy] = {}
        self._rows: list[Row] = []
        self._written = time.monotonic()
        known = json.loads(json.dumps(config, default=str))
        for name in dict.fromkeys(names):
            self._try(name, self._open, name, folder, run_name, known)
        if self._copies and first:
            entries = logbook.read(folder / "log.jsonl")
            self._rows = [_row(entry) for entry in entries if entry["step"] < first]
            self._append()

    def write(self, entry: Mapping[str, Any]) -> None:
        """Takes in an entry of the logbook, which is written within seconds."""
        if self._copies:
            self._rows.append(_row(entry))
            if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
                self._append()

    def close(self) -> None:
        """Writes what is waiting."""
        self._append()
        for name, copy in list(self._copies.items()):
            self._try(name, copy.close)
        self._copies.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _open(self, name: str, *about_the_run) -> None:
        self._copies[name] = TRACKERS[name](*about_the_run)

    def _append(self) -> None:
        rows, self._rows, self._written = self._rows, [], time.monotonic()
        for name, copy in list(self._copies.items()):
            new = [row for row in (_beyond(row, copy.last) for row in rows) if row.numbers]
            if new:
                self._try(name, copy.append, new)

    def _try(self, name: str, action: Callable[..., None], *args) -> None:
        try:
            action(*args)
        except Exception as error:  # whatever a tracker raises, the training is worth more
            self._copies.pop(name, None)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            tqdm.write(
                f"track: {name} stops here ({reason}), the training and its log.jsonl go on; when the same command is "
                f"started again, {name} is brought up to date.",
                file=sys.stderr,
            )


def _row(entry: Mapping[str, Any]) -> Row:
    """Leaves out text and what could not be measured."""
    numbers = {name: float(value) for name, value in entry.items() if isinstance(value, int | float)}
    numbers.pop("step")
    return Row(entry["step"], {name: value for name, value in numbers.items() if math.isfinite(value)})


def _beyond(row: Row, last: Mapping[str, int]) -> Row:
    """Leaves out the numbers that a copy has."""
    return Row(row.step, {name: value for name, value in row.numbers.items() if row.step > last.get(name, -1)})


def _last_steps(rows: Iterable[Row]) -> dict[str, int]:
    """Returns the newest step of each number."""
    last: dict[str, int] = {}
    for row in rows:
        last |= {name: max(row.step, last.get(name, -1)) for name in row.numbers}
    return last


class _TensorBoard:
    """A record of an event file per row, so that a crash leaves a row whole or not at all."""

    def __init__(self, folder: Path, run_name: str, config: dict[str, Any]):
        # SummaryWriter has a thread that dies of a full disk, and then its queue stops the training
        from tensorboardX.event_file_writer import EventsWriter  # pyright: ignore[reportMissingImports]

        files = folder / "tensorboard"
        files.mkdir(exist_ok=True)
        earlier = list(files.glob("events.out.tfevents.*"))
        self.last = _last_steps(row for file in earlier for row in _rows_of_events(file))
        self._file = EventsWriter(str(files / "events"), f".{len(earlier)}")  # never the name of an earlier one
        if not earlier:
            self._file.write_event(_event_of_config(config))
            self._file.flush()

    def append(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._file.write_event(_event_of(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _event_of(row: Row):
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore
    from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore

    values = [Summary.Value(tag=name, simple_value=value) for name, value in row.numbers.items()]
    return Event(wall_time=time.time(), step=row.step, summary=Summary(value=values))


def _event_of_config(config: dict[str, Any]):
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore
    from tensorboardX.summary import text  # pyright: ignore

    page = "".join(f"    {line}\n" for line in json.dumps(config, indent=2).splitlines())
    return Event(wall_time=time.time(), summary=text("config", page))


def _rows_of_events(file: Path) -> Iterator[Row]:
    """Reads the rows of an event file; a record that a crash cut short ends it, here as in TensorBoard."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore

    data, begin = file.read_bytes(), 0
    while begin + 12 <= len(data):  # eight bytes of length, four of checksum, the record, four of checksum
        end = begin + 12 + int.from_bytes(data[begin : begin + 8], "little")
        if end + 4 > len(data):
            return
        event = Event.FromString(data[begin + 12 : end])
        yield Row(event.step, {x.tag: x.simple_value for x in event.summary.value if x.HasField("simple_value")})
        begin = end + 4


class _Trackio:
    """Rows of trackio's own database.

    trackio.init would ask who the owner of a Hugging Face token is, and write from a thread that keeps its errors to
    itself; the store under it does neither.
    """

    def __init__(self, folder: Path, run_name: str, config: dict[str, Any]):
        from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

        self._store, self._config = SQLiteStorage, config
        self._name = _name_for_good(folder / "trackio.name", run_name)
        stored = SQLiteStorage.get_logs(PROJECT, self._name)  # beside each row its step and when it was written
        self.last = _last_steps(Row(entry["step"], entry) for entry in stored)

    def append(self, rows: Sequence[Row]) -> None:
        self._store.bulk_log(
            PROJECT, self._name, [row.numbers for row in rows], [row.step for row in rows], config=self._config
        )

    def close(self) -> None:
        pass


def _name_for_good(file: Path, run_name: str) -> str:
    """Returns the name in the file, made at first: a run of the same name in a new folder is another one."""
    name = file.read_text(encoding="utf-8").strip() if file.exists() else ""
    if not name:
        name = f"{run_name}-{secrets.token_hex(3)}"
        file.write_text(name + "\n", encoding="utf-8")
    return name


TRACKERS = {"tensorboard": _TensorBoard, "trackio": _Trackio}
