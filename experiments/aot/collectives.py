"""What devices send each other in a compiled program, read from the text of its HLO.

A collective counts as often as the loops around it turn, and every branch of a conditional counts. TPU compilers write
one collective in several pieces, fusions that share its channel, and a reduce-scatter as an all-reduce in a computation
of that name.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

ITEM_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")

_HEAD = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>\S+) = (?P<shape>.*?) (?P<kind>[a-z][\w-]*)\((?P<operands>[^)]*)\)"
)
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"(\w+)=\{?((?:%[\w.\-]+(?:, )?)+)\}?")
_BOUND = re.compile(r" compare\(%([\w.\-]+), %([\w.\-]+)\), direction=LT")
_CONSTANT = re.compile(r"%([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
_PLACE = re.compile(r"%([\w.\-]+) = [su]32\[\]\S* get-tuple-element\(.*?\), index=(\d+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of KINDS.
      axes: the mesh axes that it goes along, joined by " x ".
      times: how often it is done in one call of the program.
      sent_bytes: what a device that takes part sends each time, at least, in a ring.
      senders: how many devices do.
    """

    kind: str
    axes: str
    times: int
    sent_bytes: float
    senders: int

    @property
    def total_bytes(self) -> float:
        """Of all devices, in one call of the program."""
        return self.times * self.sent_bytes * self.senders


def read_collectives(program: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Returns the collectives of an SPMD program whose devices are numbered in the order of the mesh.

    Args:
      program: text of the compiled HLO module.
      mesh_shape: sizes of the mesh's axes, in their order.
    """
    computations, entry = _computations(program)
    found, first, fused = [], {}, _fused(computations)
    for name, times in _turns(computations, entry).items():
        for line in computations[name]:
            instruction = _INSTRUCTION.match(line)
            if instruction is None or (kind := instruction["kind"].removesuffix("-start")) not in KINDS:
                continue
            arrays, groups = _ARRAY.findall(instruction["shape"]), _groups(line, mesh_shape)
            if kind != "collective-permute" and (channel := _CHANNEL.search(line)):
                owner = first.setdefault((kind, channel[1], *arrays, groups.tobytes()), name)
                if owner != name and {owner, name} & fused:
                    continue  # another piece of it
            if groups.shape[1] > 1:
                sizes = [_array_bytes(*array) for array in arrays]
                if instruction["kind"] in ("all-gather-start", "collective-permute-start"):
                    sizes = sizes[len(sizes) // 2 :] if kind == "all-gather" else sizes[:1]  # operands are listed, too
                if name.startswith("all-reduce-scatter"):
                    kind, sizes = "reduce-scatter", [size / groups.shape[1] for size in sizes]
                senders = len(groups) if kind == "collective-permute" else groups.size
                sent = _sent_bytes(kind, sum(sizes), groups.shape[1])
                found.append(Collective(kind, _axes(groups, mesh_shape), times, sent, senders))
    return found


def _fused(computations: dict[str, list[str]]) -> set[str]:
    """Returns the computations that fusions call."""
    lines = (line for lines in computations.values() for line in lines if " fusion(" in line)
    return {match[1] for line in lines if (match := re.search(r"calls=%?([\w.\-]+)", line))}


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation, and the name of the one the program begins with."""
    computations, lines, entry = {}, [], ""
    for line in program.splitlines():
        if head := _HEAD.match(line):
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _turns(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """Returns how often each computation runs in one call; a loop whose length is not a constant counts once."""
    turns: dict[str, int] = defaultdict(int)

    def visit(name: str, times: int) -> None:
        turns[name] += times
        for line in computations[name]:
            called = {role: names.replace("%", "").split(", ") for role, names in _CALLED.findall(line)}
            length = 1
            if "body" in called:
                length = _trip_count(line, *(computations[called[role][0]] for role in ("condition", "body")))
            for role, names in called.items():
                for other in names:
                    if other in computations and role != "condition":
                        visit(other, times * length)

    visit(entry, 1)
    return turns


def _trip_count(loop: str, condition: list[str], body: list[str]) -> int:
    """What compilers for CPUs say of a loop, or else n / k of its `i < n; i += k`."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop):
        return int(known[1])
    ends = [match.groups() for line in condition if (match := _BOUND.search(line))]
    bounds, places = _found(_CONSTANT, condition), _found(_PLACE, condition)
    if len(ends) != 1 or ends[0][1] not in bounds or ends[0][0] not in places:
        return 1
    ((counter, bound),) = ends
    (root,) = (_operands(line) for line in body if line.lstrip().startswith("ROOT"))
    after, constants = root[int(places[counter])], _found(_CONSTANT, body)
    added = [_operands(line) for line in body if line.lstrip().startswith(f"%{after} = ") and " add(" in line]
    steps = [int(constants[name]) for operands in added for name in operands if name in constants]
    return -(-int(bounds[bound]) // (steps[0] if steps else 1))


def _found(pattern: re.Pattern, lines: list[str]) -> dict[str, str]:
    return {match[1]: match[2] for line in lines if (match := pattern.search(line))}


def _operands(line: str) -> list[str]:
    instruction = _INSTRUCTION.match(line)
    return re.findall(r"%([\w.\-]+)", instruction["operands"]) if instruction else []


def _groups(line: str, mesh_shape: Mapping[str, int]) -> np.ndarray:
    """Returns the devices [groups, devices of a group] that talk to each other, in whatever way they are written."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", line):
        return np.array([list(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1])])
    if listed := re.search(r"replica_groups=\{\{(.*?)\}\}", line):
        return np.array([list(map(int, group.split(","))) for group in listed[1].split("},{")])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return _in_order(iota[2]).reshape(_numbers(iota[1])[0], -1)
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named[3])]
        devices = _in_order(named[2] or f"[{math.prod(sizes.values())}]").reshape(tuple(sizes.values()))
        members = math.prod(devices.shape[axis] for axis in along)
        return np.moveaxis(devices, along, range(-len(along), 0)).reshape(-1, members)
    return np.arange(math.prod(mesh_shape.values()))[None]


def _in_order(iota: str) -> np.ndarray:
    """Returns the numbers of `[4,2]T(1,0)`: 0 to 7 in that shape, transposed, in a row."""
    shape, _, order = iota.strip("[)").partition("]")
    numbers = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (numbers.transpose(_numbers(order.removeprefix("T("))) if order else numbers).reshape(-1)


def _numbers(listed: str) -> list[int]:
    return [int(number) for number in listed.split(",")]


def _axes(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> str:
    """Names the axes along which the places of a group's devices differ."""
    places = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())))
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return " x ".join(name for name, differs in zip(mesh_shape, differ, strict=True) if differs)


def _sent_bytes(kind: str, size: float, num_devices: int) -> float:
    """Bytes a device sends in a ring, the least there is, for a result of this size on each."""
    if kind == "collective-permute":
        return size
    return size * (num_devices - 1) * {"all-reduce": 2 / num_devices, "reduce-scatter": 1}.get(kind, 1 / num_devices)


def _array_bytes(dtype: str, dims: str) -> int:
    return ITEM_BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
