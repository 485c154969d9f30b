"""Statistics of yes-or-no streams that hold at every moment, so that one may look after each batch and stop at will."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

# Odds of a hit over the odds at the tolerated share: the alternatives bet on, from a small rise to a collapse.
ODDS = np.geomspace(1.2, 64, 12)


class Evidence(NamedTuple):
    """That the share of hits of a stream rose above a tolerated one at some time: a test martingale.

    `value` is what a gambler has who started with 1 and bet on a rise, at odds that are fair while the share is the
    tolerated one. If given the past no trial is a hit with more than that probability, the chance that `value` ever
    reaches 1 / level is at most the level, however long the stream is and however often one looks (Ville 1939).

    A sum is over the times s at which the share might have risen, of 1 / (s (s + 1)) times the gain of bets on one
    alternative since s. These weights add up to 1, and spreading the stake over them lets a rise be seen soon even
    after a long calm: after log(t^2 / level) / KL(new share, tolerated share) trials or so (e-detectors, Shin, Ramdas
    and Rinaldo, arXiv 2203.03532, with a prior on the time, for a bound on any false alarm instead of their rate).
    """

    tolerated: float
    trials: int = 0
    value: float = 1.0
    sums: tuple[float, ...] = (0.0,) * len(ODDS)  # per alternative


def observe(evidence: Evidence, hits: Bool[np.ndarray, "n"], bar: float) -> tuple[Evidence, int | None]:
    """Returns the evidence after n more trials in their order, and which of them first brought it to the bar, if any.

    One call with many trials, or many calls with one each, give the same bit for bit.
    """
    if not len(hits):
        return evidence, None
    trials = evidence.trials + 1 + np.arange(len(hits))
    sums = bet(np.array(evidence.sums), int(trials[0]), hits, evidence.tolerated)
    value = worth(sums, trials)
    crossed = np.flatnonzero(value >= bar)
    after = Evidence(evidence.tolerated, int(trials[-1]), float(value[-1]), tuple(sums[-1].tolist()))
    return after, int(crossed[0]) if len(crossed) else None


def bet(sums: Float[np.ndarray, "*s k"], first: int, hits: Bool[np.ndarray, "n *s"], tolerated: float) -> np.ndarray:
    """Returns the sums [n, *s, k] after each of n trials, k being the alternatives and s streams of their own.

    Trials are numbered from 1, and `first` is the number of the first of these.
    """
    alternative = tolerated * ODDS / (1 - tolerated + tolerated * ODDS)
    gains = np.where(hits[..., None], alternative / tolerated, (1 - alternative) / (1 - tolerated))
    after = np.empty_like(gains)
    for i, gain in enumerate(gains):
        stake = 1 / ((first + i) * (first + i + 1))
        sums = after[i] = np.minimum((sums + stake) * gain, 1e100)  # far above any bar, far below overflow
    return after


def worth(sums: Float[np.ndarray, "n *s k"], trials: Int[np.ndarray, "n"]) -> np.ndarray:
    """Returns the gambler's fortune [n, *s]: the mean over alternatives, and the stakes kept for later times."""
    kept = 1 / (trials + 1)
    return sums.mean(-1) + kept.reshape(-1, *[1] * (sums.ndim - 2))


def last_rise(hits: Bool[np.ndarray, "n"], tolerated: float) -> int:
    """Returns how many trials ago the share most likely rose above the tolerated one: since then a bet won most."""
    trials = np.arange(1, len(hits) + 1)
    share = np.cumsum(hits[::-1]) / trials
    return int(trials[np.argmax(trials * _divergence(share, tolerated) * (share > tolerated))])


def interval(hits: int, trials: int, level: float) -> tuple[float, float]:
    """Returns an interval that at every moment, with probability at least 1 - level, covers the share of hits.

    Those shares are left out at which a gambler who bets on all others, in the proportions of Jeffreys' prior, would
    have 1 / level by now (Robbins 1970): B(hits + 1/2, misses + 1/2) / pi >= share^hits (1 - share)^misses / level.
    """
    misses = trials - hits
    mixture = math.lgamma(hits + 0.5) + math.lgamma(misses + 0.5) - math.lgamma(trials + 1) - math.log(math.pi)

    def covered(share: float) -> bool:
        likelihood = (hits * math.log(share) if hits else 0) + (misses * math.log1p(-share) if misses else 0)
        return mixture - likelihood < -math.log(level)

    centre = hits / trials if trials else 0.5
    low = _edge(covered, centre, 0.0) if hits else 0.0
    high = _edge(covered, centre, 1.0) if misses else 1.0
    return low, high


def _edge(covered, inside: float, outside: float) -> float:
    """Returns where `covered` ends, by bisection."""
    for _ in range(50):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if covered(middle) else (inside, middle)
    return outside


def largest_share(share: float, trials: int, level: float) -> float:
    """Returns the true share that may hide behind an observed one: no larger, with probability 1 - level.

    The smallest q above `share` with trials * KL(share, q) >= log(1 / level), by Chernoff's bound; 1 if there is none.
    """
    larger = np.linspace(share, 1, 10_001)[1:-1]
    enough = np.flatnonzero(trials * _divergence(share, larger) >= -math.log(level))
    return float(larger[enough[0]]) if len(enough) else 1.0


def _divergence(share, other) -> np.ndarray:
    """Returns the Kullback-Leibler divergence between yes-or-no trials; `other` is neither 0 nor 1."""
    share = np.asarray(share)
    parts = [(share, share / other), (1 - share, (1 - share) / (1 - other))]
    return np.sum([weight * np.log(np.where(ratio > 0, ratio, 1)) for weight, ratio in parts], axis=0)
