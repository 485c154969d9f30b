"""The closed forms in jax.numpy: runs on every platform, and its derivative is that of the kernels too.

On a CPU the batch is cut into tiles of a fixed number of lanes that are worked off one after another: all steps of a
tile run in cache, and since every tile is the same program, an input's result does not depend on the batch around it,
to the bit. On accelerators the batch is one tile.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.router_descent import algebra
from pallas_kernels.router_descent.contract import Inputs, Rule
from pallas_kernels.tiling import pad_axis, round_up

LANES = 64  # of a tile on CPUs (README.md, section 4)


def forward(inputs: Inputs, rule: Rule) -> tuple[jax.Array, jax.Array]:
    """Returns the routing [b, e] after the last step and the surrogate loss [b] there."""

    def descend(rows):
        return _descend(rows._replace(learning_rates=inputs.learning_rates), rule), ()

    results, _ = _over_tiles(descend, inputs._replace(learning_rates=None))
    return results


def backward(inputs: Inputs, cotangents: tuple[jax.Array, jax.Array], rule: Rule) -> Inputs:
    """Returns the cotangents of the inputs; each tile runs forward again, so memory is that of one tile's steps."""

    def pull(operands):
        rows, cotangents = operands
        rows = rows._replace(learning_rates=inputs.learning_rates)
        _, pullback = jax.vjp(lambda inputs: _descend(inputs, rule), rows)
        (gradients,) = pullback(cotangents)
        return gradients._replace(labels=None, learning_rates=None), gradients.learning_rates

    gradients, of_learning_rates = _over_tiles(pull, (inputs._replace(learning_rates=None), cotangents))
    return gradients._replace(learning_rates=of_learning_rates)


def _descend(inputs: Inputs, rule: Rule) -> tuple[jax.Array, jax.Array]:
    """All steps of one tile, batch first."""
    dtype, rates = inputs.offset.dtype, algebra.rates(inputs.learning_rates, rule)
    lanes = functools.partial(jnp.moveaxis, source=0, destination=-1)
    neighbors = algebra.Neighbors(
        readout=tuple(lanes(inputs.readout[:, :, expert]).astype(dtype) for expert in range(inputs.readout.shape[2])),
        offset=lanes(inputs.offset),
        labels=lanes(inputs.labels)[:, None],
        weights=lanes(inputs.weights)[:, None],
    )
    descent = algebra.start(lanes(inputs.log_routing))
    first_routing = algebra.routing_of(descent.logits, rule)

    def step(descent, rates):
        routing = algebra.routing_of(descent.logits, rule)
        gradient = algebra.surrogate(routing, neighbors).gradient
        return algebra.step(descent, gradient, routing, first_routing, rates, rule), None

    descent, _ = jax.lax.scan(step, descent, rates)
    routing = algebra.routing_of(descent.logits, rule)
    return routing.T, algebra.surrogate(routing, neighbors).loss[0]


def _over_tiles(function, rows):
    """Applies `function` to a tree of arrays [b, ...]: tile by tile on a CPU, at once elsewhere.

    It returns a tree of arrays [b, ...] again, and one of arrays that are summed over tiles.
    """

    def one_by_one(rows):
        batch = jax.tree.leaves(rows)[0].shape[0]
        padded = jax.tree.map(lambda x: pad_axis(x, 0, round_up(batch, LANES)), rows)
        tiles = jax.tree.map(lambda x: x.reshape(-1, LANES, *x.shape[1:]), padded)
        results, terms = jax.lax.map(function, tiles)
        results = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:batch], results)
        return results, jax.tree.map(lambda x: jnp.sum(x, axis=0), terms)

    return dispatch.by_platform(rows, cpu=one_by_one, accelerator=function)
