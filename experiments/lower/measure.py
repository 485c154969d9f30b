"""Compiles a row in child processes and puts together what they leave behind."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from experiments.lower.chips import ENVIRONMENT
from experiments.lower.costs import Cost
from experiments.lower.dumps import Schedule, read_cycles, read_schedule, read_vmem_bytes
from experiments.lower.kernels import Kernel, Operator

LIMIT = 120  # seconds that one compilation may take; the usual is three
FATAL = re.compile(r"^F\d{4} .*?\] (.*)$", re.MULTILINE)  # the last words of a process of libtpu
ROOM = 120  # characters of a reason


class Run(NamedTuple):
    """What one compilation has left behind.

    Attributes:
      refused: why the compiler refuses.
      died: how the process ended before the compiler was done.
      cycles: the estimate; None where there is none.
      schedule, vmem_bytes, code_bytes: as in Cost.
      around: what XLA does around kernels, by its estimate; None where there is none.
    """

    refused: str | None
    died: str | None
    cycles: int | None
    schedule: Schedule | None
    vmem_bytes: int | None
    code_bytes: int | None
    around: int | None


def measure(kernel: Kernel | Operator, chip: str) -> Cost:
    """Returns a row of the table; whatever goes wrong is in it."""
    row = dict(kernel=kernel.name, case=kernel.case, chip=chip, per=kernel.per_name)
    if isinstance(kernel, Operator):
        return Cost(**row, **_around(kernel, compile_once(kernel, chip, 1, 1, estimate=False)))
    runs = []
    for steps, programs in kernel.runs:
        runs.append(compile_once(kernel, chip, steps, programs))
        if runs[-1].cycles is None:
            break
    last = runs[-1]
    if last.died:  # of the estimate or of the compiler? and an estimate that is there counts however it ended
        last = compile_once(kernel, chip, *kernel.runs[-1], estimate=False)
    if last.refused or last.died:
        return Cost(**row, refused=last.refused or last.died)
    found = dict(vmem_bytes=last.vmem_bytes, code_bytes=last.code_bytes)
    if last.schedule is not None:
        found |= last.schedule._asdict()
    return Cost(**row, **found, **_cycles(kernel, runs))


def _cycles(kernel: Kernel, runs: list[Run]) -> dict:
    """The fields of Cost that are about cycles."""
    cycles = {given: run.cycles for given, run in zip(kernel.runs, runs, strict=False) if run.cycles is not None}
    if len(cycles) < len(kernel.runs):
        return dict(no_estimate=runs[-1].died or "libtpu has none, as where blocks are copied in strides")
    fewest, most = kernel.steps[0], kernel.steps[-1]
    step = (cycles[most, 1] - cycles[fewest, 1]) / max(most - fewest, 1)
    program = cycles[most, 1] if kernel.programs == 1 else cycles[most, 2] - cycles[most, 1]
    for name, cost in (("steps", step if most > fewest else None), ("programs", program)):
        if cost is not None and cost <= 0:
            return dict(no_estimate=f"{name} cost nothing, so their loop has a length that the compiler does not know")
    once = round((program - most * step) / kernel.per, 3)
    return dict(cycles=program, step=round(step / kernel.per, 3) if most > fewest else None, once=once)


def _around(operator: Operator, run: Run) -> dict:
    """The fields of Cost for what XLA does around kernels."""
    if run.refused or run.died:
        return dict(refused=run.refused or run.died)
    if run.around is None:
        return dict(code_bytes=run.code_bytes, no_estimate="XLA has none for loops, branches and calls")
    return dict(code_bytes=run.code_bytes, cycles=run.around, once=round(run.around / operator.per, 3))


def compile_once(kernel: Kernel | Operator, chip: str, steps: int, programs: int, *, estimate: bool = True) -> Run:
    """Compiles in a child process and reads what it dumped, however it ended.

    Args:
      kernel: the row.
      chip: one of CHIPS.
      steps, programs: as kernel.build takes them.
      estimate: whether to ask for cycles, of which some kernels make libtpu abort.
    """
    with tempfile.TemporaryDirectory(prefix="lowered-") as name:
        folder = Path(name)
        report = folder / "report.json"
        died = run(command(kernel, chip, steps, programs, report), environment(folder, estimate=estimate))
        found = json.loads(report.read_text()) if report.exists() else {}
        return Run(
            refused=found.get("refused"),
            died=None if found else died or "ended without a report",
            code_bytes=found.get("code_bytes"),
            around=found.get("around"),
            **read_dumps(folder, kernel.name, complete=bool(found)),
        )


def command(kernel: Kernel | Operator, chip: str, steps: int, programs: int, report: Path) -> list[str]:
    """Returns the command line of the child."""
    row = kernel.name, kernel.case, chip, str(steps), str(programs), str(report)
    return [sys.executable, "-m", "experiments.lower.compiler", *row]


def environment(folder: Path, *, estimate: bool) -> dict[str, str]:
    """Returns the environment in which libtpu dumps into a folder."""
    flags = [
        "--xla_msa_enable=false",  # a small test's arrays would move into VMEM before the kernel; a model's do not fit
        f"--xla_jf_dump_to={folder}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_html=false",
        "--xla_jf_dump_llo_pass_label_regex=final_hlo-static|final_bundles|vmem_report",  # of 80 files, 60 MB
    ]
    if estimate:
        flags.append(f"--xla_jf_dump_static_llo_profile_to={folder}")
    return os.environ | ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": " ".join(flags)}


def run(arguments: list[str], variables: dict[str, str]) -> str | None:
    """Runs a child to its end and returns how it failed, in parts of a sentence, or None."""
    try:
        done = subprocess.run(arguments, env=variables, capture_output=True, text=True, errors="replace", timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"took more than {LIMIT} seconds"
    if not done.returncode:
        return None
    if fatal := FATAL.search(done.stderr):
        return fatal[1][:ROOM]
    if done.returncode < 0:
        return f"ended by {signal.Signals(-done.returncode).name}"
    return (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:ROOM]


def read_dumps(folder: Path, name: str, *, complete: bool) -> dict:
    """Returns the fields of Run that are read from files; of incomplete ones, as of a child that died, cycles only.

    XLA numbers the kernel's name, and from libtpu 0.0.50 on the estimate's file also names the chip.
    """
    found = {"cycles": None, "schedule": None, "vmem_bytes": None}
    operation = rf"{re.escape(name)}(?:\.\d+)?"
    if profile := _find(folder, rf"({operation})(?:_TPU[^_]*)?_static_llo_profile\.textproto"):
        found["cycles"] = read_cycles(profile[1])
    bundles = _find(folder, rf"\d+-({operation})-\d+-final_bundles\.txt")
    utilization = _find(folder, rf"\d+-({operation})-\d+-final_hlo-static-per-bundle-utilization\.txt")
    if complete and bundles and utilization:
        found["schedule"] = read_schedule(utilization[1], bundles[1])
        if page := _find(folder, r"(.*)vmem_report\.html"):
            found["vmem_bytes"] = read_vmem_bytes(page[1], bundles[0])
    return found


def _find(folder: Path, pattern: str) -> tuple[str, str] | None:
    """Returns the operation and the text of the one file whose name fits, or None."""
    fitting = [(match[1], path) for path in folder.iterdir() if (match := re.fullmatch(pattern, path.name))]
    if len(fitting) != 1:
        return None
    ((operation, path),) = fitting
    return operation, path.read_text(errors="replace")
