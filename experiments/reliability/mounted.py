"""The trial of disks, in a process that may mount some: a run whose disk fills up, again and again.

python -m experiments.reliability.mounted SCRATCH FOLDER FULL_DISKS SEED RESULT
"""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

from experiments.reliability.courses import Course, events, logged, newest
from experiments.reliability.kills import SAVE_EVERY, long_course
from experiments.reliability.launched import Host
from experiments.runs import open_run

SIZE = 4 << 20  # bytes of the disk
CHECKPOINT = 390_000  # bytes that one takes on it, two thirds of them arrays
SHARES = ((0, 0), (0, 0.6), (0.7, 0.95))  # of a checkpoint, that are left: the last is noticed while it is written
SOON = 60  # seconds for a run to notice
SENTENCE = re.compile(r"^error: [^\n]*\.\n\Z", re.MULTILINE)


def main(scratch: Path, folder: Path, full_disks: int, seed: int) -> dict:
    """Returns the fields of a result."""
    course, rng = long_course(scratch), random.Random(seed)
    disk = folder / "disk"
    disk.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", disk)
    run, failures, said, intact = disk / "run", [], [], 0
    for number in range(full_disks):
        least, most = SHARES[number % len(SHARES)]
        left = round(rng.uniform(least, most) * CHECKPOINT)
        said.append(_fill_up(course, run, left, rng.randint(1, 80), failures))
        intact += _is_intact(run, failures)
        print(f"  {left:,} bytes left: {said[-1]}", flush=True)
    for place in (run / "checkpoints", run):
        said.append(_read_only(course, run, place, failures))
        intact += _is_intact(run, failures)
        print(f"  {place.name} read-only: {said[-1]}", flush=True)
    failures += course.finish(run) or course.differences(run)
    return {"failures": failures, "said": said, "intact": intact, "read_only": 2}


def _fill_up(course: Course, run: Path, left: int, steps: int, failures: list[str]) -> str:
    """Fills the disk but for some bytes when the run has done some steps; makes room again afterwards."""
    filler, ready = run.parent / "filler", len(events(run, "compiled"))
    with course.start(run) as host:
        host.wait_until(lambda: len(events(run, "compiled")) > ready)
        host.wait_for_lines((run / "log.jsonl").read_bytes().count(b"\n") + steps)
        _write_until_full(filler)
        with filler.open("r+b") as file:
            file.truncate(max(0, filler.stat().st_size - left))
        said = _ended(host, failures)
    filler.unlink()
    return said


def _read_only(course: Course, run: Path, place: Path, failures: list[str]) -> str:
    """Starts the run with a folder in which nothing can be written."""
    _mount("--bind", place, place)
    _mount("-o", "remount,bind,ro", place)
    with course.start(run) as host:
        said = _ended(host, failures)
    subprocess.run(["umount", place], check=True)
    return said


def _ended(host: Host, failures: list[str]) -> str:
    """Returns the sentence that a process ended with."""
    try:
        status, printed = host.end(SOON)
    except TimeoutError as error:
        failures.append(str(error))
        return ""
    found = SENTENCE.search(printed)
    if status != 2 or found is None or "Traceback" in printed:
        failures.append(f"status {status}, and printed was {printed[-600:]!r}")
    return found[0].strip() if found else ""


def _is_intact(run: Path, failures: list[str]) -> bool:
    """Whether the newest checkpoint is whole, and not older than the logbook allows."""
    steps, step = len(logged(run)), newest(run)
    restored = open_run(run).step if step else 0
    good = restored == step >= (steps // SAVE_EVERY - 1) * SAVE_EVERY
    failures += [] if good else [f"after {steps} steps checkpoint {step} is the newest, {restored} could be restored"]
    return good


def _write_until_full(file: Path) -> None:
    with file.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(1 << 14))
        except OSError:
            return


def _mount(*words) -> None:
    subprocess.run(["mount", *map(str, words)], check=True)


if __name__ == "__main__":
    found = main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    Path(sys.argv[5]).write_text(json.dumps(found))
