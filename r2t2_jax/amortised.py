"""An amortised re-router: a small network that learns from the references, in seconds, where routings should go.

It sees what the frozen model computes about an input and changes the logits of the routing. It belongs to the
references, not to the model: whoever drops them drops it, and the model's weights are not touched.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from r2t2_jax.shapes import Features, Labels, Readout, Routing


class AmortisedRouter(NamedTuple):
    """Weights of a perceptron with one hidden layer, and the scale of its inputs."""

    center: Float[Array, "f"]
    scale: Float[Array, "f"]
    inner: Float[Array, "f d"]
    inner_bias: Float[Array, "d"]
    outer: Float[Array, "d e"]
    outer_bias: Float[Array, "e"]


DECAYS = AmortisedRouter(False, False, True, False, True, False)  # neither scales nor biases


class _Batch(NamedTuple):
    """Some of the references, as learning goes through them."""

    features: Features
    log_routing: Float[Array, "b e"]
    weight: Float[Array, "b e y"]
    offset: Float[Array, "b y"]
    labels: Labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class AmortisedConfig:
    """How the amortised re-router is trained.

    Attributes:
      hidden: width of its layer.
      epochs: passes over the references.
      batch_size: references per step.
      learning_rate: peak of Adam's cosine schedule.
      weight_decay: of the weights, decoupled.
      dropout: share of the inputs and of the hidden units left out in training.
      prox: weight of KL(routing || router's routing).
      seed: initial weights and order.

    Raises:
      ValueError: a field is out of range.
    """

    hidden: int = 128
    epochs: int = 40
    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    dropout: float = 0.2
    prox: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for field in ("hidden", "epochs", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"AmortisedConfig: {field}={getattr(self, field)} must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"AmortisedConfig: dropout={self.dropout} must be at least 0 and below 1.")
        for field in ("learning_rate", "weight_decay", "prox"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"AmortisedConfig: {field}={getattr(self, field)} must be finite and not negative.")


def propose(
    amortised: AmortisedRouter, features: Features, log_routing: Float[Array, "b e"], groups: tuple[int, ...]
) -> Routing:
    """Returns the routing [b, e] the network points to; an untrained network points to the router's own.

    Args:
      amortised: the network.
      features: [b, f].
      log_routing: [b, e] logs of the router's routing.
      groups: sizes of the groups of experts.
    """
    return jnp.exp(_log_proposal(amortised, features, log_routing, groups))


def _log_proposal(amortised, features, log_routing, groups, keep_inputs=1.0, keep_hidden=1.0) -> Float[Array, "b e"]:
    view = (features - amortised.center) / amortised.scale * keep_inputs
    hidden = jax.nn.relu(view @ amortised.inner + amortised.inner_bias) * keep_hidden
    logits = log_routing + hidden @ amortised.outer + amortised.outer_bias
    parts = jnp.split(logits, np.cumsum(groups)[:-1].tolist(), axis=-1)
    return jnp.concatenate([jax.nn.log_softmax(x) for x in parts], axis=-1)


def untrained(
    features: Float[np.ndarray, "r f"], num_experts: int, config: AmortisedConfig = AmortisedConfig()
) -> AmortisedRouter:
    """Returns a network that changes nothing, with inputs scaled to those of the references; f may be 0."""
    shape = features.shape[1], config.hidden
    inner = jax.random.normal(jax.random.key(config.seed), shape) * (2 / max(shape[0], 1)) ** 0.5
    spread = features.std(0)
    return AmortisedRouter(
        center=jnp.asarray(features.mean(0), jnp.float32),
        scale=jnp.asarray(np.where(spread > 1e-6, spread, 1), jnp.float32),
        inner=inner,
        inner_bias=jnp.zeros(config.hidden),
        outer=jnp.zeros((config.hidden, num_experts)),
        outer_bias=jnp.zeros(num_experts),
    )


def fit(
    features: Float[np.ndarray, "r f"],
    log_routing: Float[np.ndarray, "r e"],
    readout: Readout,
    labels: Int[np.ndarray, "r"],
    groups: tuple[int, ...],
    config: AmortisedConfig = AmortisedConfig(),
    *,
    rows: Int[np.ndarray, "n"] | None = None,
) -> AmortisedRouter:
    """Trains on references: cross-entropy of their labels under the proposed routing, through their own read-outs.

    Args:
      features: [r, f].
      log_routing: [r, e] logs of the router's routing.
      readout: [r, e, y] and [r, y].
      labels: [r].
      groups: sizes of the groups of experts.
      config: how. The same arguments give the same bits.
      rows: the references to learn from; None is all. Sets of nearly the same size share one compiled program.

    Raises:
      ValueError: there is no reference.
    """
    rows = np.arange(len(labels)) if rows is None else rows
    if not len(rows):
        raise ValueError("fit: the reference set is empty; an amortised re-router has nothing to learn from.")
    data = _Batch(features, log_routing, *readout, labels)
    data = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32 if x.ndim == 1 else jnp.float32), data)
    start = untrained(np.asarray(features)[rows], log_routing.shape[1], config)
    return _train(start, data, rows[_batches(len(rows), config)], groups, config)


@functools.partial(jax.jit, static_argnames=("groups", "config"))
def _train(amortised: AmortisedRouter, data: _Batch, rows: Int[Array, "s b"], groups, config: AmortisedConfig):
    schedule = optax.cosine_decay_schedule(config.learning_rate, len(rows))
    optimizer = optax.adamw(schedule, weight_decay=config.weight_decay, mask=DECAYS)

    def step(carry, rows):
        amortised, moments, key = carry
        key, left_out = jax.random.split(key)
        gradient = jax.grad(_loss)(amortised, jax.tree.map(lambda x: x[rows], data), left_out, groups, config)
        gradient = gradient._replace(center=0 * gradient.center, scale=0 * gradient.scale)
        updates, moments = optimizer.update(gradient, moments, amortised)
        return (optax.apply_updates(amortised, updates), moments, key), None

    start = (amortised, optimizer.init(amortised), jax.random.key(config.seed))
    return jax.lax.scan(step, start, rows)[0][0]


def _batches(num: int, config: AmortisedConfig) -> Int[np.ndarray, "s b"]:
    """Rows of the references of each step; a pass leaves out what fills no batch."""
    rng, size = np.random.default_rng(config.seed), min(config.batch_size, num)
    return np.concatenate([rng.permutation(num)[: num // size * size].reshape(-1, size) for _ in range(config.epochs)])


def _loss(amortised: AmortisedRouter, batch: _Batch, key, groups: tuple[int, ...], config: AmortisedConfig):
    shapes = [(len(batch.labels), width) for width in amortised.inner.shape]
    keep = [_keep(k, config.dropout, shape) for k, shape in zip(jax.random.split(key), shapes, strict=True)]
    log_proposal = _log_proposal(amortised, batch.features, batch.log_routing, groups, *keep)
    routing = jnp.exp(log_proposal)
    logits = Readout(batch.weight, batch.offset)(routing)
    moved = (routing * (log_proposal - batch.log_routing)).sum(-1)
    return (optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels) + config.prox * moved).mean()


def _keep(key, dropout: float, shape: tuple[int, int]) -> Float[Array, "b n"]:
    """Ones and zeros for dropout, scaled so that the mean stays."""
    return jax.random.bernoulli(key, 1 - dropout, shape) / (1 - dropout)
