"""SIGTERM in five situations: is everything saved, is the process gone in time, and does the run go on exactly?"""

import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments.reliability.config import ReliabilityConfig
from experiments.reliability.courses import Course, events, last_line, logged, newest
from experiments.reliability.kills import long_course
from experiments.reliability.launched import Host

LIMIT = 30  # seconds that a scheduler waits before it kills


class Left(NamedTuple):
    """How a process left after it was asked to."""

    seconds: float
    status: int
    printed: str


class Terminations(NamedTuple):
    """What came of all signals."""

    failures: list[str]
    situations: Counter[str]
    longest: float  # seconds from the signal to the end of the process

    @property
    def found(self) -> str:
        """The figures in a sentence or two."""
        where = ", ".join(f"{count} {situation}" for situation, count in self.situations.items())
        return f"{self.situations.total()} signals ({where}). The last process was gone after {self.longest:.1f} s."


def trial(config: ReliabilityConfig, scratch: Path, folder: Path) -> Terminations:
    """Sends one run a signal again and again, in each situation by turns, then lets it come to its end."""
    course, rng, run = long_course(scratch), random.Random(config.seed), folder / "run"
    course.undisturbed()  # keeps its programs, so that all is fast but where a compilation is wanted
    failures, longest, situations = [], 0.0, Counter()
    for number, situation in zip(range(config.terminations), itertools.cycle(SITUATIONS), strict=False):
        left = _terminate(course, run, situation, folder / f"mark-{number}", rng)
        failures += _complaints(run, situation, left)
        longest = max(longest, left.seconds)
        situations[situation] += 1
        print(f"  {situation}: gone after {left.seconds:.1f} s with {len(logged(run))} steps done", flush=True)
    failures += course.finish(run) or course.differences(run)
    return Terminations(failures, situations, longest)


def _terminate(course: Course, run: Path, situation: str, mark: Path, rng: random.Random) -> Left:
    with SITUATIONS[situation](course, run, mark, rng) as host:
        begin = time.monotonic()
        host.send(signal.SIGTERM)
        status, printed = host.end()
        return Left(time.monotonic() - begin, status, printed)


def _complaints(run: Path, situation: str, left: Left) -> list[str]:
    """Says what was wrong with how a process left; the first compilation has nothing to lose, so it may just die."""
    fine = (143, -signal.SIGTERM) if situation == COMPILING else (143,)
    found = []
    if left.status not in fine:
        found.append(f"{situation}: status {left.status} instead of 143: {last_line(left.printed)}")
    if left.seconds > LIMIT:
        found.append(f"{situation}: gone only after {left.seconds:.0f} s")
    if newest(run) != len(logged(run)):
        found.append(f"{situation}: {len(logged(run))} steps were done, the newest checkpoint is {newest(run)}")
    return found


def _training(course: Course, run: Path, mark: Path, rng: random.Random) -> Host:
    steps, ready = rng.randint(1, 60), len(events(run, "compiled"))
    host = course.start(run)
    host.wait_until(lambda: len(events(run, "compiled")) > ready)
    host.wait_for_lines((run / "log.jsonl").read_bytes().count(b"\n") + steps)
    return host


def _compiling(course: Course, run: Path, mark: Path, rng: random.Random) -> Host:
    before = len(events(run, "start"))
    host = course.start(run, "--compile-cache", str(mark))
    host.wait_until(lambda: len(events(run, "start")) > before)
    host.outlives(rng.uniform(0, 1))
    return host


def _slowed(place: str) -> Callable[[Course, Path, Path, random.Random], Host]:
    def start(course: Course, run: Path, mark: Path, rng: random.Random) -> Host:
        host = course.start(run, slowed=(place, str(mark)))
        host.wait_until(mark.exists)
        host.outlives(rng.uniform(0, 1))
        return host

    return start


COMPILING = "in the first compilation"
SITUATIONS: dict[str, Callable[[Course, Path, Path, random.Random], Host]] = {
    "in training": _training,
    "in an evaluation": _slowed("evaluation"),
    COMPILING: _compiling,
    "waiting for data": _slowed("data"),
    "during a save": _slowed("save"),
}
