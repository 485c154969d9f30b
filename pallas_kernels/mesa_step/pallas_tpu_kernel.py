"""The kernel body: references are loaded, pure functions of values do the arithmetic, results are stored.

A program holds up to 64 heads, each a system of its own with a matrix of its own, and gives each a lane: unknowns are
the columns of [k, g], matrices lie as [k, k, g], and all heads are multiplied with all matrices elementwise (README.md,
section 2). No head meets another.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.lax import fori_loop

from pallas_kernels.mesa_chunk import solver
from pallas_kernels.mesa_chunk.algebra import sum_down
from pallas_kernels.mesa_chunk.contract import MesaState
from pallas_kernels.mesa_chunk.products import transpose
from pallas_kernels.mesa_chunk.solver import SolverConfig
from pallas_kernels.mesa_step import algebra


class TokenArrays(NamedTuple):
    """The token of every head."""

    q: jax.Array  # [g, k]
    k: jax.Array  # [g, k]
    v: jax.Array  # [g, v]
    log_decay: jax.Array  # [g, 1]
    beta: jax.Array  # [g, 1]
    ridge: jax.Array  # [g, k]


class StepResults(NamedTuple):
    """What the kernel stores."""

    out: jax.Array  # [g, v]
    kk: jax.Array  # [g, k, k]
    kv: jax.Array  # [g, k, v]
    num_steps: jax.Array  # [1, 1, g] int32
    residual: jax.Array  # [1, 1, g]


def step(token, state, results: StepResults, in_lanes, *, num_heads: int, config: SolverConfig) -> None:
    """Updates the states, solves with the new one and reads out.

    The last program may hold more heads than there are. What it makes of them goes nowhere, and without a query there
    is nothing to solve.

    Args:
      token, state: TokenArrays and MesaState as references to blocks of g heads.
      results: references to what is stored.
      in_lanes: scratch memory [k, k, g] for the matrices.
      num_heads: how many there are in all programs.
      config: the solver's.
    """
    token = TokenArrays(*(ref[...] for ref in token))
    _advance(token, state, results)
    _to_lanes(results.kk, in_lanes)
    query = transpose(jnp.where(_exists(token, num_heads), token.q, 0))
    found = algebra.solve(query, lambda x: sum_slabs(in_lanes, x), transpose(token.ridge), config)
    results.out[...] = read_out(results.kv, found.solution)
    results.num_steps[0] = found.num_steps
    results.residual[0] = solver.relative_size(found.residual, query)


def _advance(token: TokenArrays, before: MesaState, after: StepResults) -> None:
    """Stores the states after the token, head by head."""
    keep, weighted = jnp.exp(token.log_decay), transpose(token.beta * token.k)
    for h in range(weighted.shape[1]):
        here = slice(h, h + 1)
        after.kk[h] = keep[here] * before.kk[h] + weighted[:, here] * token.k[here]
        after.kv[h] = keep[here] * before.kv[h] + weighted[:, here] * token.v[here]


def _to_lanes(matrices, in_lanes) -> None:
    """Stores symmetric matrices [g, k, k] as [k, k, g]; a row of all of them at a time, and a few rows at once."""

    def lay_rows(rows):
        for i in rows:
            in_lanes[i] = transpose(matrices[:, pl.ds(i, 1), :][:, 0])

    k, at_once = matrices.shape[1], 2
    fori_loop(0, k // at_once, lambda turn, _: lay_rows([turn * at_once + i for i in range(at_once)]), None)
    lay_rows(range(k - k % at_once, k))


def _exists(token: TokenArrays, num_heads: int) -> jax.Array:
    """[g, 1] bool: which places of this program hold a head."""
    g = token.q.shape[0]
    return pl.program_id(0) * g + jax.lax.broadcasted_iota(jnp.int32, (g, 1), 0) < num_heads


def sum_slabs(slabs, x: jax.Array) -> jax.Array:
    """Returns the columns M_h x_h [k, g] for symmetric matrices [k, k, g], a reference or an array, and x [k, g]."""
    y = slabs[0] * x[:1]
    for i in range(1, x.shape[0]):
        y = y + slabs[i] * x[i : i + 1]
    return y


def read_out(memories, x: jax.Array) -> jax.Array:
    """Returns the rows G_h' x_h [g, v] for memories [g, k, v], a reference or an array, and x [k, g]."""
    return jnp.concatenate([sum_down(memories[h] * x[:, h : h + 1]) for h in range(x.shape[1])])
