"""A run that goes on with another number of hosts: is any row of the data lost or read twice, is the curve the same?"""

import json
import math
import random
import signal
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from experiments.reliability.config import ReliabilityConfig
from experiments.reliability.courses import Course, complaints, logged

STEPS, BATCH = 120, 4
OPTIONS = (  # learning is slow and the solver exact, lest training itself makes much of what is lost in rounding
    f"--num-steps {STEPS} --save-every 20 --eval-every 60 --micro-batches 1 --mesh.cpu-devices 1 "
    "--optimizer.peak-lr 3e-4 --model.solver.tolerance 1e-6"
)
HOSTS = (4, 2, 4)
TOLERANCE = 1e-4  # of the loss, relative; other hosts add up in another order

Rows = Counter[tuple[int, int]]  # number of a row and sum of its tokens -> how often it was trained on


class Elastic(NamedTuple):
    """What came of the changes."""

    failures: list[str]
    rows: int  # of the data, as one process reads them
    lost: int
    more: int  # read twice, or with another content
    difference: float  # of the loss to that of one process: the largest, relative

    @property
    def found(self) -> str:
        """The figures in a sentence or two."""
        hosts = " -> ".join(map(str, HOSTS))
        return (
            f"{hosts} processes: of {self.rows:,} rows {self.lost} lost, {self.more} read twice. The loss is that of "
            f"one process but for {self.difference:.0e} of it ({TOLERANCE:.0e} is allowed)."
        )


def trial(config: ReliabilityConfig, scratch: Path, folder: Path) -> Elastic:
    """Stops a run on some hosts and goes on with it on others, twice; compares it with the run of one process."""
    course, rng = Course(scratch, "undisturbed-elastic", OPTIONS), random.Random(config.seed)
    with course.start_all(folder / "one", 1, folder / "one") as hosts:
        failures = complaints(hosts)
    rows, done = Counter(), 0
    for phase, count in enumerate(HOSTS):
        last = phase == len(HOSTS) - 1
        stop = STEPS if last else (phase + 1) * STEPS // len(HOSTS) + rng.randint(-9, 9)
        failures += _phase(course, folder / "run", count, stop, folder / f"phase-{phase}")
        now = len(logged(folder / "run"))
        rows += _read(folder, f"phase-{phase}-*", done, now)
        print(f"  {count} processes did steps {done} to {now}", flush=True)
        done = now
    expected = _read(folder, "one-*", 0, STEPS)
    lost, more = expected - rows, rows - expected
    failures += [f"row {min(some)[0]} was {what}" for some, what in ((lost, "lost"), (more, "read twice")) if some]
    difference = _difference(folder / "run", folder / "one")
    if difference > TOLERANCE:
        failures.append(f"the loss differs by {difference:.1e} from that of one process")
    return Elastic(failures, expected.total(), lost.total(), more.total(), difference)


def _phase(course: Course, run: Path, count: int, stop: int, record: Path) -> list[str]:
    """Has some hosts go on with a run until about step `stop`, its end if that is the number of steps."""
    with course.start_all(run, count, record) as hosts:
        asked = stop < STEPS and hosts[0].wait_until(lambda: len(logged(run)) >= stop)
        if asked:
            hosts[-1].send(signal.SIGTERM)
        return complaints(hosts, 128 + signal.SIGTERM if asked else 0)


def _read(folder: Path, records: str, begin: int, end: int) -> Rows:
    """Counts the rows of the steps from `begin` up to `end` in records; hosts read ahead, which does not count."""
    rows = Counter()
    for record in folder.glob(records):
        read = (json.loads(line) for line in record.read_text().splitlines())
        rows.update((row, content) for row, content in read if begin <= row // BATCH < end)
    return rows


def _difference(one: Path, other: Path) -> float:
    ours, theirs = ([entry["loss"] for entry in logged(folder)] for folder in (one, other))
    if len(ours) != len(theirs):
        return math.inf
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
