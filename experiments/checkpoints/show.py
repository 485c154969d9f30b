"""The checkpoints of a folder as a table, verified without reading an array into memory."""

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from math import prod
from pathlib import Path
from typing import NamedTuple

from experiments.checkpoints import disk, manifest
from experiments.checkpoints.manifest import Array, DamageError, Manifest
from experiments.cli import UserError

TITLES = ("step", "saved", "size", "arrays", "parameters", "dtypes", "mesh", "content")


class Row(NamedTuple):
    """One checkpoint, and what is wrong with it."""

    folder: Path
    step: int
    content: Manifest | None  # None if the manifest is damaged
    damage: str | None


def find(path: Path) -> list[Path]:
    """Returns the checkpoints at a path: a run's folder, a folder of checkpoints, or one checkpoint.

    Raises:
      UserError: there are none.
    """
    if not path.is_dir():
        raise UserError(f"path: {path} is not a folder; give a run's folder, its checkpoints, or one of them.")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = [folder / str(step) for step in disk.entries(folder)]
    if not found and folder == path and _step(path) is not None:
        return [path]
    if not found:
        raise UserError(f"path: {folder} holds no checkpoint; give a run's folder, its checkpoints, or one of them.")
    return found


def look(folder: Path, quick: bool) -> Row:
    """Returns what there is to say about a checkpoint; `quick` compares names and sizes of the files alone."""
    step, content = _step(folder), None
    assert step is not None
    try:
        content = manifest.read(folder, step)
        manifest.verify(folder, content, () if quick else content.files)
    except DamageError as damage:
        return Row(folder, step, content, str(damage))
    return Row(folder, step, content, None)


def table(rows: Sequence[Row], quick: bool) -> list[str]:
    """Returns the lines of a table of checkpoints."""
    good = "not read" if quick else "verified"
    cells = [TITLES] + [(str(row.step), *_cells(row.content), row.damage or good) for row in rows]
    return list(_aligned(cells, right=(0, 2, 3, 4)))


def leftovers(path: Path) -> list[str]:
    """Returns a line for everything else in a folder of checkpoints: drafts, and what was set aside."""
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    unfinished = [f"step {step} is being saved, or was when the run ended" for step in disk.drafts(folder)]
    strangers = [f"{place} is not under the name of a step" for place in disk.strangers(folder)]
    return unfinished + strangers + [f"{place} was set aside, damaged" for place in disk.aside(folder)]


def arrays(content: Manifest) -> list[str]:
    """Returns a line for every array; those that differ in numbers of their paths alone share one."""

    def kind(array: Array) -> tuple:
        return re.sub(r"\d+", "*", array.path), array.shape, array.dtype

    def place(array: Array) -> tuple:
        return first[kind(array)], *kind(array)

    first: dict[tuple, int] = {}
    for number, array in enumerate(content.arrays):
        first.setdefault(kind(array), number)
    groups = [list(group) for _, group in groupby(sorted(content.arrays, key=place), kind)]
    cells = [(f"{len(group)} x", _pattern(group), group[0].dtype, _shape(group[0])) for group in groups]
    return list(_aligned([("", "array", "dtype", "shape"), *cells], right=(0,)))


def _cells(content: Manifest | None) -> tuple[str, ...]:
    if content is None:
        return ("",) * 6
    sizes = {name: sum(prod(array.shape) for array in group) for name, group in _parts(content).items()}
    return (
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(content.time)),
        manifest.in_units(sum(file.size for file in content.files.values())),
        f"{len(content.arrays):,}",
        f"{sizes.get('params', sum(sizes.values())):,}",
        ", ".join(sorted({array.dtype for array in content.arrays})),
        _mesh(content.about.get("mesh")),
    )


def _parts(content: Manifest) -> dict[str, list[Array]]:
    """The arrays by the first key of their path."""
    parts: dict[str, list[Array]] = {}
    for array in content.arrays:
        parts.setdefault(array.path.split("/")[0], []).append(array)
    return parts


def _mesh(mesh) -> str:
    if not isinstance(mesh, dict):
        return "unknown"
    return ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size != 1) or "1 device"


def _step(folder: Path) -> int | None:
    """The step that the name of a checkpoint says, also of one that was set aside."""
    match = re.fullmatch(r"(\d+)(-\d+)?", folder.resolve().name)
    return int(match[1]) if match else None


def _pattern(group: Sequence[Array]) -> str:
    """The path they share, with a range where their numbers differ."""
    words = [re.split(r"(\d+)", array.path) for array in group]
    return "".join(_range(column) for column in zip(*words, strict=True))


def _range(column: Sequence[str]) -> str:
    if len(set(column)) == 1:
        return column[0]
    numbers = sorted({int(word) for word in column})
    unbroken = numbers[-1] - numbers[0] == len(numbers) - 1 > 1
    return f"{{{numbers[0]}-{numbers[-1]}}}" if unbroken else f"{{{','.join(map(str, numbers))}}}"


def _shape(array: Array) -> str:
    return " x ".join(str(size) for size in array.shape) or "scalar"


def _aligned(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
