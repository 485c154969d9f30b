"""The questions of a benchmark or reference set, from the Hub or from a local table with the same columns.

A table is streamed; an image stays encoded until `question.image.pixels()` is called. Which questions a limit draws
depends on their ids and the seed, not on the order or the number of files.
"""

import collections
import dataclasses
import functools
import hashlib
import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.cli import UserError
from experiments.r2t2.benchmarks import Benchmark, Columns, find
from experiments.r2t2.images import EncodedImage, UnreadableImageError, encoded_image
from experiments.r2t2.replies import LETTERS, parse_choice, plain, split_options
from experiments.r2t2.tables import Row, tables

FIELDS = tuple(field.name for field in dataclasses.fields(Columns))
OF_A_TURN = Columns(choices="choices")  # what a turn of a dialogue is made into


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """What to read, and from where.

    Attributes:
      benchmark: name of a row of `benchmarks`.
      source: a parquet, arrow, jsonl, json, csv or tsv file, a folder of them, or a Hub dataset; empty: the row's own.
      subset: configuration of the Hub dataset or subfolder of a local one; empty: the row's own.
      split: split to read; empty: the row's own.
      columns: fields of benchmarks.Columns that are called otherwise here; None where there is no such column.
      images: folder in which relative image paths begin; empty: the folder of the table.
      limit: draw at most so many questions at random, for which the table is read to its end; None: as many as the row
        says.
      seed: which ones are drawn.
      skip_unreadable: leave out questions whose image cannot be decoded instead of stopping; every image is then
        decoded while reading.
    """

    benchmark: str
    source: str = ""
    subset: str = ""
    split: str = ""
    columns: Mapping[str, str | tuple[str, ...] | None] = dataclasses.field(default_factory=dict)
    images: str = ""
    limit: int | None = None
    seed: int = 0
    skip_unreadable: bool = False

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"ReadConfig: limit={self.limit} must be at least 1, or None for the row's own.")
        if self.seed < 0:
            raise ValueError(f"ReadConfig: seed={self.seed} is negative; use 0 or more.")
        unknown = [name for name in self.columns if name not in FIELDS]
        if unknown:
            raise ValueError(f"ReadConfig: columns has no field {unknown[0]!r}; choose among {', '.join(FIELDS)}.")
        without = [name for name in ("image", "question", "answer") if self.columns.get(name, name) is None]
        if without:
            raise ValueError(
                f"ReadConfig: columns={{{without[0]!r}: None}} leaves questions without one; name a column."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question about an image.

    Attributes:
      id: unique in its benchmark.
      image: still encoded.
      text: what is asked.
      choices: the options A, B, C, ... if there are any.
      answers: what counts as right: the letter of an option, or what every annotator said.
      source: what the image came from; references must not share one with a test. Two rows that number the same
        corpus have equal sources for equal images, the others where the stored bytes are equal.
      task: the paper's task type.
      subtask: by what scores are split; may be empty.
      hint: text to be read before the question; may be empty.
    """

    id: str
    image: EncodedImage
    text: str
    choices: tuple[str, ...] | None
    answers: tuple[str, ...]
    source: str
    task: str
    subtask: str
    hint: str

    @property
    def answer(self) -> str:
        """The answer most annotators gave; the first of several."""
        return collections.Counter(self.answers).most_common(1)[0][0]


class Questions:
    """The questions of a benchmark, to be iterated over any number of times; every pass streams the table anew.

    Attributes:
      benchmark: the row, with source, split, columns and limit as they were asked for.
      skipped: what the last pass left out, a sentence for every image.
    """

    def __init__(self, config: ReadConfig):
        """Looks the benchmark up; nothing is read yet.

        Raises:
          UserError: it is unknown or has no source.
        """
        row = find(config.benchmark)
        if not (config.source or row.hub):
            raise UserError(f"source: {row.name} has no Hub dataset that loads; give a local table: {row.home}.")
        elsewhere = bool(config.source) and not Path(config.source).exists()
        self.benchmark = dataclasses.replace(
            row,
            hub=config.source or row.hub,
            subset=config.subset or (None if elsewhere else row.subset),
            split=config.split or row.split,
            columns=dataclasses.replace(row.columns, **config.columns),
            limit=config.limit or row.limit,
        )
        self.config = config
        self.skipped: list[str] = []

    def __iter__(self) -> Iterator[Question]:
        """Yields the questions in the order of the table.

        Raises:
          UserError: a table cannot be read, is empty or lacks columns, ids occur twice, answers are hidden, or an image
            is not there.
        """
        self.skipped = []
        find_image = _image_finder(self.benchmark, self.config)
        for record in _drawn(_records(self.benchmark), self.benchmark.limit, self.config.seed):
            try:
                question = _question(self.benchmark, record, find_image(record))
                if self.config.skip_unreadable:
                    question.image.pixels()
            except UnreadableImageError as error:
                if not self.config.skip_unreadable:
                    raise
                self.skipped.append(str(error))
            else:
                yield question


class _Record(NamedTuple):
    """A row, or one turn of the dialogue in it."""

    id: str
    row: Row
    columns: Columns
    where: str
    folder: Path


def _records(benchmark: Benchmark) -> Iterator[_Record]:
    """Yields what belongs to the benchmark. Rows without an id are counted through all tables."""
    seen: dict[str, str] = {}
    number = -1
    for table, rows in tables(benchmark.hub or "", benchmark.subset, benchmark.split):
        for place, row in enumerate(rows):
            number += 1
            if place == 0:
                _check_columns(benchmark, row, table)
            if not _belongs(benchmark, row):
                continue
            for record in _parts(benchmark, row, str(number), f"row {place} of {table}", Path(table).parent):
                if record.id in seen:
                    raise UserError(
                        f"columns: id {record.id!r} stands in {seen[record.id]} and in {record.where}; set columns="
                        "{'id': ...} to a column without repetitions, or to None to count rows."
                    )
                seen[record.id] = record.where
                yield record
    if not seen:
        of_a_kind = f" whose {benchmark.columns.group} is in {benchmark.keep}" if benchmark.keep else ""
        raise UserError(f"source: {benchmark.hub} has no row{of_a_kind}; give a table with questions.")


def _check_columns(benchmark: Benchmark, row: Row, table: str) -> None:
    wanted: dict[str, Any] = dataclasses.asdict(benchmark.columns)
    if benchmark.turns in row:
        wanted = {"image": "images"}
    missing = [(field, name) for field, names in wanted.items() for name in _listed(names) if not _has(row, name)]
    if missing:
        memory = "; the row's own names are from memory" if benchmark.known_from == "memory" else ""
        raise UserError(
            f"columns: {table} lacks {', '.join(f'{name!r} ({field})' for field, name in missing)} and has "
            f"{', '.join(map(repr, sorted(row)))}; set columns={{{missing[0][0]!r}: ...}} to the name used there, "
            f"or to None if {benchmark.name} can do without{memory}."
        )


def _belongs(benchmark: Benchmark, row: Row) -> bool:
    group = benchmark.columns.group
    return not (benchmark.keep and group) or str(_cell(row, group)) in benchmark.keep


def _parts(benchmark: Benchmark, row: Row, number: str, where: str, folder: Path) -> Iterator[_Record]:
    columns = benchmark.columns
    if benchmark.turns not in row:
        name = str(_cell(row, columns.id)) if columns.id else number
        yield _Record(name, row, columns, where, folder)
        return
    for turn, said in enumerate(row[benchmark.turns]):
        text, choices = split_options(said["user"].removeprefix("Question:"))
        if choices is None and "\n" in text:
            text = text.rpartition("\n")[0]  # the last line asks for a brief answer
        answer = said["assistant"].strip().removesuffix(".")
        part = {"image": row["images"], "question": text, "choices": choices, "answer": answer}
        yield _Record(f"{number}.{turn}", part, OF_A_TURN, f"turn {turn} of {where}", folder)


def _drawn(records: Iterable[_Record], limit: int | None, seed: int) -> Iterable[_Record]:
    """The records whose ids have the smallest hashes, in their old order."""
    if limit is None:
        return records

    def rank(numbered: tuple[int, _Record]) -> bytes:
        return hashlib.blake2b(f"{seed}:{numbered[1].id}".encode(), digest_size=8).digest()

    chosen = heapq.nsmallest(limit, enumerate(records), key=rank)
    return [record for _, record in sorted(chosen, key=lambda numbered: numbered[0])]


def _image_finder(benchmark: Benchmark, config: ReadConfig) -> Callable[[_Record], EncodedImage]:
    """Returns a function that finds the image of a record, in another table if cells hold ids into one."""

    @functools.cache
    def entries() -> dict[str, Any]:
        found = tables(benchmark.hub or "", benchmark.image_subset, benchmark.split)
        return {str(row.get("id")): row.get("image") for _, rows in found for row in rows}

    def find_image(record: _Record) -> EncodedImage:
        value = _cell(record.row, record.columns.image)
        if benchmark.image_subset and isinstance(value, str) and "." not in value:
            value = f"{value}.jpg" if config.images else entries().get(value)
        return encoded_image(value, record.where, Path(config.images) if config.images else record.folder)

    return find_image


def _question(benchmark: Benchmark, record: _Record, image: EncodedImage) -> Question:
    row, columns = record.row, record.columns
    text, choices = _text(row, columns.question), None
    if columns.choices == columns.question:
        text, choices = split_options(text)
    elif columns.choices:
        choices = _choices(row, columns.choices)
    return Question(
        id=record.id,
        image=image,
        text=text,
        choices=choices,
        answers=_answers(benchmark, record, choices),
        source=_source(benchmark, record, image),
        task=benchmark.task,
        subtask=_text(row, columns.subtask),
        hint=_text(row, columns.hint),
    )


def _choices(row: Row, columns: str | tuple[str, ...]) -> tuple[str, ...] | None:
    cells = _listed(_cell(row, columns)) if isinstance(columns, str) else [_cell(row, name) for name in columns]
    options = ["" if cell is None or str(cell).lower() == "nan" else str(cell) for cell in cells]
    while options and not options[-1]:
        options.pop()
    return tuple(options) or None


def _answers(benchmark: Benchmark, record: _Record, choices: tuple[str, ...] | None) -> tuple[str, ...]:
    """What annotators said; with choices the letter of the right one."""
    cells = _listed(_cell(record.row, record.columns.answer))
    texts = [str(cell["answer"] if isinstance(cell, Mapping) else cell).strip() for cell in cells if cell is not None]
    hidden = {""} if benchmark.answer == "text" else {"", "nan", "-1"}
    texts = [text for text in texts if text.lower() not in hidden]
    if not texts:
        raise UserError(
            f"answer: {record.where} has none, as where answers are hidden; read a split with public ones "
            f"({find(benchmark.name).split!r} of {benchmark.name} has them)."
        )
    if choices is None and benchmark.answer == "text":
        return tuple(texts)
    letter = _letter(texts[0], benchmark.answer, choices or ())
    if letter is None:
        options = (
            f"none of its options {', '.join(choices)}" if choices else "to be one of its options, and it has none"
        )
        raise UserError(f"answer: {texts[0]!r} of {record.where} is {options}; mend the row or columns=.")
    return (letter,)


def _letter(text: str, kind: str, choices: tuple[str, ...]) -> str | None:
    """The letter of an option given by its letter, its index from 0, or its text."""
    if kind == "index":
        index = int(text) if text.isdecimal() else len(choices)
        return LETTERS[index] if index < len(choices) else None
    same = [LETTERS[i] for i, choice in enumerate(choices) if kind == "text" and plain(choice) == plain(text)]
    return same[0] if same else parse_choice(text, choices)


def _source(benchmark: Benchmark, record: _Record, image: EncodedImage) -> str:
    if record.columns.source is None:
        return f"sha256:{hashlib.sha256(image.encoded()).hexdigest()}"
    name = _text(record.row, record.columns.source)
    return f"{benchmark.corpus or benchmark.name}:{int(name) if name.isdecimal() else name}"


def _has(row: Row, name: str) -> bool:
    head, _, rest = name.partition(".")
    return name in row or (head in row and bool(rest))


def _cell(row: Row, name: str) -> Any:
    """The value of a column, or of a nested one a.b; None where the row has none."""
    head, _, rest = name.partition(".")
    if name in row or not rest:
        return row.get(name)
    return (row.get(head) or {}).get(rest)


def _text(row: Row, name: str | None) -> str:
    value = _cell(row, name) if name else None
    return "" if value is None else str(value).strip()


def _listed(value: Any) -> list[Any]:
    """A cell as a list; it may be JSON of texts, or the dict of lists that Arrow may make of a list of dicts."""
    if isinstance(value, Mapping) and isinstance(value.get("answer"), list):
        value = value["answer"]
    if isinstance(value, str) and value.startswith('["'):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return [value]
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
