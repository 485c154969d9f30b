"""Re-routing on one page: look at the input, find neighbours, ask a strategy, decide, answer.

Every input is decided by itself: nothing is kept from one to the next, and who else is in the batch changes no bit.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from r2t2_jax import decision
from r2t2_jax.amortised import AmortisedConfig
from r2t2_jax.decision import Decisions, Neighbors
from r2t2_jax.embedders import Embedder
from r2t2_jax.linearise import linearised
from r2t2_jax.models.contract import FrozenModel, Inputs, Params
from r2t2_jax.neighbors import NeighborConfig, nearest, weigh
from r2t2_jax.shapes import Embedding, Features, Labels, Logits, Readout, Routing
from r2t2_jax.strategies import STRATEGIES, Memory, Problem, Strategy, StrategyConfig, Thresholds, draw_back, surrogate

TILE = 256  # inputs are always decided so many at a time, so that replaying one of them repeats every bit


@dataclasses.dataclass(frozen=True, kw_only=True)
class RerouteConfig:
    """How inputs are re-routed.

    Attributes:
      strategy: a key of STRATEGIES.
      neighbors: who counts as a neighbour.
      settings: of the strategy.
      amortised: how the amortised re-router learns, where the strategy has one.
      guarded: abstain where the thresholds say so; without, every finite proposal is taken.
      harm: calibration allows so many answers broken per answer mended.

    Raises:
      ValueError: a strategy is unknown, or harm is out of range.
    """

    strategy: str = "descent"
    neighbors: NeighborConfig = NeighborConfig()
    settings: StrategyConfig = StrategyConfig()
    amortised: AmortisedConfig = AmortisedConfig()
    guarded: bool = True
    harm: float = 1 / 3

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise ValueError(f"RerouteConfig: strategy={self.strategy!r} is unknown; use one of {tuple(STRATEGIES)}.")
        if not 0 <= self.harm < math.inf:
            raise ValueError(f"RerouteConfig: harm={self.harm} must be finite and not negative.")


def reroute(
    model: FrozenModel,
    params: Params,
    memory: Memory,
    inputs: Inputs,
    config: RerouteConfig,
    *,
    embedder: Embedder | None = None,
    labels: Labels | None = None,
    active: bool = True,
) -> Decisions:
    """Answers inputs with routings that worked for their neighbours; the model's parameters are only read.

    Args:
      model, params: the frozen model.
      memory: of the references, from calibrate.prepare.
      inputs: a tree of arrays with the batch as first axis; any number of inputs.
      config: how.
      embedder: as the references were built with; None is the model's own.
      labels: [b] for the strategy "oracle", which is for evaluation alone.
      active: False answers with the frozen router, as after an alarm.

    Returns:
      Decisions as host arrays. Whatever is not finite in a proposal gives way to the frozen model's own answer.

    Raises:
      TypeError: inputs hold something else than arrays, or labels are not an array of integers.
      ValueError: inputs are empty, arrays differ in length, the embedding has another width than the references', the
        oracle gets no labels, or a label is no answer.
    """
    _check_kinds(inputs, labels)
    num = _count(inputs, labels)
    if labels is not None:
        _check_labels(np.asarray(labels), len(model.answers))
    program = _program(model, config, STRATEGIES[config.strategy], embedder, active)
    check_width(model, params, memory, inputs, embedder)
    parts = []
    for start in range(0, num, TILE):
        rows = np.minimum(np.arange(start, start + TILE), num - 1)
        tile, given = jax.tree.map(lambda x, rows=rows: jnp.asarray(x[rows]), (inputs, labels))
        parts.append(jax.device_get(program(params, memory, tile, given)))
    return jax.tree.map(lambda *tiles: np.concatenate(tiles)[:num], *parts)


def _check_kinds(inputs: Inputs, labels: Labels | None) -> None:
    for leaf in jax.tree.leaves(inputs):
        if not getattr(leaf, "ndim", 0):
            raise TypeError(
                f"reroute: inputs hold a {type(leaf).__name__} without rows; pass a tree of arrays, one row per input."
            )
    if labels is None:
        return
    if not hasattr(labels, "dtype"):
        raise TypeError(f"reroute: labels is a {type(labels).__name__}; pass an array.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"reroute: labels has dtype {labels.dtype}; pass integers.")
    if labels.ndim != 1:
        raise ValueError(f"reroute: labels has shape {labels.shape}; give one label per input.")


def _check_labels(labels: np.ndarray, num_answers: int) -> None:
    """Refuses what is no answer; within the compiled program nobody would notice."""
    wrong = (labels < 0) | (labels >= num_answers)
    if wrong.any():
        raise ValueError(
            f"reroute: labels has {labels[wrong][0]}; with {num_answers} answers it must be 0 to {num_answers - 1}."
        )


def _count(inputs: Inputs, labels: Labels | None) -> int:
    sizes = {len(x) for x in jax.tree.leaves((inputs, labels))}
    if len(sizes) > 1:
        raise ValueError(
            f"reroute: arrays of inputs and labels have {sorted(sizes)} rows; give each one row per input."
        )
    if not sum(sizes):
        raise ValueError("reroute: inputs are empty; pass at least one.")
    return sizes.pop()


def check_width(model: FrozenModel, params: Params, memory: Memory, inputs: Inputs, embedder: Embedder | None) -> None:
    """Raises if embeddings of these inputs cannot be compared with the references'.

    Raises:
      ValueError: they have another width.
    """
    embed = embedder.embed if embedder else model.embed
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), inputs)
    width = jax.eval_shape(embed, params, one).shape[-1]
    if width != memory.embedding.shape[-1]:
        raise ValueError(
            f"reroute: inputs are embedded in {width} dimensions, the references in {memory.embedding.shape[-1]}; use "
            f"the embedder they were built with."
        )


@functools.lru_cache(maxsize=64)
def _program(model: FrozenModel, config: RerouteConfig, strategy: Strategy, embedder: Embedder | None, active: bool):
    """Returns the compiled function (params, memory, inputs, labels) -> Decisions of one tile.

    The strategy is part of the key, for a notebook may define the one of this name anew.
    """

    @jax.jit
    def program(params: Params, memory: Memory, inputs: Inputs, labels: Labels | None) -> Decisions:
        answer = functools.partial(model.forward, params, inputs)
        seen = look(model, params, inputs, embedder)
        return decide(seen, memory, config, model.groups, answer, labels=labels, active=active)

    return program


class Look(NamedTuple):
    """What the frozen model makes of inputs before anything is re-routed."""

    routing: Routing
    embedding: Embedding
    features: Features
    readout: Readout  # exact, or linearised at `routing`


def look(model: FrozenModel, params: Params, inputs: Inputs, embedder: Embedder | None = None) -> Look:
    """Returns the model's look at inputs. Under jit, whatever a strategy does not use is not computed."""
    routing = model.router(params, inputs)
    return Look(
        routing=routing,
        embedding=(embedder.embed if embedder else model.embed)(params, inputs),
        features=model.features(params, inputs),
        readout=model.readout(params, inputs) if model.readout else linearised(model)(params, inputs, routing),
    )


