"""Tokenised text in a folder: Arrow files that are mapped into memory and never read whole, and an index of them.

    train-00000.arrow      a row per document: name, and tokens with BOS first
    held-out-00000.arrow   the same for what is held out, with the text and the bytes that each token stands for
    tokenizer.json         the tokenizer they were made with, unless that is bytes
    index.json             what they were made of and a digest of each; written last, so it vouches for the rest

Any tool that reads Arrow reads them, `datasets.load_dataset("arrow", data_files=...)` for one.
"""

import bisect
import dataclasses
import itertools
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from experiments.cli import UserError
from experiments.data.config import DataConfig
from experiments.data.encoding import Document, document_of
from experiments.data.windows import PackedWindows, Piece
from experiments.tokenizers import Tokenizer

VERSION = 1
INDEX, DRAFT, TOKENIZER = "index.json", "index.draft", "tokenizer.json"
SAMPLE = (
    "def f(x):  return x+1\n\tSome WORDS, naïve cafe\u0301 – 漢字 مرحبا 🙂 1234567890 don't https://a.org/b?c=d\r\n"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the content of shards is a function of, beside the text itself."""

    source: str
    subset: str
    split: str
    text_field: str
    held_out: float
    shard_tokens: int
    tokenizer: int  # a checksum of what it does
    vocab_size: int
    bos: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One file as it was when it was finished."""

    file: str
    documents: int
    tokens: int
    size: int
    xxh3_128: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """What is in a folder of shards."""

    version: int = VERSION
    settings: Settings
    train: tuple[Shard, ...] = ()
    held_out: tuple[Shard, ...] = ()

    @classmethod
    def parse(cls, values: dict[str, Any]) -> "Index":
        """Turns what JSON gives back into it."""
        if values["version"] != VERSION:
            raise ValueError(f"version {values['version']}, this is {VERSION}")
        train, held_out = (tuple(Shard(**shard) for shard in values[part]) for part in ("train", "held_out"))
        return cls(settings=Settings(**values["settings"]), train=train, held_out=held_out)


def is_sharded(source: str) -> bool:
    """True for a folder of shards, finished or not."""
    folder = Path(source)
    return (folder / DRAFT).is_file() or ((folder / INDEX).is_file() and any(folder.glob("train-*.arrow")))


def read_index(folder: Path) -> Index:
    """Returns the index of finished shards.

    Raises:
      UserError: they are not finished, or the index is damaged.
    """
    if not (folder / INDEX).is_file():
        if (folder / DRAFT).is_file():
            raise UserError(f"shards: those in {folder} are not finished; start the command that builds them again.")
        raise UserError(f"shards: {folder} holds none; build them with python -m experiments.data build.")
    try:
        return Index.parse(json.loads((folder / INDEX).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"shards: {folder / INDEX} is no index of this version ({error}); build it anew.") from None


def signature(tokenizer: Tokenizer) -> int:
    """Returns a checksum of what a tokenizer does: how it cuts a sample of many kinds of text, and all its tokens."""
    cut = zlib.crc32(tokenizer.encode(SAMPLE).tobytes())
    tokens = "\0".join(tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
    return zlib.crc32(tokens.encode("utf-8", "surrogatepass"), cut)


def digest(file: Path) -> str:
    """Returns the XXH3 of a file's bytes, which takes some seconds for 10 GB."""
    state = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def write_shard(folder: Path, file: str, documents: Sequence[Document], texts: Sequence[str], vocab_size: int) -> Shard:
    """Writes documents as one file, under another name until it is whole; with their texts, if these are given."""
    lengths = [len(document.tokens) for document in documents]
    offsets = pa.array(np.cumsum([0, *lengths]), pa.int64())
    columns = {
        "name": pa.array([_storable(document.name) for document in documents], pa.large_string()),
        "tokens": _lists(offsets, [document.tokens for document in documents], token_type(vocab_size)),
    }
    if texts:
        columns["token_bytes"] = _lists(offsets, [document.token_bytes for document in documents], np.int32)
        columns["text"] = pa.array([_storable(text) for text in texts], pa.large_string())
    draft = folder / f"{file}.draft"
    _write(draft, pa.record_batch(columns))
    shard = Shard(
        file=file, documents=len(lengths), tokens=sum(lengths), size=draft.stat().st_size, xxh3_128=digest(draft)
    )
    os.replace(draft, folder / file)
    return shard


def token_type(vocab_size: int) -> type:
    """The narrowest type that holds every token."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


@dataclasses.dataclass(frozen=True)
class Shards:
    """A folder of shards whose files are there."""

    folder: Path
    index: Index

    def windows(self, tokenizer: Tokenizer, length: int, *, held_out: bool) -> PackedWindows:
        """Returns windows of the documents in the order they lie in.

        Raises:
          UserError: a file is damaged, or the tokenizer is not the one they were made with.
        """
        if not made_with(self.index.settings, tokenizer):
            own = self.folder / TOKENIZER
            remedy = f"pass --data.tokenizer {own}" if own.is_file() else "leave --data.tokenizer empty"
            raise UserError(f"data.tokenizer: {self.folder} holds tokens of another tokenizer or BOS; {remedy}.")
        files = self.index.held_out if held_out else self.index.train
        digests = "".join(shard.xxh3_128 for shard in files)
        return PackedWindows([_piece(self._map(shard)) for shard in files], length, zlib.crc32(digests.encode()))

    def documents(self, tokenizer: Tokenizer) -> Sequence[Document]:
        """Returns the held-out documents in the order they lie in; each is read when it is asked for.

        Another tokenizer than that of the shards cuts their texts anew, so that models of different tokenizers can be
        compared.
        """
        batches = [self._map(shard) for shard in self.index.held_out]
        return _HeldOut(batches, None if made_with(self.index.settings, tokenizer) else tokenizer)

    def _map(self, shard: Shard) -> pa.RecordBatch:
        """Maps a file into memory."""
        path = self.folder / shard.file
        check_size(path, shard)
        try:
            return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, str(error)) from None


class _HeldOut(Sequence[Document]):
    """Documents of mapped files."""

    def __init__(self, batches: Sequence[pa.RecordBatch], tokenizer: Tokenizer | None):
        self._batches, self._tokenizer = batches, tokenizer
        self._pieces = [_piece(batch) for batch in batches]
        self._token_bytes = [_piece(batch, "token_bytes").tokens for batch in batches]
        self._ends = list(itertools.accumulate(batch.num_rows for batch in batches))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Document:  # pyright: ignore[reportIncompatibleMethodOverride]
        index = range(len(self))[index]
        file = bisect.bisect_right(self._ends, index)
        row = index - [0, *self._ends][file]
        name, text = (self._batches[file].column(column)[row] for column in ("name", "text"))
        name = name.as_py()
        if self._tokenizer is not None:
            return document_of(name, text.as_py(), self._tokenizer)
        tokens, starts = self._pieces[file]
        here = slice(starts[row], starts[row + 1])
        return Document(name, tokens[here].astype(np.int32), self._token_bytes[file][here])


def open_shards(source: str, config: DataConfig) -> Shards:
    """Opens a folder of shards; reads their index alone.

    Raises:
      UserError: they are damaged or not finished, or hold out another share.
    """
    index = read_index(Path(source))
    if index.settings.held_out != config.held_out:
        raise UserError(
            f"data.held_out: {source} holds out {index.settings.held_out}, not {config.held_out}; "
            f"pass --data.held-out {index.settings.held_out}."
        )
    return Shards(Path(source), index)


def made_with(settings: Settings, tokenizer: Tokenizer) -> bool:
    """True for the tokenizer that shards were made with."""
    ours = (tokenizer.vocab_size, tokenizer.bos, signature(tokenizer))
    return ours == (settings.vocab_size, settings.bos, settings.tokenizer)


def check_size(path: Path, shard: Shard) -> None:
    """Refuses a file that is not there or is longer or shorter than it was."""
    size = path.stat().st_size if path.is_file() else None
    if size != shard.size:
        found = "is missing" if size is None else f"has {size:,} bytes, not {shard.size:,}"
        raise _damaged(path, found)


def check_digest(path: Path, shard: Shard) -> None:
    """Refuses a file of which any bit has changed."""
    check_size(path, shard)
    if digest(path) != shard.xxh3_128:
        raise _damaged(path, "its digest differs from the index")


def _damaged(path: Path, how: str) -> UserError:
    return UserError(f"shards: {path} is damaged ({how}); bring it back, or delete its folder and build it anew.")


def _piece(batch: pa.RecordBatch, column: str = "tokens") -> Piece:
    """Views of a column of lists, without a copy."""
    lists = batch.column(column)
    return Piece(lists.values.to_numpy(zero_copy_only=True), lists.offsets.to_numpy(zero_copy_only=True))


def _lists(offsets: pa.Array, rows: Sequence[np.ndarray], dtype: type) -> pa.Array:
    values = np.concatenate(rows, dtype=dtype, casting="unsafe")
    return pa.LargeListArray.from_arrays(offsets, pa.array(values))


def _write(file: Path, batch: pa.RecordBatch) -> None:
    """Returns when it is on disk, not before."""
    with file.open("wb") as stream:
        with pa.ipc.new_file(stream, batch.schema) as writer:
            writer.write_batch(batch)
        stream.flush()
        os.fsync(stream.fileno())


def _storable(name: str) -> str:
    """Names of files may hold what is not UTF-8, and Arrow holds nothing else."""
    return name.encode("utf-8", "backslashreplace").decode()
