"""The closed forms of one step, as pure functions of values with the batch in the last axis, shared by xla and kernels.

Everything is an elementwise operation or a sum over an axis before the last, so lanes never meet: what a lane holds
depends on its own inputs alone. README.md derives the formulas.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

from pallas_kernels.router_descent.contract import Rule

FIRST_DECAY, SECOND_DECAY, EPSILON = 0.9, 0.999, 1e-8  # of Adam, arXiv 1412.6980


class Neighbors(NamedTuple):
    """Some neighbours of the inputs of one tile."""

    readout: tuple[Float[Array, "m y l"], ...]  # one per expert
    offset: Float[Array, "m y l"]
    labels: Int[Array, "m 1 l"]
    weights: Float[Array, "m 1 l"]


class Surrogate(NamedTuple):
    """The weighted cross-entropy of the neighbours, and its gradient in the routing."""

    loss: Float[Array, "1 l"]
    gradient: Float[Array, "e l"]


class Descent(NamedTuple):
    """Where the descent stands. The moments are those of Adam; other optimizers leave them at 0."""

    logits: Float[Array, "e l"]
    first: Float[Array, "e l"]
    second: Float[Array, "e l"]


class Rates(NamedTuple):
    """Of one step, or of all: the learning rate and the scale of the second moment, bias corrections included."""

    step_size: Float[Array, "*s"]
    second_scale: Float[Array, "*s"]


def rates(learning_rates: Float[Array, "s"], rule: Rule) -> Rates:
    """Computes the bias corrections in float64: in float32, 1 - 0.999 alone is wrong by 5e-5 of itself."""
    steps = np.arange(1, learning_rates.shape[0] + 1)
    if rule.optimizer != "adam":
        return Rates(learning_rates, jnp.ones_like(learning_rates))
    first, second = (jnp.asarray(1 / (1 - decay**steps), learning_rates.dtype) for decay in (FIRST_DECAY, SECOND_DECAY))
    return Rates(learning_rates * first, second)


def start(log_routing: Float[Array, "e l"]) -> Descent:
    """Returns the state before the first step."""
    return Descent(log_routing, jnp.zeros_like(log_routing), jnp.zeros_like(log_routing))


def routing_of(logits: Float[Array, "e l"], rule: Rule) -> Float[Array, "e l"]:
    """Softmax of each group of experts."""

    def softmax(x):
        shares = jnp.exp(x - stop_gradient(jnp.max(x, axis=0, keepdims=True)))
        return shares / jnp.sum(shares, axis=0, keepdims=True)

    return _by_group(softmax, logits, rule)


def surrogate(routing: Float[Array, "e l"], neighbors: Neighbors) -> Surrogate:
    """Returns sum_m weight_m CE(z_m, label_m) and its gradient in the routing, for z_m = readout_m routing + offset_m.

    An answer whose offset is -inf has probability 0; if it is the label, the loss is inf and the gradient is finite.
    """
    logits = neighbors.offset
    for expert, readout in enumerate(neighbors.readout):
        logits = logits + readout * routing[expert : expert + 1]
    largest = stop_gradient(jnp.max(logits, axis=1, keepdims=True))
    largest = jnp.where(largest == -jnp.inf, 0, largest)  # every answer masked
    shares = jnp.exp(logits - largest)
    total = jnp.sum(shares, axis=1, keepdims=True)
    total = jnp.where(total == 0, 1, total)
    is_label = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == neighbors.labels
    of_label = jnp.sum(jnp.where(is_label, logits, 0), axis=1, keepdims=True)
    loss = jnp.sum(neighbors.weights * (jnp.log(total) + largest - of_label), axis=0)
    slope = shares * (neighbors.weights / total) - jnp.where(is_label, neighbors.weights, 0)
    gradient = [jnp.sum(readout * slope, axis=(0, 1))[None] for readout in neighbors.readout]
    return Surrogate(loss, jnp.concatenate(gradient))


def step(
    descent: Descent,
    gradient: Float[Array, "e l"],
    routing: Float[Array, "e l"],
    first_routing: Float[Array, "e l"],
    rates: Rates,
    rule: Rule,
) -> Descent:
    """Moves the logits, which stand at `routing`, along the gradient of the surrogate in the routing."""
    if rule.optimizer != "exponentiated":  # the derivative of the softmax, which mirror descent leaves out
        gradient = routing * (gradient - _by_group(_spread_sum, routing * gradient, rule))
    if rule.prox:
        gradient = gradient + rule.prox * (routing - first_routing)
    if rule.optimizer != "adam":
        return descent._replace(logits=descent.logits - rates.step_size * gradient)
    first = FIRST_DECAY * descent.first + (1 - FIRST_DECAY) * gradient
    second = SECOND_DECAY * descent.second + (1 - SECOND_DECAY) * gradient * gradient
    is_moved = second > 0  # keeps the derivative of the root finite where nothing ever pulls
    size = jnp.where(is_moved, jnp.sqrt(jnp.where(is_moved, second * rates.second_scale, 1)), 0)
    return Descent(descent.logits - rates.step_size * (first / (size + EPSILON)), first, second)


def _spread_sum(x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.sum(x, axis=0, keepdims=True), x.shape)


def _by_group(function: Callable[[jax.Array], jax.Array], x: Float[Array, "e l"], rule: Rule) -> Float[Array, "e l"]:
    ends = np.cumsum(rule.groups)
    return jnp.concatenate([function(x[end - size : end]) for size, end in zip(rule.groups, ends, strict=True)])
