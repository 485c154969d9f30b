"""How a routing is improved from its neighbours: one signature, a function and a row of STRATEGIES each.

A strategy takes a Problem (a batch of inputs and their neighbours), the Memory (all references) and a StrategyConfig,
and returns a routing [b, e] on the simplex of each group. Equation numbers are those of arXiv 2502.20395.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import router_descent
from r2t2_jax.amortised import AmortisedRouter, propose
from r2t2_jax.shapes import Embedding, Features, Labels, Readout, Routing

SMALLEST = 1e-6  # an expert the router gave nothing can still be chosen; paper and code leave open how


class Problem(NamedTuple):
    """A batch of inputs, their neighbours, and nothing that depends on the rest of the batch."""

    routing: Routing  # the router's own
    features: Features
    weights: Float[Array, "b m"]  # of the neighbours, sum 1, 0 where there is none
    similarity: Float[Array, "b m"]  # cosine, -inf where there is none
    readout: Readout  # of the neighbours, [b, m, e, y] and [b, m, y]
    labels: Int[Array, "b m"]  # of the neighbours
    neighbor_routing: Float[Array, "b m e"]
    neighbor_optimised: Float[Array, "b m e"]  # what would have been best for each neighbour, near its routing
    own_readout: Readout  # of the inputs themselves, [b, e, y] and [b, y]: the oracles and the final answer use it
    own_label: Labels | None = None  # for the oracles alone


class Thresholds(NamedTuple):
    """When a proposal is not taken."""

    farthest: Float[Array, ""]  # the nearest neighbour lies farther away
    least_gain: Float[Array, ""]  # the surrogate falls by less, in nats
    least_lead: Float[Array, ""]  # another answer than the frozen model's leads that one by less, in nats


class Memory(NamedTuple):
    """What re-routing remembers of the references, on the device; never any weight of the model."""

    embedding: Embedding
    labels: Labels
    routing: Routing
    optimised: Routing
    readout: Readout
    amortised: AmortisedRouter
    bandwidth: Float[Array, ""]  # of the kernel
    thresholds: Thresholds


@dataclasses.dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Settings of the strategies; each says which it reads.

    Attributes:
      steps: gradient steps, bisections of kernel regression, iterations of mode finding.
      learning_rate, final_learning_rate: ends of the cosine schedule, in logits of the routing.
      optimizer: "sgd", "adam" or "exponentiated", as of pallas_kernels.router_descent.
      prox: weight of KL(router's routing || routing) in the surrogate.
      trust: largest KL(router's routing || routing) of a proposal, which is drawn back to it; 0 sets no limit.
      mode_bandwidth: length scale of mode finding, between routings.
      mode_step: share of the way to the mean that mode finding goes per iteration, 1 - alpha of eq. 7.
      confidence: power of the mean similarity by which stored optimised routings are mixed in.

    Raises:
      ValueError: a field is out of range.
    """

    steps: int = 10
    learning_rate: float = 5.0
    final_learning_rate: float = 0.0
    optimizer: str = "sgd"
    prox: float = 0.0
    trust: float = 0.0
    mode_bandwidth: float = 0.2
    mode_step: float = 0.5
    confidence: float = 1.0

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"StrategyConfig: steps={self.steps} must not be negative.")
        if self.optimizer not in ("sgd", "adam", "exponentiated"):
            raise ValueError(f"StrategyConfig: optimizer={self.optimizer!r}; use 'sgd', 'adam' or 'exponentiated'.")
        for field in ("learning_rate", "mode_bandwidth"):
            if not (getattr(self, field) > 0 and math.isfinite(getattr(self, field))):
                raise ValueError(f"StrategyConfig: {field}={getattr(self, field)} must be positive.")
        for field in ("final_learning_rate", "prox", "trust", "confidence"):
            if not (getattr(self, field) >= 0 and math.isfinite(getattr(self, field))):
                raise ValueError(f"StrategyConfig: {field}={getattr(self, field)} must not be negative.")
        if not 0 < self.mode_step <= 1:
            raise ValueError(f"StrategyConfig: mode_step={self.mode_step} must be above 0 and at most 1.")

    def learning_rates(self) -> np.ndarray:
        """Returns the cosine schedule [s], whose last entry lies one step before the final learning rate."""
        fall = (1 + np.cos(np.pi * np.arange(self.steps) / max(self.steps, 1))) / 2
        return (self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * fall).astype(np.float32)


# the settings of the paper (appendix C) to go with strategy "literal"
PAPER = StrategyConfig(learning_rate=1e-2, final_learning_rate=1e-5)


