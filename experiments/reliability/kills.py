"""SIGKILL at random moments: does the run that goes on draw the same curve, and how much does it do again?"""

import itertools
import random
import signal
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import goodput
from experiments.checkpoints import disk
from experiments.reliability.config import ReliabilityConfig
from experiments.reliability.courses import Course, events, last_line, logged, newest

SAVE_EVERY, EVAL_EVERY = 100, 125
OPTIONS = f"--num-steps 2000 --save-every {SAVE_EVERY} --eval-every {EVAL_EVERY} --mesh.cpu-devices 1"


class Kill(NamedTuple):
    """What a killed process left behind."""

    starts: int  # processes of the run so far that came to open the logbook
    situation: str
    logged: int  # steps in the logbook
    saved: int  # step of the newest sealed checkpoint


class Kills(NamedTuple):
    """What came of all kills."""

    failures: list[str]
    situations: Counter[str]
    redone: list[int]  # steps done again, at each start after a kill
    cold_seconds: float  # from the start of a process to its first step, nothing compiled before
    warm_seconds: float  # the same with compiled programs kept

    @property
    def found(self) -> str:
        """The figures in a sentence or two."""
        where = ", ".join(f"{count} {situation}" for situation, count in self.situations.most_common())
        again = f"{statistics.mean(self.redone):.0f} on average, {max(self.redone)} at most" if self.redone else "none"
        return (
            f"{self.situations.total()} kills ({where}). Steps done again after one, with a save every {SAVE_EVERY} "
            f"that counts once it is sealed: {again}. First step after {self.warm_seconds:.0f} s, without kept "
            f"programs {self.cold_seconds:.0f} s."
        )


def long_course(scratch: Path) -> Course:
    """Returns the run that kills, terminations and full disks interrupt."""
    return Course(scratch, "undisturbed", OPTIONS)


def trial(config: ReliabilityConfig, scratch: Path, folder: Path) -> Kills:
    """Kills one run after another, each until it comes to its end, until there were enough kills."""
    course, rng, control = long_course(scratch), random.Random(config.seed), folder / "control"
    cold = seconds_to_first_step(course.undisturbed())
    failures = course.finish(control) or course.differences(control)  # nobody kills it: two runs are the same at all
    span = goodput.last_sign(control) - events(control, "start")[0]["process_start"]
    kills, redone = [], []
    for run in map(str, itertools.count()):
        moments = (rng.uniform(0, span) for _ in range(config.kills - len(kills)))
        here = _hunt(course, folder / run, moments, failures)
        again, wrong = account(here, [start["step"] for start in events(folder / run, "start")])
        kills, redone = kills + here, redone + again
        failures += wrong + course.differences(folder / run)
        if len(kills) >= config.kills or failures:
            break
    situations = Counter(kill.situation for kill in kills)
    return Kills(failures, situations, redone, cold, seconds_to_first_step(control))


def account(kills: Sequence[Kill], starts: Sequence[int]) -> tuple[list[int], list[str]]:
    """Returns the steps done again at each start after a kill, and what was wrong with where it began.

    Args:
      kills: of one run, in order.
      starts: the step that each of its processes began at, but for those killed before that.
    """
    redone, wrong = [], []
    for number, begin in enumerate(starts):
        before = [kill for kill in kills if kill.starts == number]
        if not before:
            continue
        done, saved = max(kill.logged for kill in before), before[-1].saved
        redone.append(done - begin)
        if begin != saved:
            wrong.append(f"a run went on at step {begin}, though step {saved} was saved")
        if saved < (done // SAVE_EVERY - 1) * SAVE_EVERY:  # the newest may still have been on its way
            wrong.append(f"after step {done} the newest checkpoint was that of step {saved}")
    return redone, wrong


def seconds_to_first_step(folder: Path) -> float:
    """Returns how long the first process of a run took from its start to its first step."""
    ready = events(folder, "compiled")[0]
    return ready["start_seconds"] + ready["compile_seconds"]


def _hunt(course: Course, folder: Path, moments: Iterable[float], failures: list[str]) -> list[Kill]:
    """Kills a run at each moment, in seconds from the start of a process, then lets it come to its end."""
    kills = []
    for seconds in moments:
        with course.start(folder) as host:
            if host.outlives(seconds):
                host.send(signal.SIGKILL)
            status, printed = host.end()
        if status != -signal.SIGKILL:
            failures += [f"{folder} ended with status {status}: {last_line(printed)}"] if status else []
            return kills
        kills.append(_left(folder, kills))
        print(f"  {kills[-1].situation}, {kills[-1].logged} steps done", flush=True)
    failures += course.finish(folder)
    return kills


def _left(folder: Path, before: Sequence[Kill]) -> Kill:
    starts = len(events(folder, "start"))
    steps, begun = logged(folder), starts > (before[-1].starts if before else 0)
    return Kill(starts, _situation(folder, steps, begun), len(steps), newest(folder))


def _situation(folder: Path, steps: Sequence[dict], begun: bool) -> str:
    """Says what a process was doing when it was killed."""
    if not begun:
        return "while starting"
    if not any(ready["time"] > events(folder, "start")[-1]["time"] for ready in events(folder, "compiled")):
        return "while compiling"
    if disk.drafts(folder / "checkpoints"):
        return "while saving"
    if steps and len(steps) % EVAL_EVERY == 0 and "held_out_loss" not in steps[-1]:
        return "while evaluating"
    return "while training"
