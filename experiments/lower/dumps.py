"""Reads what libtpu writes about one kernel: estimated cycles, bundles, and memory on the chip.

A TPU core executes bundles, each with slots for its units: matrix products (MXU), elementwise arithmetic (VALU), loads,
stores and so on. A register that is spilled is stored and later filled again.
"""

import json
import re
from typing import NamedTuple

# "  0x22 LB: >> { instructions" is a bundle inside two loops that begins the inner one; "{}" is an empty one
BUNDLE = re.compile(r"^ *(?:0|0x[0-9a-f]+) +([A-Z]{2})? *: *(>*) *\{", re.MULTILINE)
CYCLES = re.compile(r"estimated_cycles: (\d+)")
XLA_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class Schedule(NamedTuple):
    """The bundles of a kernel, and of its innermost loop.

    Attributes:
      bundles, loop_bundles: how many there are.
      mxu, vpu: share of the matrix and the vector unit's slots in the loop that are used.
      spills, loop_spills: stores of registers that did not suffice.
      fills, loop_fills: loads that bring them back.
    """

    bundles: int
    loop_bundles: int
    mxu: float
    vpu: float
    spills: int
    loop_spills: int
    fills: int
    loop_fills: int


def read_cycles(profile: str) -> int | None:
    """Returns the estimate in *_static_llo_profile.textproto, or None where there is none, which is written as 0."""
    found = CYCLES.search(profile)
    return int(found[1]) or None if found else None


def read_around(program: str) -> int | None:
    """Returns XLA's estimate of what a compiled program does around its kernels, of which it has none itself.

    None where it branches, loops or calls, since what it does then is in other computations.
    """
    entry = program[program.index("\nENTRY ") :].split("\n}", 1)[0]
    if any(f" {word}(" in entry for word in ("while", "conditional", "call")):
        return None
    return sum(map(int, XLA_CYCLES.findall(entry)))


def read_schedule(utilization: str, bundles: str) -> Schedule:
    """Returns what *per-bundle-utilization.txt and *final_bundles.txt say.

    Raises:
      ValueError: the two do not have the same number of bundles.
    """
    _, names, capacity, _, *rows = utilization.splitlines()
    names = [name.strip() for name in names.split(",")]
    capacity = dict(zip(names, map(int, capacity.split()), strict=True))
    used = [dict(zip(names, map(int, row.split()), strict=True)) for row in rows if row.strip()]
    loop = innermost_loop(bundles, len(used))

    def count(slot: str, where=range(len(used))) -> int:
        return sum(used[i][slot] for i in where)

    def share(slot: str) -> float:
        return round(count(slot, loop) / (capacity[slot] * len(loop)), 4)

    return Schedule(
        bundles=len(used),
        loop_bundles=len(loop),
        mxu=share("MXU"),
        vpu=share("VALU"),
        spills=count("VSTORE:SPILL"),
        loop_spills=count("VSTORE:SPILL", loop),
        fills=count("VLOAD:FILL"),
        loop_fills=count("VLOAD:FILL", loop),
    )


def innermost_loop(bundles: str, number: int) -> list[int]:
    """Returns the places of the bundles in the deepest loop, the longest of several; all bundles if there is no loop.

    Raises:
      ValueError: there is another number of bundles.
    """
    found = [(len(depth), label == "LB") for label, depth in BUNDLE.findall(bundles)]
    if len(found) != number:
        raise ValueError(f"dumps: {len(found)} bundles are listed and {number} are counted; libtpu writes them anew.")
    deepest, loops = max(depth for depth, _ in found), [[]]
    for i, (depth, begins) in enumerate(found):
        if depth == deepest:
            if begins:
                loops.append([])
            loops[-1].append(i)
    return max(loops, key=len)


def read_vmem_bytes(page: str, operation: str) -> int:
    """Returns bytes of on-chip memory in *vmem_report.html: windows, scratch and spilled registers, with padding."""
    data = page[page.index("{", page.index("const DATA")) :]
    report, _ = json.JSONDecoder().raw_decode(data)
    return report["hlo_breakdowns"][operation]["total_size"]
