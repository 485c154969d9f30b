"""Full and read-only disks: is it said clearly, is everything saved before intact, and does the run go on?

The disks are mounted in a namespace that ends with the trial, which Linux allows to anybody or to nobody.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from experiments.reliability.config import ReliabilityConfig
from experiments.reliability.courses import last_line
from experiments.reliability.kills import long_course

NAMESPACE = ("unshare", "--map-root-user", "--mount")


class Disks(NamedTuple):
    """What came of all disks."""

    failures: list[str]
    said: list[str]  # the sentence that each run ended with, if it was one
    intact: int  # newest checkpoints after that
    read_only: int  # how many of the runs were on a read-only disk; for the others it was full
    why_not: str  # why nothing was tried

    @property
    def found(self) -> str:
        """The figures in a sentence or two."""
        if self.why_not:
            return f"not tried: {self.why_not}."
        runs, sentences = len(self.said), sum(map(bool, self.said))
        return (
            f"{runs - self.read_only} times full, {self.read_only} times read-only: {sentences} of {runs} runs ended "
            f"with status 2 and a sentence, after {self.intact} of {runs} the newest checkpoint was intact."
        )


def trial(config: ReliabilityConfig, scratch: Path, folder: Path) -> Disks:
    """Has the trial run where it may mount disks, if there is such a place."""
    allowed = _can_mount()
    if allowed:
        return Disks([], [], 0, 0, allowed)
    long_course(scratch).undisturbed()
    result = folder / "result.json"
    words = (scratch, folder, config.full_disks, config.seed, result)
    command = [*NAMESPACE, sys.executable, "-m", "experiments.reliability.mounted", *map(str, words)]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if ended.returncode:
        raise RuntimeError(last_line(ended.stderr))
    return Disks(**json.loads(result.read_text()), why_not="")


def _can_mount() -> str:
    """Returns why this machine lets nobody mount a disk; nothing if it does."""
    try:
        tried = subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True)
    except FileNotFoundError as error:
        return f"this machine has no command {error.filename}"
    return f"this machine does not let us mount a disk ({last_line(tried.stderr)})" if tried.returncode else ""
