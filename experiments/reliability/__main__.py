"""What is a promise of reliability worth? Breaks runs in every way that is listed here, and says what came of it.

  python -m experiments.reliability                            all trials, 25 minutes; writes RELIABILITY.md
  python -m experiments.reliability --trials kills --kills 3   one of them, shorter

The exit status is 1 if a promise was broken; what the trial left behind is kept.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from experiments import cli
from experiments.cli import UserError
from experiments.reliability import disks, elastic, kills, poisons, restores, several_hosts, terminations
from experiments.reliability.config import ALL, ReliabilityConfig, TrialName
from experiments.reliability.page import MARK, Outcome, page


class Found(Protocol):
    """What each trial returns, with figures of its own besides."""

    @property
    def failures(self) -> list[str]:
        """What broke the promise, a sentence each."""
        ...

    @property
    def found(self) -> str:
        """The figures, in words."""
        ...


class Trial(NamedTuple):
    """A promise, and what tries to break it."""

    run: Callable[[ReliabilityConfig, Path, Path], Found]  # folders: what trials share, what this one may fill
    promise: str
    how: str


TRIALS: dict[TrialName, Trial] = {
    "kills": Trial(
        kills.trial,
        "A killed run goes on exactly, from its newest checkpoint.",
        "SIGKILL at moments drawn over the whole life of a process; the joined curve and the parameters are compared, "
        "bit for bit, with a run that nobody disturbed.",
    ),
    "terminations": Trial(
        terminations.trial,
        f"A run that is asked to leave saves every step, is gone within {terminations.LIMIT} s, and goes on exactly.",
        "SIGTERM in training, in an evaluation, while compiling, while data do not come, during a save; compared as "
        "above.",
    ),
    "hosts": Trial(
        several_hosts.trial,
        f"When a host is lost the others leave within {several_hosts.LIMIT} s, and the run goes on exactly.",
        "Two processes of two devices with sharded parameters; SIGKILL of one of them, by turns.",
    ),
    "elastic": Trial(
        elastic.trial,
        "A run goes on with another number of hosts, and no row of the data is lost or read twice.",
        "SIGTERM, then the same command on other hosts; each process writes down what it reads.",
    ),
    "corruptions": Trial(
        restores.trial,
        "A damaged checkpoint is passed over with a sentence; the last good one is taken.",
        "Bits flipped, files cut, swapped, deleted, mixed between steps, folders renamed; what is restored is compared "
        "bit for bit.",
    ),
    "nans": Trial(
        poisons.trial,
        "A step that is not finite changes nothing and is named; many in a row stop the run; it never stays stuck.",
        "NaN in the loss, one gradient, one number of a kernel's output; a token beyond the vocabulary.",
    ),
    "disks": Trial(
        disks.trial,
        "A full or read-only disk ends in a sentence, costs no checkpoint, and the run goes on when there is room.",
        "A small disk that is filled at a random moment, to the last byte or nearly; folders mounted read-only.",
    ),
}


def main(config: ReliabilityConfig) -> None:
    """Runs the trials, prints what came of each, and writes the page if it was all of them."""
    whole = set(config.trials) == set(ALL)
    if whole:
        cli.check_page("page", config.page, MARK)
    scratch = _scratch(config)
    outcomes = [_outcome(config, scratch, name) for name in config.trials]
    if whole:
        config.page.write_text(page(outcomes), encoding="utf-8")
        print(f"page: {config.page}")
    broken = [outcome.name for outcome in outcomes if outcome.failures]
    if broken:
        print(
            f"error: broken: {', '.join(broken)}; see {', '.join(str(scratch / name) for name in broken)}",
            file=sys.stderr,
        )
        sys.exit(1)
    if not config.output:
        shutil.rmtree(scratch)


def _scratch(config: ReliabilityConfig) -> Path:
    """Returns an empty folder."""
    if not config.output:
        return Path(tempfile.mkdtemp(prefix="reliability-"))
    folder = Path(config.output).absolute()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"output: {folder} is not empty; give a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _outcome(config: ReliabilityConfig, scratch: Path, name: TrialName) -> Outcome:
    """Runs one trial; what it raises breaks its promise as well."""
    trial, folder, begin = TRIALS[name], scratch / name, time.monotonic()
    folder.mkdir()
    print(f"{name}: {trial.promise}", flush=True)
    try:
        result = trial.run(config, scratch, folder)
        failures, found = result.failures, result.found
    except Exception as error:  # a trial that stumbles has found something, too
        failures, found = [f"{type(error).__name__}: {error}"], "The trial came to no end."
    outcome = Outcome(name, trial.promise, trial.how, found, failures, time.monotonic() - begin)
    print(
        "\n".join([*(f"  BROKEN: {failure}" for failure in failures), f"  {found} {outcome.seconds:.0f} s"]), flush=True
    )
    if not failures:
        shutil.rmtree(folder)
    return outcome


if __name__ == "__main__":
    cli.run(main, ReliabilityConfig)
