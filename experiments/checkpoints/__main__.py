"""Look at the checkpoints of a run, and verify that they hold what was saved. Touches no device.

  python -m experiments.checkpoints show runs/tiny                   every checkpoint: one line, every byte read
  python -m experiments.checkpoints show runs/tiny --quick           the same from the manifests and file sizes alone
  python -m experiments.checkpoints show runs/tiny/checkpoints/1000  one checkpoint, with its arrays

Reads as fast as the disk does. Ends with status 1 if a checkpoint is damaged.
"""

import dataclasses
import os
import sys
from pathlib import Path

import tyro

from experiments import cli
from experiments.checkpoints import show


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """What is looked at.

    Attributes:
      path: a run's folder, its folder of checkpoints, or one checkpoint.
      quick: compare names and sizes of the files, and do not read them.
    """

    path: tyro.conf.Positional[Path] = Path("runs/tiny")
    quick: bool = False


def main(config: ShowConfig) -> None:
    """Prints the table.

    Raises:
      UserError: there is no checkpoint at that path.
    """
    found = show.find(config.path)
    rows = [show.look(folder, config.quick) for folder in found]
    rows = [row for row in rows if os.path.lexists(row.folder)]  # a run that goes on deletes the oldest meanwhile
    print("\n".join(show.table(rows, config.quick)))
    if found == [config.path] and rows and rows[0].content is not None:
        print("\n" + "\n".join(show.arrays(rows[0].content)))
    elif left := show.leftovers(config.path):
        print("\n" + "\n".join(left))
    if any(row.damage for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    cli.run_preset(main, {"show": ("a table of checkpoints, verified", ShowConfig())}, "show")
