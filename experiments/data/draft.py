"""A folder of shards while it is built: what is in it, what it was begun with, and where to go on.

The draft of the index is replaced after each pair of files, so a build that is killed loses the pair it was making.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.cli import UserError
from experiments.data.encoding import Document
from experiments.data.shards import DRAFT, INDEX, Index, Settings, check_size, read_index, token_type, write_shard
from experiments.data.texts import Place, Text

LEFT_BEHIND = {f"{DRAFT}.new"}  # by a build that was killed at once


class Mark(NamedTuple):
    """The last document that is in a finished shard."""

    place: Place
    crc32: int  # of its text, by which a source that has changed is noticed

    @classmethod
    def of(cls, text: Text) -> "Mark":
        """Marks a document."""
        return cls(text.place, zlib.crc32(text.text.encode("utf-8", "surrogatepass")))


class Draft(NamedTuple):
    """Shards that are not all there yet."""

    index: Index
    mark: Mark | None = None


class Part:
    """Documents that become a pair of files."""

    def __init__(self, vocab_size: int):
        self.kept: list[Document] = []
        self.held_out: list[Document] = []
        self.texts: list[str] = []  # of those held out
        self.num_tokens = 0  # kept
        self.last: Text | None = None
        self._dtype = token_type(vocab_size)

    def add(self, text: Text, document: Document, held_out: bool) -> None:
        """Takes in the document that follows."""
        document = document._replace(tokens=document.tokens.astype(self._dtype))  # half the memory, where it will do
        self.last = text
        if held_out:
            self.held_out.append(document)
            self.texts.append(text.text)
        else:
            self.kept.append(document)
            self.num_tokens += len(document.tokens)


def find_finished(folder: Path, settings: Settings) -> Index | None:
    """Returns the index of a folder that was finished with these settings, or None where there is no such folder.

    Raises:
      UserError: it was made with others.
    """
    if not (folder / INDEX).is_file() or not any(folder.glob("train-*.arrow")):
        return None
    index = read_index(folder)
    _check_same(folder, index.settings, settings)
    (folder / DRAFT).unlink(missing_ok=True)  # of a build that was killed at its very end
    return index


def find_draft(folder: Path, settings: Settings) -> Draft:
    """Returns what an earlier build left, or an empty draft; writes nothing.

    Raises:
      UserError: it is a file, holds something else, or holds what was begun with other settings.
    """
    if not (folder / DRAFT).is_file():
        if folder.is_file():
            raise UserError(f"output: {folder} is a file; give a new folder.")
        if folder.exists() and not {p.name for p in folder.iterdir()} <= LEFT_BEHIND:
            raise UserError(f"output: {folder} is not empty and holds no shards; give a new folder.")
        return Draft(Index(settings=settings))
    draft = _read(folder)
    if draft.mark is None:
        return Draft(Index(settings=settings))  # nothing was made with the old settings yet
    _check_same(folder, draft.index.settings, settings)
    for shard in (*draft.index.train, *draft.index.held_out):
        check_size(folder / shard.file, shard)
    return draft


def save_draft(folder: Path, draft: Draft) -> None:
    """Replaces the draft in a folder."""
    mark = draft.mark and {"place": draft.mark.place, "crc32": draft.mark.crc32}
    _replace(folder / DRAFT, {"index": dataclasses.asdict(draft.index), "mark": mark})


def add_pair(folder: Path, draft: Draft, part: Part) -> Draft:
    """Writes a part as the next files, as one only if it has nothing for the other; returns the draft with them."""
    number, vocab_size = len(draft.index.train), draft.index.settings.vocab_size
    index = draft.index
    if part.kept:
        shard = write_shard(folder, f"train-{number:05}.arrow", part.kept, (), vocab_size)
        index = dataclasses.replace(index, train=(*index.train, shard))
    if part.held_out:
        shard = write_shard(folder, f"held-out-{number:05}.arrow", part.held_out, part.texts, vocab_size)
        index = dataclasses.replace(index, held_out=(*index.held_out, shard))
    draft = Draft(index, Mark.of(part.last) if part.last else draft.mark)
    save_draft(folder, draft)
    return draft


def finish(folder: Path, index: Index) -> None:
    """Writes the index, which makes the shards fit to train on.

    Raises:
      UserError: there is nothing to train on, or nothing held out.
    """
    share = index.settings.held_out
    if not index.train:
        raise UserError(f"held_out: a share of {share} leaves nothing to train on; take less and a new --output.")
    if not index.held_out:
        raise UserError(f"held_out: a share of {share} leaves nothing held out; take more and a new --output.")
    _replace(folder / INDEX, dataclasses.asdict(index))
    (folder / DRAFT).unlink()


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other builds out of it; the system forgets the claim of a build that dies.

    Raises:
      UserError: another build is at work, or the folder cannot be written or is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(handle)
    except BlockingIOError:
        raise UserError(f"output: another build is at work in {folder}; wait for it, or give a new folder.") from None
    except OSError as error:
        raise UserError(
            f"output: {folder} cannot be written ({error.strerror or error}); finished shards stay, and the same "
            f"command goes on when there is room."
        ) from None


def _read(folder: Path) -> Draft:
    try:
        values = json.loads((folder / DRAFT).read_text(encoding="utf-8"))
        mark = values["mark"] and Mark(Place(*values["mark"]["place"]), values["mark"]["crc32"])
        return Draft(Index.parse(values["index"]), mark)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"output: {folder / DRAFT} is no draft of this version ({error}); delete the folder and build it anew."
        ) from None


def _check_same(folder: Path, before: Settings, now: Settings) -> None:
    for field in dataclasses.fields(Settings):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if old != new:
            said = {"vocab_size": "tokenizer", "bos": "bos_token"}.get(field.name, field.name)
            values = f"another {said}" if said in ("tokenizer", "bos_token") else f"{old!r}, not {new!r}"
            raise UserError(
                f"{said}: the shards in {folder} were begun with {values}; give the same or a new --output."
            )


def _replace(file: Path, values: dict) -> None:
    """Writes JSON so that the file is the old one or the new one, whatever happens."""
    new = file.with_name(f"{file.name}.new")
    with new.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(values, indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(new, file)
