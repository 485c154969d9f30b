"""One of two hosts is killed: does the other one leave soon, and does the run go on exactly?"""

import itertools
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import goodput
from experiments.reliability.config import ReliabilityConfig
from experiments.reliability.courses import Course, complaints, events, last_line

LIMIT = 10  # seconds
OPTIONS = (
    "--num-steps 200 --save-every 20 --eval-every 50 --mesh.cpu-devices 2 --mesh.data 1 --mesh.fsdp 2 --mesh.tensor 2"
)
NAMES = ("coordinator", "worker")


class HostKill(NamedTuple):
    """One of two hosts was killed."""

    name: str
    seconds: float  # until the other one was gone


class HostKills(NamedTuple):
    """What came of all kills."""

    failures: list[str]
    kills: list[HostKill]

    @property
    def found(self) -> str:
        """The figures in a sentence or two."""
        longest = {name: max([kill.seconds for kill in self.kills if kill.name == name], default=0) for name in NAMES}
        return (
            f"{len(self.kills)} kills. The worker was gone at most {longest['coordinator']:.1f} s after the "
            f"coordinator, the coordinator {longest['worker']:.1f} s after the worker."
        )


def trial(config: ReliabilityConfig, scratch: Path, folder: Path) -> HostKills:
    """Kills coordinator and worker by turns, at random moments, until there were enough kills."""
    course, rng = Course(scratch, "undisturbed-hosts", OPTIONS, hosts=2), random.Random(config.seed)
    undisturbed = course.undisturbed()
    span = goodput.last_sign(undisturbed) - events(undisturbed, "compiled")[0]["time"]
    failures, kills = [], []
    for run in map(str, itertools.count()):
        moments = [rng.uniform(0, 0.5 * span) for _ in range(config.host_kills - len(kills))]
        kills += _hunt(course, folder / run, moments, len(kills), failures)
        failures += course.finish(folder / run) or course.differences(folder / run)
        if len(kills) >= config.host_kills or failures:
            break
    return HostKills(failures, kills)


def _hunt(course: Course, folder: Path, moments: Sequence[float], first: int, failures: list[str]) -> list[HostKill]:
    """Kills a host of a run at each moment, by turns, unless the run comes to its end before.

    `first` is the number of the first kill among all.
    """
    kills = []
    for number, moment in enumerate(moments, first):
        kill = _kill(course, folder, number % 2, moment, failures)
        if kill is None:
            break
        kills.append(kill)
        print(f"  {kill.name} killed, the other gone after {kill.seconds:.1f} s", flush=True)
    return kills


def _kill(course: Course, folder: Path, index: int, moment: float, failures: list[str]) -> HostKill | None:
    """Kills a host some seconds after all have met; returns None if the run came to its end before."""
    before = len(events(folder, "start"))
    with course.start_all(folder) as hosts:
        hosts[0].wait_until(lambda: len(events(folder, "start")) > before)
        if not hosts[index].outlives(moment):
            failures += complaints(hosts)
            return None
        begin = time.monotonic()
        hosts[index].send(signal.SIGKILL)
        status, printed = hosts[1 - index].end()
        kill = HostKill(NAMES[index], time.monotonic() - begin)
    if status == 0 and any(event["signal"] == 0 for event in events(folder, "end")):
        return None  # all was done, and the one that was killed was only saying goodbye
    if status == 0 or kill.seconds > LIMIT:
        said = f"status {status}: {last_line(printed)}"
        failures.append(f"the {kill.name} was killed, the other left after {kill.seconds:.1f} s with {said}")
    return kill