def decide(
    seen: Look,
    memory: Memory,
    config: RerouteConfig,
    groups: tuple[int, ...],
    answer: Callable[[Routing], Logits],
    *,
    labels: Labels | None = None,
    active: bool = True,
) -> Decisions:
    """Returns decisions about inputs that were looked at.

    Args:
      seen: the model's look at them.
      memory: of the references.
      config: how.
      groups: sizes of the groups of experts.
      answer: gives the inputs' logits [b, y] under a routing [b, e].
      labels: [b] for the strategy "oracle".
      active: False keeps the router's routing.
    """
    neighbors = look_up(memory, seen.embedding, config.neighbors)
    problem = pose(memory, neighbors, seen.routing, seen.features, seen.readout, labels)
    proposed = propose(problem, memory, config, groups)
    base, changed = answer(seen.routing), answer(proposed)
    before, after = surrogate(problem, seen.routing), surrogate(problem, proposed)
    status = verdict(memory.thresholds, neighbors, before - after, lead(base, changed), config.guarded)
    finite = jnp.isfinite(proposed).all(-1) & jnp.isfinite(changed.max(-1)) & ~jnp.isnan(changed).any(-1)
    status = jnp.where(finite, status, decision.NOT_FINITE)
    status = status if active else jnp.full_like(status, decision.TURNED_OFF)
    taken = (status == decision.REROUTED)[:, None]
    return Decisions(
        status=status,
        routing=jnp.where(taken, proposed, seen.routing),
        base_routing=seen.routing,
        logits=jnp.where(taken, changed, base),
        base_logits=base,
        proposed=proposed,
        loss_before=before,
        loss_after=after,
        neighbors=neighbors,
        neighbor_routing=problem.neighbor_routing,
    )


