"""What a run's time went into, from its logbook and its events; goodput is the share that went into steps that count.

python -m experiments.goodput RUN
"""

import dataclasses
import io
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro

from experiments import cli, logbook
from experiments.cli import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoodputConfig:
    """Which run.

    Attributes:
      run: folder of the run.
    """

    run: tyro.conf.Positional[Path]


class Goodput(NamedTuple):
    """Seconds of all processes of a run, one after another."""

    steps: float  # that are part of the curve and changed the parameters
    start: float  # from the start of a process until it compiles
    compiling: float
    evaluating: float
    saving: float  # while no step could run
    waiting: float  # for data
    lost: float  # the rest: steps done twice, steps skipped
    stopped: float  # between processes, when there was none

    @property
    def share(self) -> float:
        """Of the time in which there was a process."""
        return self.steps / max(sum(self[:-1]), 1e-9)


class Events:
    """Appends what happens to a run beside its steps to events.jsonl; does nothing on hosts but the first."""

    def __init__(self, folder: Path, silent: bool = False):
        """Opens the file of a run; a line that a crash cut short is dropped."""
        self._file = None
        if not silent:
            path = folder / "events.jsonl"
            self._file = io.FileIO(path, "ab+")
            content = path.read_bytes()
            self._file.truncate(content.rfind(b"\n") + 1)

    def write(self, event: str, **more: Any) -> None:
        """Appends one event with the time."""
        if self._file is not None:
            logbook.append(self._file, {"event": event, "time": time.time(), **more})

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def process_start() -> float:
    """Returns when this process began, in seconds since 1970."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - float(Path("/proc/uptime").read_text().split()[0]) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return _IMPORTED  # where there is no /proc


_IMPORTED = time.time()


def peak_memory() -> dict[str, int]:
    """Returns the most bytes that this host's process, and the fullest of its devices if they tell, held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if in_use := [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]:
        peak["device_peak_bytes"] = max(in_use)
    return peak


def goodput(folder: Path, now: float | None = None) -> Goodput:
    """Reads a run's time from its folder; `now` is given while it still runs.

    Raises:
      UserError: the folder is no run, or one that has not done a step.
    """
    try:
        entries, events = logbook.read(folder / "log.jsonl"), logbook.lines(folder / "events.jsonl")
    except OSError:
        raise UserError(f"run: {folder} has no log.jsonl and events.jsonl; give the folder of a training.") from None
    starts = [event for event in events if event["event"] == "start"]
    if not starts:
        raise UserError(f"run: {folder} has not been started by this version.")
    ends = [event["last_sign"] for event in starts[1:]] + [now or last_sign(folder)]
    alive = sum(max(0.0, end - event["process_start"]) for event, end in zip(starts, ends, strict=True))
    stopped = sum(max(0.0, event["process_start"] - end) for event, end in zip(starts[1:], ends[:-1], strict=True))
    took = {name: sum(e.get("seconds", 0.0) for e in events if e["event"] == name) for name in ("evaluated", "saved")}
    ready = [event for event in events if event["event"] == "compiled"]
    start, compiling = (sum(event[name] for event in ready) for name in ("start_seconds", "compile_seconds"))
    counted = [entry for entry in entries if "why_skipped" not in entry]
    steps, waiting = (sum(entry[name] for entry in counted) for name in ("seconds", "waited_seconds"))
    known = steps + start + compiling + took["evaluated"] + took["saved"] + waiting
    return Goodput(steps, start, compiling, took["evaluated"], took["saved"], waiting, max(0.0, alive - known), stopped)


def last_sign(folder: Path) -> float:
    """Returns when the run in a folder last wrote something; 0 if never."""
    files = [folder / "log.jsonl", folder / "events.jsonl"]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def describe(spent: Goodput) -> str:
    """Returns one line."""
    total = max(sum(spent[:-1]), 1e-9)
    shares = ", ".join(
        f"{name} {seconds / total:.1%}"
        for name, seconds in spent._asdict().items()
        if name not in ("steps", "stopped") and seconds / total >= 0.0005
    )
    pause = f"; stood still for {spent.stopped:,.0f} s between" if spent.stopped >= 1 else ""
    return f"goodput {spent.share:.1%} of {total:,.0f} s in steps that count; the rest: {shares or 'nothing'}{pause}"


def main(config: GoodputConfig) -> None:
    """Prints it."""
    print(describe(goodput(config.run)))


if __name__ == "__main__":
    cli.run(main, GoodputConfig)
