"""The definition: the loss as it is written and jax.grad at every step. It shares no code with the closed forms."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.router_descent.contract import Inputs, Rule


def router_descent_reference(inputs: Inputs, rule: Rule) -> tuple[jax.Array, jax.Array]:
    """Returns the routing [b, e] after the last step and the surrogate loss [b] there."""
    readout = inputs.readout.astype(inputs.offset.dtype)
    routing_before = _routing(inputs.log_routing, rule)

    def surrogate(routing):
        logits = jnp.einsum("bmey,be->bmy", readout, routing, precision="highest") + inputs.offset
        losses = _cross_entropy(logits, inputs.labels)
        return jnp.sum(inputs.weights * losses, axis=1)

    def divergence(theta):  # KL(routing_before || routing); an expert that is off from the start adds nothing
        is_on = routing_before > 0
        log_ratio = jnp.log(jnp.where(is_on, routing_before, 1)) - jnp.log(jnp.where(is_on, _routing(theta, rule), 1))
        return rule.prox * jnp.sum(routing_before * log_ratio)

    def gradient(theta):
        pull_back = jax.grad(divergence)(theta)
        if rule.optimizer == "exponentiated":
            return pull_back + jax.grad(lambda routing: surrogate(routing).sum())(_routing(theta, rule))
        return pull_back + jax.grad(lambda theta: surrogate(_routing(theta, rule)).sum())(theta)

    def step(state, rates):
        theta, first, second = state
        learning_rate, of_first, of_second = rates
        direction = gradient(theta)
        if rule.optimizer == "adam":
            first = 0.9 * first + 0.1 * direction
            second = 0.999 * second + 0.001 * direction**2
            direction = (first / of_first) / (_root(second / of_second) + 1e-8)
        return (theta - learning_rate * direction, first, second), None

    counts = np.arange(1, len(inputs.learning_rates) + 1)
    corrections = (jnp.asarray(1 - decay**counts, inputs.offset.dtype) for decay in (0.9, 0.999))
    nothing = jnp.zeros_like(inputs.log_routing)
    state = (inputs.log_routing, nothing, nothing)
    (theta, _, _), _ = jax.lax.scan(step, state, (inputs.learning_rates, *corrections))
    routing = _routing(theta, rule)
    return routing, surrogate(routing)


def _routing(theta: jax.Array, rule: Rule) -> jax.Array:
    """Softmax within each group of experts."""
    pieces, begin = [], 0
    for size in rule.groups:
        pieces.append(jax.nn.softmax(theta[:, begin : begin + size], axis=-1))
        begin += size
    return jnp.concatenate(pieces, axis=-1)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[label] of [b, m, y]; inf where the label is masked, even if every answer is."""
    nothing_left = jnp.all(logits == -jnp.inf, axis=-1, keepdims=True)
    normalizer = jax.nn.logsumexp(jnp.where(nothing_left, 0, logits), axis=-1)
    return normalizer - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]


def _root(x: jax.Array) -> jax.Array:
    """Square root whose derivative at 0 is 0: what was never pulled does not start to move."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)
