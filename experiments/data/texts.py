"""Documents one after another, from files or the Hub, without ever holding all of them.

Rows are counted here and nowhere else: a place in a source is a file of it and a row of that file, so reading can go on
from any place, after a kill as after a network that broke off, and skips whole files without opening them.
"""

import functools
import glob
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.cli import UserError
from experiments.data.config import STANDARD_LIBRARY, Origin

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
OTHER_FORMATS = {".txt", ".md", ".csv", ".arrow", ".gz", ".zst"}  # by which a path is told from a dataset's name
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
PAUSES = (1, 2, 4, 8, 16, 32)  # seconds before each attempt to go on reading from the Hub


class Place(NamedTuple):
    """Where a document stands in its source."""

    file: int = 0
    row: int = 0
    rows_before: int = 0  # in the files before


class Text(NamedTuple):
    """A document as it was found."""

    name: str
    text: str
    place: Place


class _File(NamedTuple):
    """A part of a source."""

    name: Callable[[Place], str]
    texts: Callable[[int], Iterable[str]]  # from a row on


def read_texts(origin: Origin, start: Place = Place()) -> Iterator[Text]:
    """Yields every document that is not empty, from a place on, in an order that is always the same.

    Raises:
      UserError: the source cannot be read; a network that breaks off is given some time to come back.
    """
    files, first, rows_before = _files(origin), start.row, start.rows_before
    for number in range(start.file, len(files)):
        row = first - 1
        for row, text in enumerate(files[number].texts(first), first):
            if text.strip():
                place = Place(number, row, rows_before)
                yield Text(files[number].name(place), text, place)
        first, rows_before = 0, rows_before + row + 1


def _files(origin: Origin) -> list[_File]:
    if origin.source == STANDARD_LIBRARY:
        return list(_standard_library())
    if Path(origin.source).exists():
        return list(_local(Path(origin.source), origin.text_field))
    if _is_path(origin.source):  # the Hub would be asked time and again, where there is no network for half a minute
        raise UserError(
            f"data.source: {origin.source} is no readable file or folder and no dataset's name; correct the path."
        )
    return list(_hugging_face(origin))


def _is_path(source: str) -> bool:
    """True for what cannot be meant as the name of a dataset, which is a word or OWNER/WORD."""
    local = source.startswith(("/", ".", "~")) or source.endswith("/") or source.count("/") > 1
    return local or Path(source).suffix in {*FILE_FORMATS, *OTHER_FORMATS}


def _standard_library() -> Iterator[_File]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            yield _whole(path, path.relative_to(root).as_posix(), errors="replace")


def _local(path: Path, text_field: str) -> Iterator[_File]:
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        yield _table(file, name, text_field) if file.suffix in FILE_FORMATS else _whole(file, name)


def _whole(path: Path, name: str, errors: str = "strict") -> _File:
    """A file that is one document."""

    def texts(first: int) -> Iterator[str]:
        if first == 0:
            try:
                yield path.read_text(encoding="utf-8", errors=errors)
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"data.source: {path} cannot be read as UTF-8 text ({error}).") from None

    return _File(lambda place: name, texts)


def _table(path: Path, name: str, text_field: str) -> _File:
    """A file of rows, which are numbered by themselves."""

    def texts(first: int) -> Iterator[str]:
        try:
            if path.stat().st_size == 0:
                return  # `datasets` takes an empty file for a broken one
            rows = _open(str(path), FILE_FORMATS[path.suffix], data_files=glob.escape(str(path)), split="train")
            yield from _column(rows, first, text_field, str(path))
        except Exception as error:  # of files and parsers, without a common type
            raise _unreadable(str(path), error) from None

    return _File(lambda place: f"{name}:{place.row}", texts)


def _hugging_face(origin: Origin) -> Iterator[_File]:
    """The files of a dataset, whose rows are numbered through."""
    rows = _open(origin.source, origin.source, name=origin.subset or None, split=origin.split)
    for number in range(rows.num_shards):
        file = rows.shard(num_shards=rows.num_shards, index=number)
        texts = functools.partial(_column, file, text_field=origin.text_field, source=origin.source)
        yield _File(
            lambda place: f"{origin.split}:{place.rows_before + place.row}",
            functools.partial(_steadily, texts, source=origin.source),
        )


def _column(rows: Any, first: int, text_field: str, source: str) -> Iterator[str]:
    """Yields the text of each row from `first` on; a row without any counts as empty."""
    names = rows.column_names  # of some streams they are not known before the first row
    for row in rows.skip(first) if first else rows:
        names = names or list(row)
        if text_field not in names:
            raise UserError(f"data.text_field: {source} has no column {text_field!r}; it has {sorted(names)}.")
        text = row.get(text_field) or ""
        if not isinstance(text, str):
            raise UserError(f"data.text_field: {text_field!r} of {source} holds {type(text).__name__}, not text.")
        yield text


def _steadily(texts: Callable[[int], Iterable[str]], first: int, *, source: str) -> Iterator[str]:
    """Yields texts from `first` on; when reading breaks off, waits and goes on at the row that is due.

    Raises:
      UserError: it broke off at one row time and again.
    """
    row, pauses = first, iter(PAUSES)
    while True:
        try:
            for text in texts(row):
                yield text
                row, pauses = row + 1, iter(PAUSES)
            return
        except UserError:
            raise
        except Exception as error:  # of the network and its many layers, without a common type
            pause = next(pauses, None)
            if pause is None:
                raise UserError(
                    f"data.source: {source} broke off at row {row:,} of a file and did not come back within "
                    f"{sum(PAUSES)} seconds ({_reason(error)}); the same command tries again."
                ) from error
            print(f"{source} broke off ({_reason(error)}), tries again in {pause} s", file=sys.stderr, flush=True)
            time.sleep(pause)


def _open(source: str, *args, **kwargs) -> Any:
    """Opens a stream with `datasets`, which is imported here because it takes seconds and bytes do not need it."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it has to say is in the error, too
    try:
        return datasets.load_dataset(*args, streaming=True, **kwargs)
    except Exception as error:  # hub, file and format errors have no common type
        raise _unreadable(source, error) from None


def _unreadable(source: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    return UserError(
        f"data.source: {source} is no readable file or folder and no dataset that the Hub gives ({_reason(error)})."
    )


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
