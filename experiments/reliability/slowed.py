"""The training command with one part that takes long, or that writes down what it reads; the numbers stay the same.

python -m experiments.reliability.slowed data MARK ...          options of experiments.mesanet.pretrain follow
python -m experiments.reliability.slowed evaluation MARK ...
python -m experiments.reliability.slowed save MARK ...
python -m experiments.reliability.slowed rows RECORD ...

MARK is created when the slow part begins; RECORD gets a line for each row of the data that this process reads.
"""

import functools
import itertools
import json
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments import cli, loop
from experiments.checkpoints.saver import Saver
from experiments.cli import UserError
from experiments.feed import Feed
from experiments.mesanet.pretrain import PRESETS, main


class Recorded:
    """Rows of data that write down their number and a sum of their tokens when they are read."""

    def __init__(self, rows, record: Path):
        self._rows, self._record = rows, record

    def __getitem__(self, index: int):
        row = self._rows[index]
        with self._record.open("a") as file:
            file.write(json.dumps([index, zlib.crc32(row.tokens.tobytes())]) + "\n")
        return row


def _slow(owner, name: str, call: int, seconds: float, mark: Path) -> None:
    """Makes one call of a function wait."""
    function, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(function)
    def slowed(*args, **kwargs):
        if next(calls) == call:
            mark.touch()
            time.sleep(seconds)
        return function(*args, **kwargs)

    setattr(owner, name, slowed)


def _record(record: Path) -> None:
    rows = loop.shuffled_rows
    loop.shuffled_rows = lambda *args: Recorded(rows(*args), record)


PLACES: dict[str, Callable[[Path], None]] = {
    "data": functools.partial(_slow, Feed, "_read", 30, 60.0),  # longer than a run may take to leave
    "evaluation": functools.partial(_slow, loop, "split", 1, 3.0),
    "save": functools.partial(_slow, Saver, "_seal", 1, 3.0),
    "rows": _record,
}


def start(args: Sequence[str]) -> None:
    """Slows what the first word names, then trains with the options that follow the second."""
    if args[:1] in (["-h"], ["--help"]):
        return print(__doc__)
    if len(args) < 2 or args[0] not in PLACES:
        words = f"error: name what is slowed, one of {', '.join(PLACES)}, and a file; --help says more."
        print(words, file=sys.stderr)
        sys.exit(UserError.status)
    PLACES[args[0]](Path(args[1]))
    cli.run_preset(main, PRESETS, default="tiny", args=args[2:])


if __name__ == "__main__":
    start(sys.argv[1:])
