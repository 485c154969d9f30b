"""Costs in lines of text: beside the last commit's on the console, by chip in Markdown."""

from collections.abc import Sequence

from experiments.lower.chips import CHIPS
from experiments.lower.costs import GROWTH, Cost, Record, complaints, growth

NAMES = ("kernel", "case", "chip", "per")  # columns of words, to the left; the others are numbers, to the right
NUMBERS = ("step", "once", "before", "change", "bundles", "loop", "MXU", "VPU", "spills", "fills", "VMEM", "code")
LEGEND = (
    "step, once: cycles per unit of work, of one more step and of all else; before: the same of the last commit;",
    f"change: of a step or of a program, ! above {GROWTH:.0%}; loop: bundles of the innermost loop; MXU, VPU: share of",
    "the units' slots that is used in it; spills, fills: in the loop, in all; VMEM, code: KiB.",
)


def console(costs: Sequence[Cost], before: Record | None) -> list[str]:
    """Returns aligned lines, one row each; under them what the columns are, and why rows are empty or worse."""
    earlier = before.costs if before else {}
    rows = [NAMES + NUMBERS, *(_cells(cost, earlier.get(cost.key)) for cost in costs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(_align, row, widths, range(len(row)))).rstrip() for row in rows]
    return [lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:], "", *LEGEND, *notes(costs)]


def notes(costs: Sequence[Cost]) -> list[str]:
    """Returns a line for each row without numbers."""
    lacking = ((cost, f"does not compile: {cost.refused}") for cost in costs if cost.refused)
    unknown = ((cost, f"no estimate: {cost.no_estimate}") for cost in costs if cost.no_estimate)
    return [f"{', '.join(cost.key)}: {why}" for cost, why in (*lacking, *unknown)]


def regressions(costs: Sequence[Cost], before: Record) -> list[str]:
    """Returns a line for each way in which a row has become worse."""
    pairs = ((cost, before.costs[cost.key]) for cost in costs if cost.key in before.costs)
    return [f"{', '.join(cost.key)}: {what}" for cost, earlier in pairs for what in complaints(earlier, cost)]


def markdown(record: Record) -> list[str]:
    """Returns a Markdown table: a row per kernel and case; under each chip the cycles of a step, then once."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for cost in record.costs.values():
        rows.setdefault((cost.kernel, cost.case, cost.per), {})[cost.chip] = _pair(cost)
    lines = [f"| kernel | case | cycles per | {' | '.join(CHIPS)} |", "|---" * (3 + len(CHIPS)) + "|"]
    for names, pairs in sorted(rows.items()):
        lines.append(f"| {' | '.join((*names, *(pairs.get(chip, '') for chip in CHIPS)))} |")
    return [*lines, "", f"Of one more step; once. Static estimates of {record.compiler}, not measured on a device."]


def _pair(cost: Cost) -> str:
    if cost.refused or cost.no_estimate:
        return "does not compile" if cost.refused else "no estimate"
    return "; ".join(_number(x) for x in (cost.step, cost.once) if x is not None)


def _cells(cost: Cost, before: Cost | None) -> tuple[str, ...]:
    earlier = None if before is None else before.once if before.step is None else before.step
    return (
        *(cost.kernel, cost.case, cost.chip, cost.per),
        *(_number(cost.step), _number(cost.once), _number(earlier)),
        "new" if before is None else _change(growth(before, cost)),
        *(_number(cost.bundles), _number(cost.loop_bundles), _share(cost.mxu), _share(cost.vpu)),
        f"{_number(cost.loop_spills)}, {_number(cost.spills)}",
        f"{_number(cost.loop_fills)}, {_number(cost.fills)}",
        *(_kibibytes(cost.vmem_bytes), _kibibytes(cost.code_bytes)),
    )


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < len(NAMES) else cell.rjust(width)


def _number(x: float | None) -> str:
    if x is None:
        return "-"
    return f"{x:.2f}" if isinstance(x, float) and abs(x) < 1000 else f"{x:.0f}"


def _share(x: float | None) -> str:
    return "-" if x is None else f"{x:.0%}"


def _kibibytes(x: int | None) -> str:
    return "-" if x is None else f"{x / 1024:.0f}"


def _change(x: float | None) -> str:
    return "-" if x is None else f"{x:+.1%}{' !' if x > GROWTH else ''}"
