"""Kernel bodies: references are loaded, the pure functions of algebra.py do the arithmetic, results are stored.

A block holds the neighbours of 128 inputs, one per lane: read-outs [m, e, y, l], offsets [m, y, l], labels and weights
[m, 1, l]. Loops run over groups of neighbours, small enough that what is computed of a group stays in registers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.router_descent import algebra
from pallas_kernels.router_descent.contract import Rule


class NeighborRefs(NamedTuple):
    """The neighbours of a block."""

    readout: jax.Ref
    offset: jax.Ref
    labels: jax.Ref
    weights: jax.Ref


def resident(rates_ref, log_routing_ref, *refs, rule: Rule, num_steps: int, at_once: int) -> None:
    """All steps over neighbours that fit on the chip; grid (tiles).

    Args:
      rates_ref: algebra.Rates as the rows of [2, s], scalars.
      log_routing_ref: [e, l].
      refs: NeighborRefs, then the results, routing [e, l] and loss [1, l].
      rule, num_steps: what a step does, and how often.
      at_once: neighbours per turn of the inner loop; divides m.
    """
    *neighbors, routing_ref, loss_ref = refs
    neighbors = NeighborRefs(*neighbors)
    descent = algebra.start(log_routing_ref[...])
    first_routing = algebra.routing_of(descent.logits, rule)

    def step(i, descent):
        routing = algebra.routing_of(descent.logits, rule)
        gradient = _surrogate(routing, neighbors, at_once).gradient
        return algebra.step(descent, gradient, routing, first_routing, _rates(rates_ref, i), rule)

    descent = jax.lax.fori_loop(0, num_steps, step, descent)
    routing = algebra.routing_of(descent.logits, rule)
    routing_ref[...] = routing
    loss_ref[...] = _surrogate(routing, neighbors, at_once).loss


def streamed(rates_ref, log_routing_ref, *refs, rule: Rule, num_steps: int, at_once: int) -> None:
    """One chunk of the neighbours in one step; grid (tiles, steps and one more for the loss, chunks).

    Args:
      rates_ref, log_routing_ref, rule, num_steps, at_once: as in `resident`.
      refs: NeighborRefs of the chunk; the results, routing [e, l] and loss [1, l]; and what lasts from chunk to chunk:
        the three arrays of algebra.Descent and the sums of algebra.Surrogate.
    """
    *neighbors, routing_ref, loss_ref = refs[:6]
    descent_refs, sum_refs = algebra.Descent(*refs[6:9]), algebra.Surrogate(*refs[9:])
    i, chunk = pl.program_id(1), pl.program_id(2)

    @pl.when((i == 0) & (chunk == 0))
    def _():
        _store(descent_refs, algebra.start(log_routing_ref[...]))

    @pl.when(chunk == 0)
    def _():
        _store(sum_refs, jax.tree.map(jnp.zeros_like, _load(sum_refs)))

    routing = algebra.routing_of(descent_refs.logits[...], rule)
    found = _surrogate(routing, NeighborRefs(*neighbors), at_once)
    _store(sum_refs, jax.tree.map(jnp.add, _load(sum_refs), found))
    is_last = chunk == pl.num_programs(2) - 1

    @pl.when(is_last & (i < num_steps))
    def _():
        first_routing = algebra.routing_of(log_routing_ref[...], rule)
        gradient = sum_refs.gradient[...]
        descent = algebra.step(_load(descent_refs), gradient, routing, first_routing, _rates(rates_ref, i), rule)
        _store(descent_refs, descent)

    @pl.when(is_last & (i == num_steps))
    def _():
        routing_ref[...] = routing
        loss_ref[...] = sum_refs.loss[...]


def _surrogate(routing: jax.Array, refs: NeighborRefs, at_once: int) -> algebra.Surrogate:
    """Sums algebra.surrogate over all neighbours of the block."""

    def add(turn, total):
        here = pl.ds(turn * at_once, at_once)
        neighbors = algebra.Neighbors(
            readout=tuple(refs.readout[here, e].astype(routing.dtype) for e in range(routing.shape[0])),
            offset=refs.offset[here],
            labels=refs.labels[here],
            weights=refs.weights[here],
        )
        return jax.tree.map(jnp.add, total, algebra.surrogate(routing, neighbors))

    nothing = algebra.Surrogate(jnp.zeros_like(routing[:1]), jnp.zeros_like(routing))
    return jax.lax.fori_loop(0, refs.readout.shape[0] // at_once, add, nothing)


def _rates(rates_ref, i) -> algebra.Rates:
    return algebra.Rates(rates_ref[0, i], rates_ref[1, i])


def _load(refs):
    return jax.tree.map(lambda ref: ref[...], refs)


def _store(refs, values) -> None:
    for ref, value in zip(refs, values, strict=True):
        ref[...] = value
