"""What is tried, and how often."""

import dataclasses
from pathlib import Path
from typing import Literal

TrialName = Literal["kills", "terminations", "hosts", "elastic", "corruptions", "nans", "disks"]
ALL: tuple[TrialName, ...] = ("kills", "terminations", "hosts", "elastic", "corruptions", "nans", "disks")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReliabilityConfig:
    """Which trials, how many of each.

    Attributes:
      trials: which; the page is written only if it is all of them.
      kills: SIGKILLs of a training run.
      terminations: SIGTERMs of a training run, in five situations by turns.
      host_kills: SIGKILLs of one of two hosts, by turns.
      corruptions: checkpoints that are spoilt.
      full_disks: times that a disk fills up under a run.
      seed: of all moments and choices.
      output: folder to work in, which a trial that fails keeps; empty takes a temporary one.
      page: where the results are written; an earlier page is replaced, nothing else.
    """

    trials: tuple[TrialName, ...] = ALL
    kills: int = 20
    terminations: int = 20
    host_kills: int = 12
    corruptions: int = 1000
    full_disks: int = 6
    seed: int = 0
    output: str = ""
    page: Path = Path("RELIABILITY.md")

    def __post_init__(self):
        for name in ("kills", "terminations", "host_kills", "corruptions", "full_disks"):
            if getattr(self, name) < 1:
                raise ValueError(f"ReliabilityConfig: {name}={getattr(self, name)} must be at least 1.")
        if not self.trials:
            raise ValueError(f"ReliabilityConfig: trials is empty; name some of {', '.join(ALL)}.")
