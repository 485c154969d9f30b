"""From rows to curves: log-spaced buckets of position, means, bootstrap bands, and paired differences of two runs.

A bucket's mean pools its tokens: the sum of their losses over the number of tokens (or of bytes), so a document counts
by its share of the bucket. Tokens of one document are not independent, so the bands resample documents: every resample
draws as many documents as there are, with replacement, and takes the ratio of its sums; the band spans the percentiles
of these ratios. A bucket with fewer than FEWEST_DOCUMENTS has no band.
"""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.curves.scores import Scores

# The span of all resamples of n means holds the truth with probability 1 - 2^(1-n) at most: 95 % needs six.
FEWEST_DOCUMENTS = 6
UNITS = {"nats per token": 1.0, "bits per byte": float(np.log(2))}


class Grid(NamedTuple):
    """Which buckets, along which axis, in which unit."""

    edges: np.ndarray  # [buckets + 1] int, bucket i holds edges[i] <= place < edges[i + 1]
    axis: str = "tokens"  # a prediction's place: its position in "tokens", or the "bytes" of text before it
    unit: str = "nats per token"  # or "bits per byte", which compares tokenizers


class Bands(NamedTuple):
    """How the band is drawn from the documents."""

    num_resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0
    simultaneous: bool = False  # whether the confidence is that of each bucket, or of all buckets at once


class Curve(NamedTuple):
    """One value and its band per bucket; or, of a difference, the first run's minus the second's."""

    grid: Grid
    mean: np.ndarray  # [buckets], NaN where nothing was scored
    low: np.ndarray  # [buckets], NaN where fewer than FEWEST_DOCUMENTS were
    high: np.ndarray  # [buckets]
    num_documents: np.ndarray  # [buckets] int
    num_tokens: np.ndarray  # [buckets] int


def log_edges(length: int, *, per_octave: int = 2, also: tuple[int, ...] = ()) -> np.ndarray:
    """Edges of buckets that split positions 0..length-1 into equal ratios, and wherever `also` says."""
    if length < 1 or per_octave < 1:
        raise ValueError(f"length and per_octave must be at least 1, but are {length} and {per_octave}")
    powers = np.arange(np.log2(length) * per_octave - 0.4) / per_octave  # the last bucket is half as wide at least
    edges = np.concatenate([[0], np.rint(2**powers), also, [length]]).astype(np.int64)
    return np.unique(edges[(edges >= 0) & (edges <= length)])


def curve(scores: Scores, grid: Grid, bands: Bands = Bands()) -> Curve:
    """The mean of each bucket with its bootstrap band."""
    losses, weights, tokens = cells(scores, grid)
    draws = _resamples(len(scores.names), bands)
    return _curve(grid, bands, _ratio(losses.sum(0), weights.sum(0)), _sampled(draws, losses, weights), tokens)


def difference(first: Scores, second: Scores, grid: Grid, bands: Bands = Bands()) -> Curve:
    """First minus second on the same text, each resample drawing the same documents of both (a paired band).

    Raises:
      ValueError: the two were scored on different tokens, or, along bytes, on different documents.
    """
    first, second = paired(first, second, grid.axis)
    draws = _resamples(len(first.names), bands)
    (losses, weights, tokens), (losses2, weights2, tokens2) = cells(first, grid), cells(second, grid)
    mean = _ratio(losses.sum(0), weights.sum(0)) - _ratio(losses2.sum(0), weights2.sum(0))
    sampled = _sampled(draws, losses, weights) - _sampled(draws, losses2, weights2)
    return _curve(grid, bands, mean, sampled, np.minimum(tokens, tokens2))


def contrast(
    scores: Scores, grid: Grid, earlier: int, later: int, bands: Bands = Bands()
) -> tuple[float, float, float]:
    """Bucket `later` minus bucket `earlier` of the same documents: (mean, low, high)."""
    losses, weights, _ = cells(scores, grid)
    mean = _ratio(losses.sum(0), weights.sum(0))
    draws = _resamples(len(scores.names), bands)
    sampled = _sampled(draws, losses, weights)
    tail = 50 * (1 - bands.confidence)
    low, high = np.nanpercentile(sampled[:, later] - sampled[:, earlier], [tail, 100 - tail])
    return float(mean[later] - mean[earlier]), float(low), float(high)


