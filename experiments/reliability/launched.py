"""Starts the training command as its user does, in processes of its own: alone, or as several hosts on loopback."""

import contextlib
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments import logbook

SMALL = shlex.split(
    "tiny --num-steps 12 --save-every 3 --eval-every 4 --eval-batches 2 --log-every 4 --micro-batches 2 "
    "--model.num-layers 1 --model.model-dim 32 --model.num-heads 2 --model.key-dim 16 --model.value-dim 16 "
    "--model.solver.tolerance 1e-3 --data.length 32 --data.batch-size 4 --mesh.cpu-devices 2"
)
PATIENCE = 240  # seconds, on a machine that does much else


def write_corpus(folder: Path) -> Path:
    """Makes a folder of small texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"document {i} counts: " + " ".join(str(j * i) for j in range(30)))
    return folder


class Host:
    """One process of a run; ended, whatever happens, on leaving."""

    def __init__(self, corpus: Path, output: Path, *more: str, slowed: tuple[str, ...] = ()):
        """Starts it, on request as experiments.reliability.slowed: the same command with a slow part."""
        module = "experiments.reliability.slowed" if slowed else "experiments.mesanet.pretrain"
        command = [sys.executable, "-m", module, *slowed, *SMALL]
        command += ["--data.source", str(corpus), "--output", str(output), *more]
        self._log = output / "log.jsonl"
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def wait_until(self, ready: Callable[[], bool]) -> bool:
        """Returns True when it is, False if the process is gone before or patience is at an end."""
        deadline = time.monotonic() + PATIENCE
        while self._process.poll() is None and time.monotonic() < deadline:
            if ready():
                return True
            time.sleep(0.005)
        return False

    def wait_for_lines(self, number: int) -> bool:
        """Returns when the logbook has so many lines, or the process is gone; False if so."""
        return self.wait_until(lambda: self._log.exists() and self._log.read_bytes().count(b"\n") >= number)

    def outlives(self, seconds: float) -> bool:
        """Waits so long; returns whether the process is still there."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self._process.send_signal(number)

    def end(self, seconds: float = PATIENCE) -> tuple[int, str]:
        """Waits for the end; returns exit status and all that was printed.

        Raises:
          TimeoutError: it takes longer.
        """
        try:
            printed, _ = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the process is still there after {seconds:g} s") from None
        return self._process.returncode, printed

    def __enter__(self) -> "Host":
        return self

    def __exit__(self, *error) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def several(start: Callable[..., Host], count: int) -> Iterator[list[Host]]:
    """Starts the processes of one run; `start` takes the number of a process and the options that join it to others."""
    port = free_port()
    options = [hosts_options(count, i, port) if count > 1 else [] for i in range(count)]
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(start(i, *more)) for i, more in enumerate(options)]


def curve(folder: Path) -> list[dict]:
    """Returns the logbook of a run without what a clock measured."""
    return [{k: v for k, v in e.items() if k not in logbook.CLOCK} for e in logbook.read(folder / "log.jsonl")]


def hosts_options(count: int, index: int, port: int, wait_seconds: float = PATIENCE) -> list[str]:
    """Returns the options that make a process one of several."""
    return [
        *("--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.count", str(count), "--hosts.index", str(index)),
        *("--hosts.wait-seconds", str(wait_seconds)),
    ]


def free_port() -> int:
    """Returns a port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
