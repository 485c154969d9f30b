"""From a reference set to what re-routing needs on the device, with thresholds that the references themselves set.

Each reference takes the place of an input once, its own source left out: what re-routing would have mended and broken
among them says when to abstain, and is a forecast of gain and harm before the first test.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import router_descent
from r2t2_jax import amortised as amortised_router
from r2t2_jax.decision import REROUTED, Neighbors
from r2t2_jax.neighbors import leave_one_out, median_bandwidth, weigh
from r2t2_jax.references import ReferenceSet, credit
from r2t2_jax.reroute import TILE, RerouteConfig, lead, pose, propose, verdict
from r2t2_jax.shapes import Features
from r2t2_jax.strategies import SMALLEST, STRATEGIES, Memory, Strategy, StrategyConfig, Thresholds, surrogate

FOLDS = 4  # an amortised re-router is judged on references of sources it has not seen
OPTIMISE_PROX = 0.1  # nats of loss that a nat of distance from the router's routing is worth
ALWAYS, NEVER = -np.inf, np.inf
REACH = 1e-3  # distances are square roots of rounding errors near 0


class Forecast(NamedTuple):
    """What leaving each reference out once says about re-routing. The labels were used: a forecast, not a test."""

    accuracy: float  # of the frozen model on the references
    mended: float  # share of references whose answer would become right
    broken: float  # share whose answer would become wrong
    rerouted: float  # share whose routing would change
    distances: Float[np.ndarray, "r"]  # to the nearest reference of another source; inf where there is none
    values: Float[
        np.ndarray, "r"
    ]  # the part of others' improvement, in nats, that falls to each as a neighbour; negative harms

    @property
    def gain(self) -> float:
        """Expected change of the accuracy."""
        return self.mended - self.broken


class _Trial(NamedTuple):
    """One left-out reference per row, as re-routing would have treated it."""

    gain: Float[np.ndarray, "r"]
    lead: Float[np.ndarray, "r"]
    improvement: Float[np.ndarray, "r"]  # of the loss on its own label
    right_before: Bool[np.ndarray, "r"]
    right_after: Bool[np.ndarray, "r"]

    @property
    def mended(self) -> Bool[np.ndarray, "r"]:
        return ~self.right_before & self.right_after

    @property
    def broken(self) -> Bool[np.ndarray, "r"]:
        return self.right_before & ~self.right_after


def prepare(references: ReferenceSet, config: RerouteConfig) -> tuple[Memory, Forecast]:
    """Trains what the strategy learns, calibrates the thresholds, and puts everything on the device.

    Args:
      references: what to learn from. The paper keeps the correct ones alone: references.correct_only().
      config: how inputs will be re-routed.

    Raises:
      ValueError: the references all come from one source, so that nothing can be left out.
    """
    if len(set(references.sources.tolist())) < 2:
        raise ValueError("prepare: all references come from one source; calibration needs two or more.")
    indices, cosine = leave_one_out(references.embedding, references.sources, config.neighbors.k)
    nearest = np.sqrt(np.maximum(2 - 2 * np.minimum(cosine[:, 0], 1), 0))
    if references.optimised is None:
        references = dataclasses.replace(references, optimised=optimise(references))
    memory = _memory(references, config, config.neighbors.bandwidth or median_bandwidth(cosine))
    neighbors = jax.device_get(weigh(jnp.asarray(indices), jnp.asarray(cosine), config.neighbors, memory.bandwidth))
    trial = _try(references, config, memory, neighbors)
    memory = memory._replace(thresholds=_thresholds(trial, neighbors, nearest, config))
    status = verdict(memory.thresholds, neighbors, trial.gain, trial.lead, config.guarded)
    taken = (np.asarray(status) == REROUTED) & np.isfinite(trial.improvement)
    return memory, _forecast(trial, taken, nearest, neighbors)


def _forecast(trial: _Trial, taken: Bool[np.ndarray, "r"], nearest: Float[np.ndarray, "r"], neighbors: Neighbors):
    return Forecast(
        accuracy=float(trial.right_before.mean()),
        mended=float((taken & trial.mended).mean()),
        broken=float((taken & trial.broken).mean()),
        rerouted=float(taken.mean()),
        distances=nearest,
        values=credit(neighbors.indices, neighbors.weights, np.where(taken, trial.improvement, 0), len(taken)),
    )


def optimise(references: ReferenceSet, steps: int = 20, learning_rate: float = 2.0) -> Float[np.ndarray, "r e"]:
    """Returns for each reference the routing that descent on its own label finds near the router's."""
    schedule = StrategyConfig(steps=steps, learning_rate=learning_rate).learning_rates()
    routing, _ = router_descent(
        jnp.log(jnp.maximum(references.routing, SMALLEST)),
        references.readout.weight[:, None],
        references.readout.offset[:, None],
        references.labels[:, None],
        np.ones((len(references), 1), np.float32),
        schedule,
        groups=references.groups,
        prox=OPTIMISE_PROX,
    )
    return np.asarray(routing)