def surrogate(problem: Problem, routing: Routing) -> Float[Array, "b"]:
    """Returns sum_j w_j CE(logits of neighbour j under the routing, its label), the L of eq. 3."""
    return (problem.weights * _losses(problem, routing)).sum(-1)


def _losses(problem: Problem, routing: Routing) -> Float[Array, "b m"]:
    logits = _of_present(problem, problem.readout)(routing[:, None])
    label = jnp.take_along_axis(logits, problem.labels[..., None], axis=-1)[..., 0]
    return jnp.where(problem.weights > 0, jax.nn.logsumexp(logits, axis=-1) - label, 0)


def _of_present(problem: Problem, values):
    """Zeros in the place of neighbours of weight 0: whatever is stored there reaches neither values nor gradients."""
    present = problem.weights > 0
    return jax.tree.map(lambda x: jnp.where(present.reshape(*present.shape, *[1] * (x.ndim - 2)), x, 0), values)


# --- strategies ---


def keep(problem: Problem, memory: Memory, config: StrategyConfig, groups: tuple[int, ...]) -> Routing:
    """The frozen router."""
    return problem.routing


def descend(problem: Problem, memory: Memory, config: StrategyConfig, groups: tuple[int, ...]) -> Routing:
    """Neighborhood gradient descent (eq. 3) on the logits of the routing."""
    return _descend_from(problem.routing, problem, config, groups)


def _descend_from(start: Routing, problem: Problem, config: StrategyConfig, groups) -> Routing:
    return router_descent(
        _log(start),
        *problem.readout,
        problem.labels,
        problem.weights,
        jnp.asarray(config.learning_rates()),
        groups=groups,
        optimizer=config.optimizer,
        prox=config.prox,
    )[0]


def descend_literally(problem: Problem, memory: Memory, config: StrategyConfig, groups: tuple[int, ...]) -> Routing:
    """The paper's descent on the weights themselves (eq. 1 and 3), put back on the simplex after each step.

    One input after the other: as a loop over whole batches, the last bit of an input can depend on its place in them.
    """
    rates = jnp.asarray(config.learning_rates())

    def alone(problem):
        problem = jax.tree.map(lambda x: x[None], problem)

        def step(routing, rate):
            gradient = jax.grad(lambda r: surrogate(problem, r).sum())(routing)
            return project(routing - rate * gradient, groups), None

        return jax.lax.scan(step, problem.routing, rates)[0][0]

    return jax.lax.map(alone, problem)


def regress(problem: Problem, memory: Memory, config: StrategyConfig, groups: tuple[int, ...]) -> Routing:
    """Kernel regression: the best point between the neighbours' mean routing and the router's own (eq. 4 to 6).

    The surrogate is convex on the segment where the read-out is affine, so its derivative changes sign once: bisection.
    """
    return _best_between(problem, _mean(problem, problem.neighbor_routing), config.steps)


def regress_optimised(problem: Problem, memory: Memory, config: StrategyConfig, groups: tuple[int, ...]) -> Routing:
    """The neighbours' optimised routings, mixed in by how similar they are; no gradient at test time."""
    similarity = jnp.where(problem.weights > 0, problem.similarity, 0)
    trusted = jnp.clip((problem.weights * similarity).sum(-1), 0, 1) ** config.confidence
    target = _mean(problem, problem.neighbor_optimised)
    return problem.routing + trusted[:, None] * (target - problem.routing)


def find_mode(problem: Problem, memory: Memory, config: StrategyConfig, groups: tuple[int, ...]) -> Routing:
    """Mean shift among the routings of all references (eq. 7 and 8); looks at no label and no loss."""

    def shift(_, routing):
        squared = jnp.square(routing[:, None] - memory.routing).sum(-1)
        kernel = jax.nn.softmax(-squared / (2 * config.mode_bandwidth**2))
        mean = jnp.matmul(kernel, memory.routing, precision=jax.lax.Precision.HIGHEST)
        return routing + config.mode_step * (mean - routing)

    return jax.lax.fori_loop(0, config.steps, shift, problem.routing)


def amortise(problem: Problem, memory: Memory, config: StrategyConfig, groups: tuple[int, ...]) -> Routing:
    """A small network, trained on the references, says where the routing should go; needs no neighbours."""
    return propose(memory.amortised, problem.features, _log(problem.routing), groups)


def amortise_and_descend(problem: Problem, memory: Memory, config: StrategyConfig, groups: tuple[int, ...]) -> Routing:
    """Descent that starts where the network points, and that `prox` holds there."""
    return _descend_from(amortise(problem, memory, config, groups), problem, config, groups)


