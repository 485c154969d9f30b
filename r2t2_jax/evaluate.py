"""Gain and harm of re-routing on labelled inputs, paired input by input, and how much room an oracle leaves."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from r2t2_jax.shapes import Readout


class Paired(NamedTuple):
    """The same inputs answered before and after."""

    before: Bool[np.ndarray, "n"]  # right or not
    after: Bool[np.ndarray, "n"]

    @property
    def fixed(self) -> float:
        """Share of all inputs that was wrong and is right."""
        return float((~self.before & self.after).mean())

    @property
    def broken(self) -> float:
        """Share of all inputs that was right and is wrong."""
        return float((self.before & ~self.after).mean())

    @property
    def gain(self) -> float:
        """Change of the accuracy."""
        return self.fixed - self.broken


def pool(parts: Sequence[Paired]) -> Paired:
    """Returns several tests as one."""
    return Paired(*(np.concatenate(side) for side in zip(*parts, strict=True)))


def interval(paired: Paired, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Returns a bootstrap interval of the gain: inputs are drawn anew, before and after together."""
    change = paired.after.astype(int) - paired.before
    counts = np.array([(change == value).sum() for value in (-1, 0, 1)])
    drawn = np.random.default_rng(seed).multinomial(len(change), counts / len(change), size=resamples)
    low, high = np.quantile((drawn[:, 2] - drawn[:, 0]) / len(change), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mcnemar(paired: Paired) -> float:
    """Returns the exact two-sided p-value that fixing and breaking are equally likely (McNemar 1947)."""
    fixed = int((~paired.before & paired.after).sum())
    total = fixed + int((paired.before & ~paired.after).sum())
    if not total:
        return 1.0
    tail = [math.lgamma(total + 1) - math.lgamma(i + 1) - math.lgamma(total - i + 1) for i in range(total + 1)]
    least = min(fixed, total - fixed)
    return min(1.0, 2 * sum(math.exp(x - total * math.log(2)) for x in tail[: least + 1]))


def recovered(method: Paired, oracle: Paired) -> float:
    """Returns the share of the oracle's gain that a method reaches; NaN where the oracle gains nothing."""
    return method.gain / oracle.gain if oracle.gain > 0 else math.nan


def wrong_labels(labels: Int[np.ndarray, "n"], kinds: list[list[int]], seed: int) -> Int[np.ndarray, "n"]:
    """Returns a random wrong label of the same kind for each input: what the null oracle is asked to reach.

    Args:
      labels: right answers.
      kinds: groups of answers that could stand for one another; every label is in one of them, with another beside it.
      seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    others = {label: [other for other in kind if other != label] for kind in kinds for label in kind}
    return np.array([rng.choice(others[int(label)]) for label in labels], np.int32)


def simplex_grid(num_experts: int, parts: int) -> Float[np.ndarray, "n e"]:
    """Returns all routings whose weights are multiples of 1 / parts."""
    bars = itertools.combinations(range(parts + num_experts - 1), num_experts - 1)
    edges = np.array([(-1, *bar, parts + num_experts - 1) for bar in bars])
    return ((np.diff(edges, axis=1) - 1) / parts).astype(np.float32)


def reachable(
    readout: Readout, groups: tuple[int, ...], labels: Int[np.ndarray, "n"], parts: int = 6
) -> Bool[np.ndarray, "n"]:
    """Returns which labels some routing of a grid answers: the existence oracle, for exact read-outs."""
    grids = [simplex_grid(size, parts) for size in groups]
    grid = jnp.asarray([np.concatenate(rows) for rows in itertools.product(*grids)])

    @jax.jit
    def search(readout, label):
        answers = jax.lax.map(lambda routing: readout(routing[None]).argmax(-1), grid)
        return (answers == label).any(0)

    return np.asarray(search(jax.tree.map(jnp.asarray, readout), jnp.asarray(labels)))