def _memory(references: ReferenceSet, config: RerouteConfig, bandwidth: float) -> Memory:
    memory = Memory(
        embedding=references.embedding,
        labels=references.labels,
        routing=references.routing,
        optimised=references.optimised,
        readout=references.readout,
        amortised=_learn(references, config, np.arange(len(references))),
        bandwidth=np.float32(bandwidth),
        thresholds=Thresholds(*map(np.float32, (NEVER, ALWAYS, ALWAYS))),
    )
    return jax.tree.map(jnp.asarray, memory)


def _learn(
    references: ReferenceSet, config: RerouteConfig, rows: Int[np.ndarray, "n"]
) -> amortised_router.AmortisedRouter:
    """Returns the amortised re-router of some references; an idle one where the strategy has no use for it."""
    if not _learns(config):
        return amortised_router.untrained(references.features, references.routing.shape[1])
    return amortised_router.fit(
        references.features,
        np.log(np.maximum(references.routing, SMALLEST)),
        references.readout,
        references.labels,
        references.groups,
        config.amortised,
        rows=rows,
    )


def _learns(config: RerouteConfig) -> bool:
    return "amortised" in config.strategy


def _try(references: ReferenceSet, config: RerouteConfig, memory: Memory, neighbors: Neighbors) -> _Trial:
    """Re-routes every reference as if it were an input."""
    attempt = _attempt(config, STRATEGIES[config.strategy], references.groups)
    fold = np.unique(references.sources, return_inverse=True)[1] % FOLDS * _learns(config)
    order, found = [], []
    for i in np.unique(fold):
        seen = (
            memory._replace(amortised=_learn(references, config, np.flatnonzero(fold != i)))
            if _learns(config)
            else memory
        )
        members = np.flatnonzero(fold == i)
        for rows in np.split(members, range(TILE, len(members), TILE)):
            filled = np.resize(rows, TILE)  # repeated, so that one program serves all
            near = jax.tree.map(lambda x, rows=filled: x[rows], neighbors)
            tile = jax.device_get(attempt(seen, near, references.features[filled], filled))
            found.append(jax.tree.map(lambda x, num=len(rows): x[:num], tile))
            order.append(rows)
    back = np.argsort(np.concatenate(order))
    return jax.tree.map(lambda *tiles: np.concatenate(tiles)[back], *found)


@functools.lru_cache(maxsize=64)
def _attempt(config: RerouteConfig, strategy: Strategy, groups: tuple[int, ...]):
    """Returns the compiled function (memory, neighbors, features, rows) -> _Trial; `strategy` is but a key."""

    @jax.jit
    def attempt(memory: Memory, neighbors: Neighbors, features: Features, rows: Int[Array, "b"]) -> _Trial:
        readout, label = memory.readout.take(rows), memory.labels[rows]
        problem = pose(memory, neighbors, memory.routing[rows], features, readout, label)
        proposed = propose(problem, memory, config, groups)
        base, changed = readout(problem.routing), readout(proposed)
        loss = optax.softmax_cross_entropy_with_integer_labels
        return _Trial(
            gain=surrogate(problem, problem.routing) - surrogate(problem, proposed),
            lead=lead(base, changed),
            improvement=loss(base, label) - loss(changed, label),
            right_before=base.argmax(-1) == label,
            right_after=changed.argmax(-1) == label,
        )

    return attempt


def _thresholds(
    trial: _Trial, neighbors: Neighbors, nearest: Float[np.ndarray, "r"], config: RerouteConfig
) -> Thresholds:
    """Returns the lead and gain at which most is won, among those that break little enough for what they mend.

    Where no choice wins anything, nothing is ever changed. Far is whoever lies beyond 99 % of the references.
    """
    found = nearest[np.isfinite(nearest)]
    farthest = float(np.quantile(found, 0.99)) + REACH if found.size else 0.0
    near = (neighbors.weights.sum(-1) > 0) & (neighbors.distance[:, 0] <= farthest)
    best, chosen = 0, (NEVER, NEVER)
    for least_gain in (ALWAYS, 0.0):
        rows = np.flatnonzero(near & (trial.gain >= least_gain) & np.isfinite(trial.lead))
        rows = rows[np.argsort(-trial.lead[rows], kind="stable")]
        leads, mended, broken = trial.lead[rows], np.cumsum(trial.mended[rows]), np.cumsum(trial.broken[rows])
        whole = np.append(leads, -np.inf)[1:] < leads  # equal leads are taken together or not at all
        won = np.where(whole & (broken <= config.harm * mended), mended - broken, 0)
        if won.size and won.max() > best:
            best, chosen = won.max(), (least_gain, leads[won.argmax()])
    return Thresholds(*map(jnp.float32, (farthest, *chosen)))
