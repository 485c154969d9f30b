"""What predictions are worth, and how far that may lie from what other test sequences would say."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.synthetic.examples import IGNORED

CONFIDENCE, RESAMPLES = 0.95, 1000


class Tally(NamedTuple):
    """How often each id was due, was said where one was due, and was both, in each sequence [n, y]."""

    due: np.ndarray
    said: np.ndarray
    right: np.ndarray


class Score(NamedTuple):
    """An accuracy, and half the width of the interval that 95 % of resamples of the sequences lie in."""

    mean: float
    half: float


def tally(predictions: np.ndarray, targets: np.ndarray, num_ids: int) -> Tally:
    """Counts predictions [n, t] where the targets [n, t] are not IGNORED."""
    rows, places = np.nonzero(targets != IGNORED)
    due, said = targets[rows, places], predictions[rows, places]

    def count(ids: np.ndarray, of: np.ndarray) -> np.ndarray:
        counts = np.zeros((len(targets), num_ids), np.float32)
        np.add.at(counts, (rows[of], ids[of]), 1)
        return counts

    everywhere = np.ones(len(due), bool)
    return Tally(count(due, everywhere), count(said, everywhere), count(due, due == said))


def accuracy(counts: Tally, weights: np.ndarray | None = None) -> np.ndarray:
    """Returns the share of right answers: of each id by itself, then the mean over ids that were due or said.

    So MAD counts (torchmetrics' MulticlassAccuracy as it comes): an id that was said but never due counts as 0.

    Args:
      counts: of n sequences.
      weights: how often each sequence counts [..., n]; None counts all once.

    Returns:
      [...].
    """
    weights = np.ones(len(counts.due), np.float32) if weights is None else weights
    due, said, right = (weights @ x for x in counts)
    counted = due + said > 0
    shares = np.where(counted, right / np.maximum(due, 1), 0)
    return np.sum(shares, axis=-1) / np.maximum(np.sum(counted, axis=-1), 1)


def score(counts: Tally, seed: int = 0) -> Score:
    """Returns the accuracy and its interval over the draw of the sequences."""
    number = len(counts.due)
    weights = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), RESAMPLES)
    edges = np.quantile(accuracy(counts, weights.astype(np.float32)), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Score(float(accuracy(counts)), float(edges[1] - edges[0]) / 2)


def mean(scores: Sequence[Score]) -> Score:
    """Returns the mean of scores of different test sequences."""
    return Score(
        float(np.mean([x.mean for x in scores])), float(np.linalg.norm([x.half for x in scores])) / len(scores)
    )


def grouped(entries: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> dict[tuple, Score]:
    """Returns the mean score of entries of a sweep whose cells have the same values of these fields."""
    groups: dict[tuple, list[Score]] = {}
    for entry in entries:
        place = tuple(entry["cell"][field] for field in fields)
        groups.setdefault(place, []).append(Score(entry["mean"], entry["half"]))
    # seeds share their test sequences, so more of them make its draw no surer
    return {place: Score(mean(found).mean, float(np.mean([x.half for x in found]))) for place, found in groups.items()}
