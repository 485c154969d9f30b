"""Texts to documents of tokens, many at once, in the order they come."""

import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from experiments.data.texts import Text
from experiments.tokenizers import Tokenizer

BATCH_CHARACTERS = 4 << 20  # enough to keep many cores busy, little enough to hold
Item = TypeVar("Item")


class Document(NamedTuple):
    """A text as tokens, BOS first."""

    name: str
    tokens: np.ndarray  # [t] int32
    token_bytes: np.ndarray  # [t] int32, bytes of text each token stands for, 0 for BOS


def is_held_out(name: str, share: float) -> bool:
    """True for the documents whose name hashes into the held-out share; independent of all other documents."""
    return zlib.crc32(name.encode("utf-8", "surrogatepass")) < share * 2**32


def tokens_of(texts: Iterable[Text], tokenizer: Tokenizer) -> Iterator[tuple[Text, np.ndarray]]:
    """Yields every text with its tokens [t] int32, BOS first."""
    for batch in ahead(batches(texts)):
        yield from zip(batch, encode_all([text.text for text in batch], tokenizer), strict=True)


def encode_all(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Returns the tokens [t] int32 of each text, BOS first."""
    return [np.append(np.int32(tokenizer.bos), ids) for ids in tokenizer.encode_many(texts)]


def document_of(name: str, text: str, tokenizer: Tokenizer) -> Document:
    """Returns a document with the bytes that its tokens stand for."""
    ids, num_bytes = tokenizer.encode_with_bytes(text)
    return Document(name, np.append(np.int32(tokenizer.bos), ids), np.append(np.int32(0), num_bytes))


def batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Yields texts in lists of about BATCH_CHARACTERS."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yields the items, the next one being made in a thread while one is used."""
    iterator = iter(items)
    with ThreadPoolExecutor(1, "reader") as reader:

        def read() -> Future[list[Item]]:
            return reader.submit(lambda: list(itertools.islice(iterator, 1)))

        due = read()
        while item := due.result():
            due = read()
            yield from item
