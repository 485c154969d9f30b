"""The text of a run: what is trained on, and what is held out of it."""

import bisect
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from experiments.cli import UserError
from experiments.data import shards
from experiments.data.config import DataConfig, Origin
from experiments.data.encoding import Document, document_of, is_held_out, tokens_of
from experiments.data.mixture import Windows
from experiments.data.texts import Text, read_texts
from experiments.data.windows import PackedWindows
from experiments.tokenizers import Tokenizer


def training_text(config: DataConfig, tokenizer: Tokenizer) -> Windows:
    """Opens shards, reads and tokenises what is none.

    Raises:
      UserError: the text cannot be read, there is none, or shards are damaged or were made otherwise.
    """
    return Windows([_windows(config, origin, tokenizer, held_out=False) for origin in config.origins])


def held_out_text(config: DataConfig, tokenizer: Tokenizer) -> Windows:
    """The same for what is held out."""
    return Windows([_windows(config, origin, tokenizer, held_out=True) for origin in config.origins])


def held_out_documents(config: DataConfig, tokenizer: Tokenizer) -> Sequence[Document]:
    """Returns the held-out documents: those of a source in the order of their names, those of shards as they lie there.

    The names of several sources' documents begin with the source, so that no two are the same.

    Raises:
      UserError: there are none.
    """
    found = [_documents(config, origin, tokenizer) for origin in config.origins]
    return found[0] if len(found) == 1 else _Chained(config.source, found)


class _Chained(Sequence[Document]):
    """The documents of one source after those of another."""

    def __init__(self, sources: Sequence[str], parts: Sequence[Sequence[Document]]):
        self._sources, self._parts = sources, parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Document:  # pyright: ignore[reportIncompatibleMethodOverride]
        index = range(len(self))[index]
        part = bisect.bisect_right(self._ends, index)
        document = self._parts[part][index - ([0, *self._ends][part])]
        return document._replace(name=f"{self._sources[part]}/{document.name}")


def _windows(config: DataConfig, origin: Origin, tokenizer: Tokenizer, *, held_out: bool) -> PackedWindows:
    if shards.is_sharded(origin.source):
        return shards.open_shards(origin.source, config).windows(tokenizer, config.length, held_out=held_out)
    texts = _texts(config, origin, held_out=held_out)
    found = sorted(((text.name, tokens) for text, tokens in tokens_of(texts, tokenizer)), key=lambda pair: pair[0])
    if not found:
        raise _nothing(config, origin, held_out)
    order = np.random.default_rng(config.seed).permutation(len(found))
    return PackedWindows.of([found[i][1] for i in order], config.length)


def _documents(config: DataConfig, origin: Origin, tokenizer: Tokenizer) -> Sequence[Document]:
    if shards.is_sharded(origin.source):
        return shards.open_shards(origin.source, config).documents(tokenizer)
    texts = sorted(_texts(config, origin, held_out=True), key=lambda text: text.name)
    if not texts:
        raise _nothing(config, origin, held_out=True)
    return [document_of(text.name, text.text, tokenizer) for text in texts]


def _texts(config: DataConfig, origin: Origin, *, held_out: bool) -> Iterator[Text]:
    return (text for text in read_texts(origin) if is_held_out(text.name, config.held_out) == held_out)


def _nothing(config: DataConfig, origin: Origin, held_out: bool) -> UserError:
    if held_out:
        return UserError(
            f"data.held_out: a share of {config.held_out} leaves no held-out text of {origin.source}; take more."
        )
    return UserError(
        f"data.source: {origin.source} leaves no text to train on with held_out={config.held_out}; name another text."
    )
