"""Documents laid end to end and cut into windows of one length, from memory or from a file that is only mapped."""

import bisect
import itertools
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mesanet_jax.loss import Batch


class Piece(NamedTuple):
    """A stretch of whole documents; slices of the arrays are read, never all of them at once."""

    tokens: np.ndarray  # [t] of any integer type, each document with BOS first
    starts: np.ndarray  # [documents + 1], where each document begins; the last is t


class PackedWindows:
    """Windows [t + 1] of documents laid end to end, each after BOS; grain reads them by index, from any thread."""

    def __init__(self, pieces: Sequence[Piece], length: int, fingerprint: int):
        """Cuts the pieces, in the given order, into windows of `length` targets."""
        self._pieces = list(pieces)
        self._ends = list(itertools.accumulate(len(piece.tokens) for piece in pieces))
        self._length = length
        self.fingerprint = fingerprint  # a checksum of all tokens in their order

    @classmethod
    def of(cls, documents: Sequence[np.ndarray], length: int) -> "PackedWindows":
        """Lays documents that are in memory, each starting with BOS, end to end in the given order."""
        tokens = np.concatenate(documents)
        piece = Piece(tokens, np.cumsum([0, *(len(document) for document in documents)]))
        return cls([piece], length, zlib.crc32(tokens.tobytes()))

    def __len__(self) -> int:
        """Number of windows; each has `length` targets, the last one perhaps fewer."""
        return max(1, -(-(self._ends[-1] - 1) // self._length))

    def __getitem__(self, index: int) -> Batch:
        """Returns window `index` with document numbers from 0; a short last window is padded with id -1."""
        index = range(len(self))[index]
        width = self._length + 1
        window = Batch(np.zeros(width, np.int32), np.full(width, -1, np.int32))
        number = bisect.bisect_right(self._ends, index * self._length)
        begin = index * self._length - (self._ends[number - 1] if number else 0)
        filled = documents = 0
        while filled < width and number < len(self._pieces):
            tokens, ids = _cut(self._pieces[number], begin, width - filled)
            window.tokens[filled : filled + len(tokens)] = tokens
            window.segment_ids[filled : filled + len(tokens)] = ids + documents
            filled, documents = filled + len(tokens), documents + ids[-1] + 1
            number, begin = number + 1, 0
        return window


def _cut(piece: Piece, begin: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns up to `length` tokens from `begin` on, and the numbers of their documents from 0."""
    tokens = piece.tokens[begin : begin + length]
    first = np.searchsorted(piece.starts, begin, side="right")
    last = np.searchsorted(piece.starts, begin + len(tokens), side="left")
    starts_here = np.zeros(len(tokens), np.int32)
    starts_here[piece.starts[first:last] - begin] = 1
    return tokens, np.cumsum(starts_here, dtype=np.int32)
