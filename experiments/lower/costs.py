"""The record of costs: a row per kernel, case and chip, how it is kept, and when a row has become worse."""

import dataclasses
import json
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from experiments.cli import UserError

GROWTH = 0.03  # the same code gives the same cycles; this much is left to changes that were made for another reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """A row; what is not known is None.

    Attributes:
      kernel, case, chip: what was compiled.
      per: the unit of work that `step` and `once` are divided by.
      refused: why it does not compile.
      no_estimate: why there are no cycles.
      cycles: of a program with the greater number of steps, or of all that XLA does around kernels.
      step, once: cycles per unit, of one more step and of all that is not steps.
      vmem_bytes: memory on the chip.
      code_bytes: of the program, the kernel and what XLA puts around it.

    The others are those of dumps.Schedule.
    """

    kernel: str
    case: str
    chip: str
    per: str
    refused: str | None = None
    no_estimate: str | None = None
    cycles: int | None = None
    step: float | None = None
    once: float | None = None
    bundles: int | None = None
    loop_bundles: int | None = None
    mxu: float | None = None
    vpu: float | None = None
    spills: int | None = None
    loop_spills: int | None = None
    fills: int | None = None
    loop_fills: int | None = None
    vmem_bytes: int | None = None
    code_bytes: int | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells rows apart."""
        return self.kernel, self.case, self.chip


Costs = dict[tuple[str, str, str], Cost]  # by Cost.key


class Record(NamedTuple):
    """What a file holds: versions of the compiler, and the costs by its account."""

    compiler: str
    costs: Costs


def this_compiler() -> str:
    """Returns the versions of what is installed.

    Raises:
      UserError: there is no libtpu.
    """
    try:
        return f"libtpu {version('libtpu')}, jax {version('jax')}"
    except PackageNotFoundError:
        raise UserError("libtpu, the TPU compiler, is not installed; `make lower` installs it (extra tpu).") from None


def to_text(record: Record) -> str:
    """Returns JSON with one row per line, in the order of the keys."""
    rows = [json.dumps(_known(record.costs[key])) for key in sorted(record.costs)]
    return '{"compiler": ' + json.dumps(record.compiler) + ', "costs": [\n' + ",\n".join(rows) + "\n]}\n"


def _known(cost: Cost) -> dict:
    return {name: value for name, value in dataclasses.asdict(cost).items() if value is not None}


def from_text(text: str) -> Record:
    """Reads what to_text returns."""
    found = json.loads(text)
    return Record(found["compiler"], {cost.key: cost for cost in (Cost(**row) for row in found["costs"])})


def read(path: Path) -> Record | None:
    """Returns the record in a file, or None if there is no such file.

    Raises:
      UserError: the file is not a record.
    """
    return _parse(path.read_text(), str(path)) if path.exists() else None


def read_committed(path: Path) -> Record | None:
    """Returns the record in the last commit, or None: no git, no repository, no commit, or none with the file.

    Raises:
      UserError: the file is not a record.
    """
    command = ["git", "-C", str(path.parent), "show", f"HEAD:./{path.name}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return None if done.returncode else _parse(done.stdout, f"{path} of HEAD")


def _parse(text: str, source: str) -> Record:
    try:
        return from_text(text)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"output: {source} is not a record of costs; name another file.") from None


def growth(before: Cost, now: Cost) -> float | None:
    """Returns by how much the cycles of a program or of a step grew, whichever did more, relative to before."""
    pairs = ((before.cycles, now.cycles), (before.step, now.step))
    return max(((new - old) / old for old, new in pairs if old and new), default=None)


def complaints(before: Cost, now: Cost) -> list[str]:
    """Returns in what way a row has become worse, in parts of a sentence."""
    if now.refused:
        return [] if before.refused else [f"no longer compiles ({now.refused})"]
    grown, found = growth(before, now), []
    if before.cycles and not now.cycles:
        found.append(f"has no estimate any more ({now.no_estimate})")
    if grown is not None and grown > GROWTH:
        found.append(f"takes {grown:.1%} more cycles")
    if (before.spills == 0 and now.spills) or (before.loop_spills == 0 and now.loop_spills):
        found.append("spills registers, which it did not")
    return found