def ask_oracle(problem: Problem, memory: Memory, config: StrategyConfig, groups: tuple[int, ...]) -> Routing:
    """Descent on the input's own label (eq. 2): an upper bound that cheats. With a wrong label, the null oracle.

    Raises:
      ValueError: the problem holds no labels of the inputs.
    """
    if problem.own_label is None:
        raise ValueError("strategy 'oracle' needs the labels of the inputs; it is for evaluation alone.")
    alone = problem._replace(
        readout=jax.tree.map(lambda x: x[:, None], problem.own_readout),
        labels=problem.own_label[:, None],
        weights=jnp.ones_like(problem.weights[:, :1]),
    )
    return _descend_from(problem.routing, alone, config, groups)


Strategy = Callable[[Problem, Memory, StrategyConfig, tuple[int, ...]], Routing]

STRATEGIES: dict[str, Strategy] = {
    "router": keep,
    "descent": descend,
    "literal": descend_literally,
    "kernel_regression": regress,
    "mode_finding": find_mode,
    "optimised_regression": regress_optimised,
    "amortised": amortise,
    "amortised_descent": amortise_and_descend,
    "oracle": ask_oracle,
}


# --- on the simplex ---


def project(routing: Routing, groups: tuple[int, ...]) -> Routing:
    """Returns the point [b, e] of each group's simplex that is nearest to any [b, e] (Euclidean)."""

    def nearest(x):
        ordered = jnp.sort(x, axis=-1, descending=True)
        shifts = (jnp.cumsum(ordered, axis=-1) - 1) / jnp.arange(1, x.shape[-1] + 1)  # if so many stay above 0
        return jnp.maximum(x - shifts.max(-1, keepdims=True), 0)

    return jnp.concatenate([nearest(x) for x in split_groups(routing, groups)], axis=-1)


def draw_back(routing: Routing, start: Routing, limit: float, groups: tuple[int, ...]) -> Routing:
    """Returns the farthest point, on the way from `start` in logits, with KL(start || point) <= limit.

    The divergence grows along the way, so bisection finds it. It is summed over the groups.

    Args:
      routing, start: [b, e], where the way leads and where it begins.
      limit: in nats; what lies within it is returned as it is, bit for bit.
      groups: sizes of the groups of experts.
    """
    origin, way = _log(start), _log(routing) - _log(start)

    def at(share):
        logits = origin + share[:, None] * way
        return jnp.concatenate([jax.nn.softmax(x) for x in split_groups(logits, groups)], axis=-1)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        near = divergence(start, at(middle)) <= limit
        return jnp.where(near, middle, low), jnp.where(near, high, middle)

    bounds = jnp.zeros_like(start[:, 0]), jnp.ones_like(start[:, 0])
    inside = divergence(start, routing) <= limit
    return jnp.where(inside[:, None], routing, at(jax.lax.fori_loop(0, 20, halve, bounds)[0]))


def divergence(start: Routing, routing: Routing) -> Float[Array, "b"]:
    """Returns KL(start || routing) in nats, summed over the groups."""
    return (start * (_log(start) - _log(routing))).sum(-1)


def split_groups(x: Float[Array, "b e"], groups: tuple[int, ...]) -> list[jax.Array]:
    """Returns the columns of each group of experts."""
    return jnp.split(x, np.cumsum(groups)[:-1].tolist(), axis=-1)


def _log(routing: Routing) -> Routing:
    return jnp.log(jnp.maximum(routing, SMALLEST))


def _mean(problem: Problem, routings: Float[Array, "b m e"]) -> Routing:
    """The neighbours' mean [b, e]; the router's own where there are none."""
    total = problem.weights.sum(-1, keepdims=True)
    return (problem.weights[..., None] * _of_present(problem, routings)).sum(1) + (1 - total) * problem.routing


def _best_between(problem: Problem, target: Routing, steps: int) -> Routing:
    """Bisects alpha in alpha r + (1 - alpha) target on the sign of the surrogate's derivative."""
    way = problem.routing - target

    def slope(alpha):
        here = target + alpha[:, None] * way
        return jax.jvp(lambda r: surrogate(problem, r), (here,), (way,))[1]

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        falling = slope(middle) < 0
        return jnp.where(falling, middle, low), jnp.where(falling, high, middle)

    start = jnp.zeros_like(way[:, 0]), jnp.ones_like(way[:, 0])
    low, high = jax.lax.fori_loop(0, steps, halve, start)
    return target + ((low + high) / 2)[:, None] * way
