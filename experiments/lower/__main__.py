"""What a TPU would take for each kernel, by its compiler's own account, on a host without one.

Question: did a change make a kernel slower, bigger, or impossible to compile?
Command:  make lower PYTHON=python3.11; or python -m experiments.lower with the extra `tpu`; --check in review. With
          Python 3.11, because the libtpu pinned for later ones does not count the turns of loops around loops.
Cost:     three compilations of about three seconds per row, on one core; some ten minutes in all.
Expected: no row grows by more than 3 % and none begins to spill registers, unless the commit says why.
Measured: costs.json here, one row per line. Cycles are those of the compiler's static model: it knows the schedule of
          the program, guesses what memory takes, and is for comparing variants, not for claims of speed.
"""

import dataclasses
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from experiments import cli
from experiments.lower import costs, tables
from experiments.lower.chips import CHIPS
from experiments.lower.kernels import KERNELS, Kernel, Operator
from experiments.lower.measure import measure

NAMES = tuple(dict.fromkeys(kernel.name for kernel in KERNELS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowerConfig:
    """What to compile, and what to do with the numbers.

    Attributes:
      output: the record; rows that are not compiled stay as they are, and the last commit's stand beside the new ones.
      kernels: which kernels.
      chips: for which TPU generations.
      jobs: compilations at once, 1 or 2.
      check: write nothing, and end with status 1 if a row has become worse than in the last commit.
      markdown: print the record as it is as a Markdown table, and compile nothing.
    """

    output: Path = Path("experiments/lower/costs.json")
    kernels: tuple[str, ...] = NAMES
    chips: tuple[str, ...] = tuple(CHIPS)
    jobs: int = 2
    check: bool = False
    markdown: bool = False

    def __post_init__(self):
        for field, known in (("kernels", NAMES), ("chips", tuple(CHIPS))):
            chosen = getattr(self, field)
            if not chosen or set(chosen) - set(known):
                raise cli.UserError(f"{field}={chosen} must be some of {known}.")
        if self.jobs not in (1, 2):
            raise cli.UserError(f"jobs={self.jobs} must be 1 or 2; a compilation takes a core and a gigabyte.")
        if self.check and self.markdown:
            raise cli.UserError(
                "check and markdown exclude each other: one compiles, the other prints what is recorded."
            )
        if not self.output.parent.is_dir():
            raise cli.UserError(
                f"output={self.output} is in no folder; run this where experiments/ is, or name another file."
            )


def main(config: LowerConfig) -> None:
    """Compiles, prints one table, and writes the record or checks it."""
    if config.markdown:
        return print_recorded(config.output)
    compiler = costs.this_compiler()
    kept = _kept(config, compiler)
    before = _before(config, compiler)
    found = _measure_all(config)
    print("\n".join([f"{compiler}; static estimates, not measured on a device", "", *tables.console(found, before)]))
    worse = tables.regressions(found, before) if before else []
    if worse:
        print("\n".join(["", "worse than in the last commit:", *worse]))
    if config.check:
        sys.exit(1 if worse else 0)
    config.output.write_text(costs.to_text(costs.Record(compiler, kept | {cost.key: cost for cost in found})))
    print(f"\nwrote {config.output}")


def print_recorded(path: Path) -> None:
    """Prints the record as Markdown.

    Raises:
      UserError: there is none.
    """
    record = costs.read(path)
    if record is None:
        raise cli.UserError(f"output: there is no {path}; run without --markdown first.")
    print("\n".join(tables.markdown(record)))


def _rows(config: LowerConfig) -> list[tuple[Kernel | Operator, str]]:
    chosen = [kernel for kernel in KERNELS if kernel.name in config.kernels]
    return [(kernel, chip) for kernel in chosen for chip in config.chips if chip in kernel.chips]


def _measure_all(config: LowerConfig) -> list[costs.Cost]:
    rows = _rows(config)
    with ThreadPoolExecutor(config.jobs) as pool:
        done = pool.map(lambda row: measure(*row), rows)
        return list(tqdm(done, total=len(rows), unit="row", disable=None))


def _before(config: LowerConfig, compiler: str) -> costs.Record | None:
    """The last commit's record if there is one of the same compiler; says so if not."""
    record = costs.read_committed(config.output)
    if record and record.compiler == compiler:
        return record
    lacks = f"is of {record.compiler}, and this is {compiler}" if record else "is in no commit, or there is no git here"
    if config.check:
        raise cli.UserError(f"check: {config.output} {lacks}; commit a record of this compiler first.")
    print(f"nothing to compare with: {config.output} {lacks}")
    return None


def _kept(config: LowerConfig, compiler: str) -> costs.Costs:
    """The rows of the record that are in the table of kernels and are not compiled now.

    Raises:
      UserError: they are of another compiler.
    """
    record = None if config.check else costs.read(config.output)
    rows = record.costs if record else {}
    compiled = {(kernel.name, kernel.case, chip) for kernel, chip in _rows(config)}
    known = {(kernel.name, kernel.case, chip) for kernel in KERNELS for chip in kernel.chips}
    kept = {key: cost for key, cost in rows.items() if key in known - compiled}
    if record and kept and record.compiler != compiler:
        raise cli.UserError(
            f"output: {config.output} has rows of {record.compiler}, and this is {compiler}; compile all, without "
            f"--kernels and --chips, or name another file."
        )
    return kept


if __name__ == "__main__":
    cli.run(main, LowerConfig)
