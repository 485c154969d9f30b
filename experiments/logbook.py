"""JSON lines are the truth about a run, one for each step and one for each evaluation; all else is a copy."""

import json
import math
import os
from pathlib import Path
from typing import Any

from experiments.cli import UserError

# What a clock measured; all other numbers of a run are the same whenever it is interrupted.
CLOCK = ("seconds", "waited_seconds", "tokens_per_second", "flops_utilisation", "slowest_host", "slowest_seconds")


class Logbook:
    """Appends lines to a file; a line that a crash cut short, or that is ahead of the checkpoint, is dropped."""

    def __init__(self, path: Path, next_step: int):
        """Opens the file so that it holds the steps before next_step and nothing else.

        What has to go is dropped in a copy that then takes the file's place, so a crash here loses nothing either.

        Raises:
          UserError: steps before next_step are missing.
        """
        kept = [entry for entry in lines(path) if entry["step"] < next_step] if path.exists() else []
        if [entry["step"] for entry in _merged(kept)] != list(range(next_step)):
            raise UserError(
                f"output: {path} lacks steps before {next_step}, where the checkpoint is; put the file back, or give "
                f"another --output."
            )
        # steps done when the state was last evaluated, 0 if it never was
        self.last_evaluation = max((entry["step"] + 1 for entry in kept if "held_out_loss" in entry), default=0)
        copy = path.with_suffix(".rewritten")
        copy.write_text("".join(_line(entry) for entry in kept), encoding="utf-8")
        os.replace(copy, path)
        self._file = path.open("ab", buffering=0)  # a line is with the system before the next step begins

    def write(self, entry: dict[str, Any]) -> None:
        """Appends one entry, which has a "step"; NaN becomes null."""
        try:
            self._file.write(_line(entry).encode())
        except OSError as error:
            raise UserError(
                f"output: {self._file.name} cannot be written ({error.strerror}); make room and start the same command "
                f"again, it goes on from the last checkpoint."
            ) from None

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


def read(path: Path) -> list[dict[str, Any]]:
    """Returns one entry for each step, with its evaluation if there was one."""
    return _merged(lines(path))


def lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a file; a last one without an end is a crash's and does not count."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def _merged(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What several lines say of a step, together."""
    steps: dict[Any, dict[str, Any]] = {}
    for entry in entries:
        steps.setdefault(entry["step"], {}).update(entry)
    return list(steps.values())


def _line(entry: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(finite) + "\n"
