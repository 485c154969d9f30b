"""What the settings are worth: losses with bands, paired with the run's own setting, and a tolerance that is chosen."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.bench.clock import ratio
from experiments.compute.measure import LIMITS, OWN, UNIT, Effort, Heads, Texts
from experiments.curves.bands import (
    FEWEST_DOCUMENTS,
    Bands,
    Curve,
    Grid,
    contrast,
    curve,
    difference,
    log_edges,
    of_documents,
)
from experiments.curves.scores import Scores
from experiments.runs import Run


class Band(NamedTuple):
    """A mean and the band that holds it with 95 % confidence; the band is NaN where too few documents stand behind."""

    mean: float
    low: float
    high: float


class Bought(NamedTuple):
    """What a setting costs and what it gets."""

    effort: Effort
    loss: Band  # nats per token
    extra: Band  # less that of the own setting; of a baseline, too
    recall: Band  # nats per token that a second reading saves
    time: tuple[float, float, float]  # of a batch, in those of the own setting: at best, and quartiles over rounds


class Choice(NamedTuple):
    """A tolerance that was chosen on some documents, and its extra loss there and on others."""

    effort: Effort
    there: Band
    elsewhere: Band


class Measured(NamedTuple):
    """Everything the page tells."""

    run: Run
    read: Texts
    bought: list[Bought]  # the own setting first
    heads: Heads
    choice: Choice | None
    target: float  # nats per token of extra loss that may be

    def by_head(self, field: str) -> np.ndarray:
        """Returns means [l, h] of "steps" or "residual" over all tokens, under the own setting."""
        trace = self.bought[0].effort.trace
        assert trace is not None, "the first run has mesa layers"
        return trace.by_line(field).reshape(self.heads.half_life.shape)


def weigh(found: Sequence[Effort], read: Texts, bands: Bands) -> list[Bought]:
    """Returns what each setting costs and gets."""
    own = found[0]
    return [
        Bought(
            effort,
            _loss(effort, bands),
            _extra(effort, own, bands),
            _recall(effort, read.passage, bands),
            ratio(effort.timing, own.timing),
        )
        for effort in found
    ]


def choose(found: Sequence[Effort], target: float, bands: Bands) -> Choice | None:
    """Returns the loosest tolerance whose extra loss is surely at most the target, and what it costs elsewhere.

    One half of the documents chooses, by the upper end of the paired band; the other half, which had no say, tells
    what to expect. None if no tolerance that is looser than the run's own will do.
    """
    own = next(effort for effort in found if effort.way == OWN)
    halves = [np.arange(len(own.scores.names)) % 2 == side for side in (0, 1)]

    def costs(effort: Effort, side: int) -> Band:
        mine, theirs = (of_documents(one.scores, halves[side]) for one in (effort, own))
        return _only(difference(mine, theirs, _whole(own.scores), bands))

    for effort in sorted(looser(found), key=lambda effort: -effort.config.solver.tolerance):
        there = costs(effort, 0)
        if there.high <= target:
            return Choice(effort, there, costs(effort, 1))
    return None


def looser(found: Sequence[Effort]) -> list[Effort]:
    """Returns what was tried with a larger tolerance than the run's own."""
    own = next(effort for effort in found if effort.way == OWN).config.solver.tolerance
    return [effort for effort in found if effort.way == "tolerance" and effort.config.solver.tolerance > own]


def positions(measured: Measured, bands: Bands) -> dict[str, dict[str, Curve]]:
    """Returns the extra loss by position of each setting: way to label to curve."""
    own, trained = measured.bought[0].effort, measured.run.config.data.length
    grid = Grid(log_edges(measured.read.length, per_octave=1, also=(trained,)), "tokens", UNIT)
    found: dict[str, dict[str, Curve]] = {}
    for effort in (one.effort for one in measured.bought if one.effort.way in LIMITS):
        found.setdefault(effort.way, {})[effort.label] = difference(effort.scores, own.scores, grid, bands)
    return found


def _loss(effort: Effort, bands: Bands) -> Band:
    """Returns nats per token over all positions."""
    return _only(curve(effort.scores, _whole(effort.scores), bands))


def _extra(effort: Effort, own: Effort, bands: Bands) -> Band:
    """Returns the loss less that of the own setting, paired."""
    return _only(difference(effort.scores, own.scores, _whole(own.scores), bands))


def _recall(effort: Effort, passage: int, bands: Bands) -> Band:
    """Returns how many nats per token the second reading of a passage costs less than the first."""
    mean, low, high = contrast(effort.twice, Grid(np.array([0, passage, 2 * passage])), 0, 1, bands)
    few = len(effort.twice.names) < FEWEST_DOCUMENTS
    return Band(-mean, np.nan, np.nan) if few else Band(-mean, -high, -low)


def _whole(scores: Scores) -> Grid:
    return Grid(np.array([0, int(scores.position.max()) + 1]), "tokens", UNIT)


def _only(one: Curve) -> Band:
    """The single bucket of a curve."""
    return Band(float(one.mean[0]), float(one.low[0]), float(one.high[0]))
