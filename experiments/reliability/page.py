"""RELIABILITY.md from the outcomes of the trials; nobody writes it by hand."""

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax

COMMAND = "python -m experiments.reliability"
MARK = f"`{COMMAND}`, which writes"  # by which these pages know each other

INTRODUCTION = """\
A training run that is interrupted, in whatever way, goes on as if nothing had happened: the same command computes the
same curve and the same parameters, to the last bit. What is read from disk is verified first, so damage is passed over
with a sentence and never trained on. A number that is not finite costs its step and nothing else.
"""

UNTRIED = """\
## What is not tried

- No TPU or GPU and no pod: everything here runs on CPUs of one machine, several hosts are processes that talk over
  loopback. A network that is slow, or that parts hosts which both live on, is not tried either.
- No network file system and no object store. Checkpoints need a rename that is atomic.
- No power cut: a killed process loses what it holds, not what the system has taken over. What is saved is synced to
  disk, but nobody pulled a plug.
- No memory or processor that computes wrongly. A NaN is noticed, a wrong finite number is not.
- No clock that jumps and no disk that is merely slow.
- Equal to the last bit means: with the same mesh, machine type and versions. Other devices add up in another order.
"""


class Outcome(NamedTuple):
    """What came of one trial."""

    name: str
    promise: str
    how: str  # it is tried
    found: str
    failures: Sequence[str]
    seconds: float


def page(outcomes: Sequence[Outcome]) -> str:
    """Returns the page."""
    rows = [f"| {x.promise} | {x.how} | {_result(x)} | `{COMMAND} --trials {x.name}` |" for x in outcomes]
    table = ["| promise | how it is tried | result | command |", "|---|---|---|---|", *rows]
    minutes = sum(x.seconds for x in outcomes) / 60
    measured = f"Measured on {_today()} at {_commit()}, on {_machine()}, in {minutes:.0f} minutes by {MARK}"
    return "\n".join(
        [
            "# Reliability",
            "",
            INTRODUCTION,
            f"{measured}\nthis page. Moments and choices are random.",
            "",
            *table,
            "",
            UNTRIED,
        ]
    )


def _result(outcome: Outcome) -> str:
    """What was found, and before it what broke the promise."""
    broken = (
        f"**Broken, {len(outcome.failures)} times:** {_cell(outcome.failures[0])}." if outcome.failures else "Held."
    )
    return f"{broken} {_cell(outcome.found)} {outcome.seconds:,.0f} s"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())


def _machine() -> str:
    versions = f"Python {platform.python_version()}, jax {jax.__version__}"
    return f"{os.cpu_count()} cores, {platform.system()}, {versions}"


def _commit() -> str:
    head, changed = _git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain")
    if not head:
        return "an unknown commit"
    return f"commit {head}{' with changes' if changed else ''}"


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
