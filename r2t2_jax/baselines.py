"""What else could be done with the labels of the references: the yardsticks that re-routing has to beat."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from r2t2_jax.decision import Neighbors
from r2t2_jax.references import ReferenceSet
from r2t2_jax.shapes import Readout, Routing
from r2t2_jax.strategies import SMALLEST, split_groups


def uniform(groups: tuple[int, ...], count: int) -> Float[np.ndarray, "b e"]:
    """Returns equal weights for all experts of a group."""
    return np.broadcast_to(np.concatenate([np.full(n, 1 / n, np.float32) for n in groups]), (count, sum(groups)))


def best_global(references: ReferenceSet, steps: int = 200, learning_rate: float = 1.0) -> Float[np.ndarray, "e"]:
    """Returns the one routing with the least mean loss over all references, by exponentiated gradient descent."""
    return best_per_group(references, np.zeros(len(references), int), steps, learning_rate)[0]


def best_per_group(
    references: ReferenceSet, group: Int[np.ndarray, "r"], steps: int = 200, learning_rate: float = 1.0
) -> Float[np.ndarray, "g e"]:
    """Returns one routing for each group of references, such as those of one question template."""
    start = jnp.log(jnp.asarray(uniform(references.groups, 1)[0]))
    readout, labels = jax.tree.map(jnp.asarray, references.readout), jnp.asarray(references.labels)

    @jax.jit
    def fit(counts: Float[Array, "r"]) -> Float[Array, "e"]:
        def loss(routing):
            wrong = optax.softmax_cross_entropy_with_integer_labels(readout(routing[None]), labels)
            return (counts * wrong).sum() / counts.sum()

        def step(logits, _):
            return logits - learning_rate * jax.grad(loss)(on_simplex(logits, references.groups)), None

        return on_simplex(jax.lax.scan(step, start, length=steps)[0], references.groups)

    return np.stack([np.asarray(fit(jnp.asarray(group == g, jnp.float32))) for g in range(group.max() + 1)])


def vote(neighbors: Neighbors, labels: Int[np.ndarray, "r"], num_answers: int) -> Int[np.ndarray, "b"]:
    """Returns the label that most of the neighbours' weight is on; the model plays no part."""
    weight = np.zeros((len(neighbors.weights), num_answers))
    rows = np.broadcast_to(np.arange(len(weight))[:, None], neighbors.weights.shape)
    np.add.at(weight, (rows, np.asarray(labels)[neighbors.indices]), np.asarray(neighbors.weights))
    return weight.argmax(-1)


def random_neighbors(num_inputs: int, num_references: int, k: int, seed: int) -> Neighbors:
    """Returns k references drawn at random for each input, all of the same weight."""
    indices = np.random.default_rng(seed).integers(num_references, size=(num_inputs, k))
    return Neighbors(indices, np.ones(indices.shape, np.float32), np.full(indices.shape, 1 / k, np.float32))


def sharpen(
    routing: Routing, readout: Readout, groups: tuple[int, ...], steps: int = 10, learning_rate: float = 1.0
) -> Routing:
    """Returns the routing after descent on the entropy of the model's own answer: adaptation without references."""

    def entropy(logits):
        log_answer = jax.nn.log_softmax(readout(on_simplex(logits, groups)))
        return -(jnp.exp(log_answer) * jnp.maximum(log_answer, -1e30)).sum()

    def step(logits, _):
        return logits - learning_rate * jax.grad(entropy)(logits), None

    start = jnp.log(jnp.maximum(routing, SMALLEST))
    return on_simplex(jax.lax.scan(step, start, length=steps)[0], groups)


def best_shift(references: ReferenceSet, steps: int = 300, learning_rate: float = 0.05) -> Float[np.ndarray, "e"]:
    """Returns what to add to the logarithm of every routing, the same for all: the router's last bias, fitted anew."""
    start = jnp.log(jnp.maximum(jnp.asarray(references.routing), SMALLEST))
    readout = jax.tree.map(jnp.asarray, references.readout)
    optimizer = optax.adam(learning_rate)

    def loss(shift):
        logits = readout(on_simplex(start + shift, references.groups))
        return optax.softmax_cross_entropy_with_integer_labels(logits, references.labels).mean()

    def step(carry, _):
        shift, moments = carry
        updates, moments = optimizer.update(jax.grad(loss)(shift), moments)
        return (optax.apply_updates(shift, updates), moments), None

    shift = jnp.zeros(start.shape[1])
    return np.asarray(jax.lax.scan(step, (shift, optimizer.init(shift)), length=steps)[0][0])


def on_simplex(logits: Float[Array, "*b e"], groups: tuple[int, ...]) -> Routing:
    """Returns the softmax of each group."""
    return jnp.concatenate([jax.nn.softmax(x) for x in split_groups(logits, groups)], axis=-1)
