"""Rows of several sources by weight: row number n is a function of (text, config, n) and of nothing else.

So the position in the data is the step of training: any number of hosts reads any rows of it, and a run that starts
again, on other hosts or on as many, cannot lose or repeat a row.
"""

import math
import sys
import zlib
from collections.abc import Sequence
from fractions import Fraction

import grain
import numpy as np

from experiments.data.config import DataConfig
from experiments.data.windows import PackedWindows
from mesanet_jax.loss import Batch


class Turns:
    """Deals rows 0, 1, 2, ... to sources by weight; each gets its rows 0, 1, 2, ... in order, none left out.

    Of any number of first rows a source gets its share to within one row for up to three sources, to within two for up
    to twelve; where the shares of all are whole, exactly that.
    (grain.MapDataset.mix rounds the weights first, so that an epoch of it would not end with those of its sources.)
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(str(weight)) for weight in weights]  # 0.3 is three tenths, as written, not a power of two
        scale = math.lcm(*(weight.denominator for weight in exact))
        # the largest first: what is rounded there is shared by all that follow
        self._weights = sorted(((int(w * scale), i) for i, w in enumerate(exact) if w), reverse=True)
        self._num_sources = len(exact)

    def counts(self, num_rows: int) -> list[int]:
        """Returns how many of the first rows each source gets."""
        counts = [0] * self._num_sources
        rest = sum(weight for weight, _ in self._weights)
        for weight, source in self._weights:
            counts[source] = (2 * num_rows * weight + rest) // (2 * rest)  # its share of what is left, rounded
            num_rows, rest = num_rows - counts[source], rest - weight
        return counts

    def __getitem__(self, row: int) -> tuple[int, int]:
        """Returns the source of a row, and which row of that source it is."""
        pairs = zip(self.counts(row), self.counts(row + 1), strict=True)
        return next((source, before) for source, (before, after) in enumerate(pairs) if after > before)


class Windows:
    """The windows of all sources, in an order in which every stretch holds all sources in proportion to their size."""

    def __init__(self, parts: Sequence[PackedWindows]):
        self.parts = list(parts)
        self._turns = Turns([len(part) for part in parts])

    @property
    def fingerprint(self) -> int:
        """A checksum of all tokens of all sources in their order."""
        fingerprints = [part.fingerprint for part in self.parts]
        return fingerprints[0] if len(fingerprints) == 1 else zlib.crc32(repr(fingerprints).encode())

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: int) -> Batch:
        """Returns window `index` [t + 1]."""
        part, row = self._turns[range(len(self))[index]]
        return self.parts[part][row]


class _Mixed:
    """Endless rows of several endless datasets."""

    def __init__(self, datasets: Sequence[grain.MapDataset], turns: Turns):
        self._datasets, self._turns = datasets, turns

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, row: int):
        source, row = self._turns[row]
        return self._datasets[source][row]


def shuffled_rows(windows: Windows, config: DataConfig) -> grain.MapDataset:
    """Returns the endless rows [t + 1] to train on; the batch of step n is rows n * batch_size and those that follow.

    Each source goes through all its windows before it repeats any, in a new order every time.
    """
    endless = [
        grain.MapDataset.source(part).seed((config.seed + i) % 2**32).shuffle().repeat()
        for i, part in enumerate(windows.parts)
    ]
    if len(endless) == 1:
        return endless[0]
    return grain.MapDataset.source(_Mixed(endless, Turns(config.weights or [len(part) for part in windows.parts])))


def ordered_batches(windows: Windows, batch_size: int) -> grain.MapDataset:
    """Returns every window once, in order; the last Batch is filled up with padding."""

    def filled(rows: Sequence[Batch]) -> Batch:
        nothing = Batch(np.zeros_like(rows[0].tokens), np.full_like(rows[0].segment_ids, -1))
        return stack([*rows, *[nothing] * (batch_size - len(rows))])

    return grain.MapDataset.source(windows).batch(batch_size, batch_fn=filled)


def stack(rows: Sequence[Batch]) -> Batch:
    """Returns rows [t + 1] as one Batch [b, t + 1]."""
    return Batch(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))
