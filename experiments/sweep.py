"""Tables whose cells take minutes each: every cell is computed once, whatever interrupts the computing."""

import contextlib
import functools
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.checkpoints.manifest import write_durably
from experiments.cli import UserError
from experiments.logbook import append
from experiments.runs import claimed, flat

CELLS = "cells.jsonl"
HIDDEN = {".claimed", "sweep.json.draft"}  # what a start leaves that was killed


class Sweep:
    """A folder with a config and a line for each cell that is done: what it is, and what came of it."""

    def __init__(self, folder: Path, done: list[dict[str, Any]]):
        """Use `opened`."""
        self.folder, self._done = folder, done

    def compute(
        self, cells: Sequence[Mapping[str, Any]], result_of: Callable[..., Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """Returns every cell with its result; those that are not done are computed, written and told on the way.

        Args:
          cells: what they are, values that JSON can hold.
          result_of: takes a cell's values by name, returns its result.
        """
        known, entries = {_key(entry["cell"]): entry for entry in self._done}, []
        print(f"{sum(_key(cell) in known for cell in cells)} of {len(cells)} cells are done", flush=True)
        for number, cell in enumerate(cells, 1):
            if _key(cell) not in known:
                entry = {"cell": dict(cell), **result_of(**cell)}
                with io.FileIO(self.folder / CELLS, "ab") as file:
                    append(file, entry)
                known[_key(cell)] = entry
                print(f"{number}/{len(cells)}  {_line(cell)}: {_line(entry | {'cell': None})}", flush=True)
            entries.append(known[_key(cell)])
        return entries


def computed(config: Any, cells: Sequence[Mapping[str, Any]], plan: Callable, result: Callable) -> list[dict[str, Any]]:
    """Returns all cells of a config with their results; every one is planned before the first is computed.

    Args:
      config: see `opened`.
      cells: what they are.
      plan: takes config and a cell's values by name, raises UserError for what cannot be computed.
      result: the same, returns the result.

    Raises:
      UserError: see `plan` and `opened`.
    """
    for cell in cells:
        plan(config, **cell)
    with opened(config) as sweep:
        return sweep.compute(cells, functools.partial(result, config))


@contextlib.contextmanager
def opened(config: Any) -> Iterator[Sweep]:
    """Makes the sweep of a config, a dataclass, in the folder config.output, or opens the one that is there.

    It may go on in another folder, on another mesh, and with more or fewer cells; each cell has all that it depends on
    in itself or in the other fields.

    Raises:
      UserError: the folder holds something else or another sweep, another process is at it, or it cannot be written.
    """
    folder = config.output
    file, now = folder / "sweep.json", {name: x for name, x in flat(config).items() if _matters(name, x)}
    now = json.loads(json.dumps(now, default=str))
    if not file.exists() and folder.is_dir() and any(p.name not in HIDDEN for p in folder.iterdir()):
        raise UserError(f"output: {folder} is not empty and holds no sweep; give a new folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {folder} cannot be made ({error.strerror}); give another folder.") from None
    with claimed(folder):
        done = _cells(folder / CELLS)
        if done:
            _check_same(file, now)
        write_durably(file, json.dumps(now, indent=2) + "\n")
        yield Sweep(folder, done)


def _matters(name: str, value: Any) -> bool:
    """Tuples and switches of the config itself say which cells there are."""
    return name != "output" and not name.startswith("mesh.") and (not isinstance(value, tuple | bool) or "." in name)


def _line(values: Mapping[str, Any]) -> str:
    shown = ((name, f"{value:.4g}" if isinstance(value, float) else value) for name, value in values.items())
    return "  ".join(f"{name} {value}" for name, value in shown if isinstance(value, str | int))


def _check_same(file: Path, now: Mapping[str, Any]) -> None:
    try:
        before = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"output: {file} is damaged; put it back, or give another --output.") from None
    for field in [*now, *(field for field in before if field not in now)]:
        if before.get(field) != now.get(field):
            raise UserError(
                f"{field}: the sweep in {file.parent} was started with {before.get(field)!r}, not {now.get(field)!r}; "
                f"give the same value or another --output."
            )


def _cells(file: Path) -> list[dict[str, Any]]:
    """The cells that are done; a line that a crash cut short is dropped, from the file as well."""
    if not file.exists():
        return []
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    try:
        entries = [json.loads(line) for line in whole.splitlines()]
        assert all("cell" in entry for entry in entries)
    except (ValueError, AssertionError, TypeError):
        raise UserError(f"output: {file} is damaged; put a copy of it back, or give another --output.") from None
    if whole != text:
        write_durably(file, whole.decode())
    return entries


def _key(cell: Mapping[str, Any]) -> str:
    return json.dumps(cell, sort_keys=True)
