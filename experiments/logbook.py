"""JSON lines are the truth about a run, one for each step and one for each evaluation; all else is a copy."""

import contextlib
import io
import json
import math
import os
from pathlib import Path
from typing import Any

from experiments.checkpoints.manifest import write_durably
from experiments.cli import UserError

# What a clock measured; all other numbers of a run are the same whenever it is interrupted.
CLOCK = ("seconds", "waited_seconds", "tokens_per_second", "flops_utilisation", "slowest_host", "slowest_seconds")


class Logbook:
    """Appends lines to a file; a line that a crash cut short, or that is ahead of the checkpoint, is dropped."""

    def __init__(self, path: Path, next_step: int):
        """Opens the file so that it holds the steps before next_step and nothing else.

        What has to go is dropped in a copy that then takes the file's place, so a crash here loses nothing either.

        Raises:
          UserError: steps before next_step are missing, or a line is damaged.
        """
        kept = [entry for entry in lines(path) if entry["step"] < next_step] if path.exists() else []
        if [entry["step"] for entry in _merged(kept)] != list(range(next_step)):
            raise UserError(
                f"output: {path} lacks steps before {next_step}, where the checkpoint is; put the file back, or give "
                f"another --output."
            )
        # steps done when the state was last evaluated, 0 if it never was
        self.last_evaluation = max((entry["step"] + 1 for entry in kept if "held_out_loss" in entry), default=0)
        write_durably(path, "".join(_line(entry) for entry in kept))
        self._file = io.FileIO(path, "ab")  # a line is with the system before the next step begins

    def write(self, entry: dict[str, Any]) -> None:
        """Appends one entry, which has a "step"; NaN becomes null."""
        append(self._file, entry)

    def sync(self) -> None:
        """Returns when all that was written is on the disk, which outlives more than the process."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def append(file: io.FileIO, entry: dict[str, Any]) -> None:
    """Appends a line as a whole, or not at all.

    Raises:
      UserError: it cannot be written; nothing of it is left.
    """
    line, end = _line(entry).encode(), file.seek(0, os.SEEK_END)
    try:
        written = 0
        while written < len(line):  # a disk with little room left takes a part, and says so only the next time
            written += file.write(line[written:]) or 0
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise UserError(
            f"output: {file.name} cannot be written ({error.strerror}); make room and start the same command again, it "
            f"goes on from what was saved."
        ) from None


def read(path: Path) -> list[dict[str, Any]]:
    """Returns one entry for each step, with its evaluation if there was one."""
    return _merged(lines(path))


def lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a file; a last one without an end is a crash's and does not count.

    Raises:
      UserError: another line is not what was written.
    """
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1):
        try:
            entries.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise UserError(f"run: {path}, line {number} is damaged; put a copy of the file back.") from None
    return entries


def _merged(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What several lines say of a step, together."""
    steps: dict[Any, dict[str, Any]] = {}
    for entry in entries:
        steps.setdefault(entry["step"], {}).update(entry)
    return list(steps.values())


def _line(entry: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(finite) + "\n"
