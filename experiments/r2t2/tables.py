"""Tables of questions, row by row: a Hub dataset, a local file, or the files of a split in a local folder.

Rows are streamed through `datasets` and images are left encoded; nothing is copied into a cache.
"""

import csv
import glob
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.cli import UserError

FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
SPLITS = {"train", "val", "valid", "validation", "dev", "test", "testdev", "testmini"}
DESCRIPTIONS = {"dataset_info.json", "dataset_dict.json", "state.json"}  # what datasets.save_to_disk writes beside data

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

Row = Mapping[str, Any]


def tables(source: str, subset: str | None, split: str) -> Iterator[tuple[str, Iterator[Row]]]:
    """Yields (name, rows) of every table of a source.

    Args:
      source: a file, a folder or a Hub dataset.
      subset: configuration of the Hub dataset, or a subfolder where there is one of that name.
      split: split of the Hub dataset; in a folder, a word in the names of the files where names tell splits apart.

    Raises:
      UserError: no such file or dataset; in the iteration: one that is not a table.
    """
    path = Path(source)
    if path.exists():
        for file in table_files(path, subset, split):
            yield str(file), _guarded(str(file), lambda file=file: _local(file))
    elif path.suffix in FORMATS or not HUB_NAME.fullmatch(source):
        raise UserError(f"source: there is no file or folder {source}; name one that exists.")
    else:
        name = " ".join(filter(None, (source, subset, split)))
        yield name, _guarded(name, lambda: _streamed(source, name=subset, split=split))


def table_files(path: Path, subset: str | None, split: str) -> list[Path]:
    """Returns the files of a split in the order of their names, or the file itself.

    Raises:
      UserError: there are none, or it is unclear which are meant.
    """
    if path.is_file():
        if path.suffix.lower() not in FORMATS:
            raise UserError(f"source: {path} is no table; give a file that ends in {', '.join(FORMATS)}.")
        return [path]
    root = path / subset if subset and (path / subset).is_dir() else path
    found = [p for p in sorted(root.rglob("*")) if p.suffix.lower() in FORMATS and p.name not in DESCRIPTIONS]
    words = {p: set(re.split(r"[^a-z0-9]+", p.relative_to(root).as_posix().lower())) for p in found}
    named = [p for p in found if split.lower() in words[p]]
    if found and not named and any(words[p] & SPLITS for p in found):
        raise UserError(f"split: no table in {root} is named after {split!r}; name the file itself or another split.")
    chosen = named or found
    if len({p.suffix for p in chosen}) != 1:
        kinds = ", ".join(sorted({p.suffix for p in chosen}))
        what = f"tables of several formats ({kinds})" if chosen else f"no table ({', '.join(FORMATS)})"
        raise UserError(f"source: {root} holds {what}; name one file.")
    return chosen


def _guarded(name: str, load: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows, with whatever goes wrong on the way in one sentence."""
    try:
        yield from load()
    except Exception as error:  # hub, file and format errors have no common type
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"source: {name} cannot be read as a table ({reason}); mend it, or name the folder of a downloaded copy."
        ) from None


def _local(file: Path) -> Iterator[Row]:
    kind = FORMATS[file.suffix.lower()]
    if file.stat().st_size == 0:
        return iter(())
    if file.suffix.lower() == ".json":
        return iter(_json_rows(file))
    files = [glob.escape(str(file))]
    if kind != "csv":
        return _streamed(kind, data_files=files, split="train")
    return _csv_rows(file, files)


def _streamed(*args, **kwargs) -> Iterator[Row]:
    """Streams with `datasets`, which is imported here because it takes seconds and scoring does not need it."""
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset(*args, streaming=True, **kwargs)
    return iter(rows.decode(False) if rows.features else rows)


def _json_rows(file: Path) -> list[Row]:
    """The rows of a list of objects, or of an object that holds one such list.

    Read without `datasets`, because a column of such a file may hold numbers here and texts there.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    lists = [content] if isinstance(content, list) else [value for value in content.values() if isinstance(value, list)]
    lists = [rows for rows in lists if all(isinstance(row, dict) for row in rows)]
    if len(lists) != 1:
        raise ValueError(f"it holds {len(lists)} lists of objects instead of one")
    return lists[0]


def _csv_rows(file: Path, files: list[str]) -> Iterator[Row]:
    """The rows as texts, so that "007" and "NA" stay what they are."""
    import datasets

    separator = "\t" if file.suffix.lower() == ".tsv" else ","
    with file.open(encoding="utf-8-sig", newline="") as lines:
        header = next(csv.reader(lines, delimiter=separator))
    features = datasets.Features({name: datasets.Value("string") for name in header})
    options = {"sep": separator, "keep_default_na": False, "encoding": "utf-8-sig", "features": features}
    return _streamed("csv", data_files=files, split="train", **options)
