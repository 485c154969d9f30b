"""One JSON line per step is the truth about a run; the console is a copy."""

import json
import math
import os
from pathlib import Path
from typing import Any

from experiments.cli import UserError


class Logbook:
    """Appends lines to a file; a line that a crash cut short, or that is ahead of the checkpoint, is dropped."""

    def __init__(self, path: Path, next_step: int):
        """Opens the file so that it holds the steps before next_step and nothing else.

        What has to go is dropped in a copy that then takes the file's place, so a crash here loses nothing either.

        Raises:
          UserError: steps before next_step are missing.
        """
        kept = [entry for entry in read(path) if entry["step"] < next_step] if path.exists() else []
        if [entry["step"] for entry in kept] != list(range(next_step)):
            raise UserError(
                f"output: {path} lacks steps before {next_step}, where the checkpoint is; put the file back, or give "
                f"another --output."
            )
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

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, *error) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of a logbook; a last line without an end is a crash's and does not count."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _line(entry: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(finite) + "\n"
