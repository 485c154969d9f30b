"""A course is a run that can be taken again and again, and what it computes when nothing disturbs it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import logbook
from experiments.checkpoints import Checkpoints
from experiments.reliability.launched import Host, curve, several, write_corpus
from experiments.runs import open_run


class Course:
    """Starts processes of one run, and compares what they leave behind with the run that nobody disturbed."""

    def __init__(self, scratch: Path, name: str, options: str, hosts: int = 1):
        """Takes a folder for what trials share, a name for the undisturbed run in it, and options of the command."""
        self._corpus = write_corpus(scratch / "corpus")
        self._compiled, self._undisturbed = scratch / "compiled", scratch / name
        self._options, self._hosts = options.split(), hosts

    def start(self, output: Path, *more: str, slowed: tuple[str, ...] = ()) -> Host:
        """Starts one process; compiled programs are kept for the next."""
        options = [*self._options, "--compile-cache", str(self._compiled), *more]
        return Host(self._corpus, output, *options, slowed=slowed)

    @contextmanager
    def start_all(self, output: Path, count: int = 0, record: Path | None = None) -> Iterator[list[Host]]:
        """Starts all processes of the run, or as many as are asked for; on request they record the rows they read."""

        def start(index: int, *more: str) -> Host:
            slowed = ("rows", f"{record}-{index}") if record else ()
            return self.start(output, *more, slowed=slowed)

        with several(start, count or self._hosts) as hosts:
            yield hosts

    def finish(self, output: Path) -> list[str]:
        """Lets the run in a folder come to its end; returns what is wrong with that, or with the end."""
        with self.start_all(output) as hosts:
            return complaints(hosts)

    def undisturbed(self) -> Path:
        """Returns the folder of the undisturbed run, which is made when it is first asked for."""
        if not events(self._undisturbed, "end") and (wrong := self.finish(self._undisturbed)):
            raise RuntimeError(wrong[0])
        return self._undisturbed

    def differences(self, output: Path) -> list[str]:
        """Says where a run that is over differs from the undisturbed one; nothing if all bits are the same."""
        found, ours, theirs = [], curve(output), curve(self.undisturbed())
        if ours != theirs:
            pairs = zip(ours, theirs, strict=False)
            step = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
            found.append(f"the curve of {output} differs from the undisturbed one from step {step} on")
        if not same(open_run(output).params, open_run(self.undisturbed()).params):
            found.append(f"the parameters of {output} differ from the undisturbed ones")
        return found


def complaints(hosts: Sequence[Host], expected: int = 0) -> list[str]:
    """Waits for the end of processes; says which of them did not end with the status that is expected."""
    ended = [host.end() for host in hosts]
    return [f"a process ended with status {status}: {last_line(said)}" for status, said in ended if status != expected]


def same(one: Any, other: Any) -> bool:
    """Whether two trees of arrays are equal bit for bit."""
    return [_bits(leaf) for leaf in jax.tree.leaves(one)] == [_bits(leaf) for leaf in jax.tree.leaves(other)]


def _bits(array: Any) -> tuple:
    array = np.asarray(array)
    return array.dtype, array.shape, array.tobytes()


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    """Returns the events of one name of a run, which may not exist yet."""
    file = folder / "events.jsonl"
    return [event for event in logbook.lines(file) if event["event"] == name] if file.exists() else []


def logged(folder: Path) -> list[dict[str, Any]]:
    """Returns an entry for each step in the logbook of a run, which may not exist yet."""
    return logbook.read(folder / "log.jsonl") if (folder / "log.jsonl").exists() else []


def newest(folder: Path) -> int:
    """Returns the step of the newest sealed checkpoint of a run, 0 if there is none."""
    checkpoints = folder / "checkpoints"
    return (Checkpoints.open(checkpoints).latest_step() or 0) if checkpoints.is_dir() else 0


def last_line(printed: str) -> str:
    """Returns the last line of what a process printed, where it says what was wrong."""
    return (printed.strip().splitlines() or ["nothing was printed"])[-1][:300]