def look_up(memory: Memory, embedding: Embedding, config: NeighborConfig) -> Neighbors:
    """Returns the neighbours of embeddings [b, p] among the references."""
    return weigh(*nearest(embedding, memory.embedding, config.k), config, memory.bandwidth)


def pose(
    memory: Memory,
    neighbors: Neighbors,
    routing: Routing,
    features: Features,
    own_readout: Readout,
    own_label: Labels | None,
) -> Problem:
    """Returns what a strategy sees: inputs, and what the memory holds of their neighbours.

    Args:
      memory: of the references.
      neighbors: of the inputs, [b, m].
      routing: [b, e], the router's own.
      features: [b, f].
      own_readout: [b, e, y] and [b, y] of the inputs.
      own_label: [b] of the inputs, for the oracles alone.
    """
    return Problem(
        routing=routing,
        features=features,
        weights=neighbors.weights,
        similarity=neighbors.similarity,
        readout=memory.readout.take(neighbors.indices),
        labels=memory.labels[neighbors.indices],
        neighbor_routing=memory.routing[neighbors.indices],
        neighbor_optimised=memory.optimised[neighbors.indices],
        own_readout=own_readout,
        own_label=own_label,
    )


def propose(problem: Problem, memory: Memory, config: RerouteConfig, groups: tuple[int, ...]) -> Routing:
    """Returns the strategy's routing [b, e], within the trust region if there is one."""
    proposed = STRATEGIES[config.strategy](problem, memory, config.settings, groups)
    if config.settings.trust:
        proposed = draw_back(proposed, problem.routing, config.settings.trust, groups)
    return proposed


def lead(base: Logits, changed: Logits) -> Float[Array, "b"]:
    """Returns by how many nats the new answer leads the frozen model's; inf where they are the same answer."""
    old, new = base.argmax(-1), changed.argmax(-1)
    behind = jnp.take_along_axis(changed, old[:, None], axis=-1)[:, 0]
    return jnp.where(old == new, jnp.inf, changed.max(-1) - behind)


def verdict(
    thresholds: Thresholds, neighbors: Neighbors, gain: Float[Array, "b"], lead: Float[Array, "b"], guarded: bool
) -> Int[Array, "b"]:
    """Returns the status [b] of finite proposals; where several reasons speak against one, the first of STATUSES.

    Args:
      thresholds: from calibrate.prepare.
      neighbors: of the inputs, [b, m].
      gain: [b] by how many nats the surrogate falls.
      lead: [b] from `lead`.
      guarded: without, whoever has a neighbour is re-routed.
    """
    nobody = neighbors.weights.sum(-1) == 0
    if not guarded:
        return jnp.where(nobody, decision.FAR, decision.REROUTED)
    status = jnp.where(lead >= thresholds.least_lead, decision.REROUTED, decision.UNSURE)
    status = jnp.where(gain >= thresholds.least_gain, status, decision.FLAT)
    return jnp.where(nobody | (neighbors.distance[:, 0] > thresholds.farthest), decision.FAR, status)
