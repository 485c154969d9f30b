"""Corrupted checkpoints: is every one found or harmless, and is the last good step taken?"""

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax

from experiments.checkpoints import Checkpoints
from experiments.cli import UserError
from experiments.mesh import MeshConfig, make_mesh
from experiments.programs import Programs
from experiments.reliability.config import ReliabilityConfig
from experiments.reliability.corruptions import corrupt
from experiments.reliability.courses import Course, same
from experiments.runs import open_run

OPTIONS = "--num-steps 12 --save-every 3 --keep 3 --mesh.cpu-devices 1"
SILENT = "silent"

Content = dict[str, bytes | None]  # of a checkpoint, by path; None for what is no file


class Saved(NamedTuple):
    """What a run saved, as it should be restored."""

    folder: Path
    contents: dict[str, Content]  # by name of the checkpoint
    states: dict[int, object]
    like: object  # shapes


class Restores(NamedTuple):
    """What came of all corruptions."""

    failures: list[str]
    outcomes: Counter[str]

    @property
    def found(self) -> str:
        """The figures in a sentence or two."""
        rest = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.items() if outcome != SILENT)
        return f"{self.outcomes.total():,} corruptions: {rest}, {self.outcomes[SILENT]} silent."


def trial(config: ReliabilityConfig, scratch: Path, folder: Path) -> Restores:
    """Spoils the checkpoints of a small run in many ways, each time those that it saved, and restores."""
    saved = saved_by(Course(scratch, "undisturbed-short", OPTIONS).undisturbed())
    return spoil(saved, config.corruptions, random.Random(config.seed), folder)


def spoil(saved: Saved, times: int, rng: random.Random, folder: Path) -> Restores:
    """Spoils and restores copies of what was saved."""
    failures, outcomes = [], Counter()
    for number in range(times):
        copy = shutil.copytree(saved.folder, folder / "checkpoints")
        what = corrupt(rng, copy)
        outcome, wrong = restore(copy, saved)
        outcomes[outcome] += 1
        if wrong:
            failures.append(f"{what}: {wrong}")
            copy.rename(folder / f"failed-{number}")
        else:
            shutil.rmtree(copy)
        if (number + 1) % 100 == 0:
            print(f"  {number + 1} corruptions: {outcomes[SILENT]} silent", flush=True)
    return Restores(failures, outcomes)


def restore(folder: Path, saved: Saved) -> tuple[str, str]:
    """Restores the newest state of a spoilt folder; returns what came of it, and what is wrong with that."""
    intact = max(int(name) for name, content in saved.contents.items() if _content(folder / name) == content)
    told: list[str] = []
    try:
        state, step = Checkpoints(folder).newest(saved.like, told.append) or (None, 0)
    except UserError as error:
        return "refused", f"step {intact} is intact, but {error}"
    if step not in saved.states or not same(state, saved.states[step]):
        return SILENT, f"what was restored as step {step} is not what was saved"
    if step < intact:
        return "forgotten", f"step {step} was taken, step {intact} is intact"
    if step < max(saved.states) and not told:
        return SILENT, f"step {step} was taken without a word"
    return ("found and passed over" if step < max(saved.states) else "harmless"), ""


def saved_by(run: Path) -> Saved:
    """Returns what lies in the folder of a run."""
    checkpoints = Checkpoints.open(run / "checkpoints")
    one_device = make_mesh(MeshConfig(), jax.devices()[:1])
    like = Programs.make(open_run(run).config, one_device).state_shapes()
    steps = checkpoints.steps()
    contents = {str(step): _content(run / "checkpoints" / str(step)) for step in steps}
    return Saved(run / "checkpoints", contents, {step: checkpoints.restore(step, like) for step in steps}, like)


def _content(checkpoint: Path) -> Content:
    found = {path: path.read_bytes() if path.is_file() else None for path in checkpoint.rglob("*")}
    return {path.relative_to(checkpoint).as_posix(): content for path, content in found.items()}