def cells(scores: Scores, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums over the rows of each [document, bucket]: of the losses, of what they are divided by, and their number."""
    if grid.unit not in UNITS or grid.axis not in ("tokens", "bytes"):
        raise ValueError(f"unit is one of {list(UNITS)} and axis tokens or bytes, not {grid.unit!r} and {grid.axis!r}")
    place = scores.position if grid.axis == "tokens" else scores.bytes_before
    shape = len(scores.names), len(grid.edges) - 1
    bucket = np.searchsorted(grid.edges, place, side="right") - 1
    if len(place) and not 0 <= bucket.min() <= bucket.max() < shape[1]:
        raise ValueError(f"edges must hold every scored place, 0 to {place.max()}, but end at {grid.edges[-1]}")

    def total(weights=None):
        flat = np.bincount(scores.document * shape[1] + bucket, weights, minlength=shape[0] * shape[1])
        return flat.reshape(shape)

    tokens = total()
    weights = tokens.astype(np.float64) if grid.unit == "nats per token" else total(scores.num_bytes)
    return total(scores.nll) / UNITS[grid.unit], weights, tokens


def paired(first: Scores, second: Scores, axis: str = "tokens") -> tuple[Scores, Scores]:
    """The two, checked to be about the same text; along bytes, cut to what both have scored of each document."""
    if not np.array_equal(first.names, second.names):
        lone = sorted(set(first.names.tolist()) ^ set(second.names.tolist()))[0]
        raise ValueError(f"the runs were scored on different documents: only one has {lone!r}; score both on the same")
    if axis == "bytes":
        first, second = shared_text(first, second)
        return first, second
    for name in ("document", "position", "target"):
        ours, theirs = getattr(first, name), getattr(second, name)
        if not np.array_equal(ours, theirs):
            raise ValueError(_how_they_differ(first, second))
    return first, second


def shared_text(*scores: Scores) -> list[Scores]:
    """Each cut at the last place of every document where all of them have scored what comes before, byte for byte."""
    cut = list(scores)
    while True:
        each = [_covered_bytes(one) for one in cut]
        covered = np.min(each, axis=0)
        if all(np.array_equal(one, covered) for one in each):
            return cut
        cut = [keep(one, one.bytes_before + one.num_bytes <= covered[one.document]) for one in cut]


def reaching(scores: Scores, place: int, axis: str = "tokens") -> Scores:
    """All rows of the documents that have one at `place` or further."""
    furthest = np.zeros(len(scores.names), np.int64)
    np.maximum.at(furthest, scores.document, scores.position if axis == "tokens" else scores.bytes_before)
    return of_documents(scores, furthest >= place)


def of_documents(scores: Scores, chosen: np.ndarray) -> Scores:
    """All rows of the documents of a mask [documents]."""
    kept = keep(scores, chosen[scores.document])
    return kept._replace(names=scores.names[chosen], document=(np.cumsum(chosen) - 1)[kept.document].astype(np.int32))


def keep(scores: Scores, rows: np.ndarray) -> Scores:
    """The rows of a mask [r]; a document that loses all of them stays in the names."""
    names, *columns = scores
    return Scores(names, *(column[rows] for column in columns))


def save_curves(curves: dict[str, Curve], path: Path | str) -> None:
    """Writes the numbers behind a figure as CSV, a row per curve and bucket."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["curve", "unit", "axis", "start", "stop", "mean", "low", "high", "num_documents", "num_tokens"]
        )
        for name, (grid, *columns) in curves.items():
            numbers = zip(
                grid.edges[:-1].tolist(), grid.edges[1:].tolist(), *(c.tolist() for c in columns), strict=True
            )
            writer.writerows([name, grid.unit, grid.axis, *row] for row in numbers)


def _resamples(num_documents: int, bands: Bands) -> np.ndarray:
    """How often each resample draws each document, [resamples, documents]."""
    rng = np.random.default_rng(bands.seed)
    return rng.multinomial(num_documents, np.full(num_documents, 1 / num_documents), bands.num_resamples).astype(float)


def _sampled(draws: np.ndarray, losses: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The ratio in each resample; an infinite loss makes its bucket NaN."""
    with np.errstate(invalid="ignore"):
        return _ratio(draws @ losses, draws @ weights)


def _ratio(losses: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.divide(losses, weights, out=np.full(np.shape(losses), np.nan), where=weights > 0)


def _curve(grid: Grid, bands: Bands, mean: np.ndarray, sampled: np.ndarray, tokens: np.ndarray) -> Curve:
    """Takes the percentiles of sampled [resamples, buckets] where enough documents stand behind them."""
    num_documents = np.count_nonzero(tokens, axis=0)
    low, high = np.full((2, len(mean)), np.nan)
    banded = (num_documents >= FEWEST_DOCUMENTS) & np.isfinite(mean)
    if banded.any():
        low[banded], high[banded] = _band(mean[banded], sampled[:, banded], bands)
    return Curve(grid, mean, low, high, num_documents, tokens.sum(axis=0))


def _band(mean: np.ndarray, sampled: np.ndarray, bands: Bands) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles bucket by bucket; or, for all buckets at once, as many standard errors as the farthest one strays."""
    tail = 50 * (1 - bands.confidence)
    if not bands.simultaneous:
        return tuple(np.nanpercentile(sampled, [tail, 100 - tail], axis=0))
    error = np.nanstd(sampled, axis=0)
    strays = np.abs(sampled - mean) / np.where(error > 0, error, 1)
    reach = np.percentile(np.nanmax(strays, axis=1), 100 * bands.confidence)
    return mean - reach * error, mean + reach * error


def _covered_bytes(scores: Scores) -> np.ndarray:
    covered = np.zeros(len(scores.names), np.int64)
    np.maximum.at(covered, scores.document, scores.bytes_before + scores.num_bytes)
    return covered


def _how_they_differ(first: Scores, second: Scores) -> str:
    """One sentence about the first row that is not the same."""
    shared = min(len(first.nll), len(second.nll))
    columns = ("document", "position", "target")
    same = np.logical_and.reduce([getattr(first, c)[:shared] == getattr(second, c)[:shared] for c in columns])
    row = int(np.argmin(same)) if not same.all() else shared
    longer = first if len(first.nll) > row else second
    where = f"at position {longer.position[row]} of document {str(longer.names[longer.document[row]])!r}"
    return (
        f"the runs were scored on different tokens, first {where}; score both with the same tokenizer and length, "
        "or compare them in bits per byte along bytes"
    )
