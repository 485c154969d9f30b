"""The kernel body for GPUs: references are loaded, pure functions of values do the arithmetic, results are stored.

A program has one head. Its matrix stays in registers from the update of the state to the last step of the solve, and
the memory of values is read only when that is over.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mesa_chunk import solver
from pallas_kernels.mesa_chunk.algebra import sum_down
from pallas_kernels.mesa_chunk.contract import MesaState
from pallas_kernels.mesa_chunk.products import transpose
from pallas_kernels.mesa_chunk.solver import SolverConfig
from pallas_kernels.mesa_step import algebra


class Token(NamedTuple):
    """The token of a head."""

    q: jax.Array  # [k, 1]
    k: jax.Array  # [k, 1]
    v: jax.Array  # [1, v]
    log_decay: jax.Array  # [1, 1]
    beta: jax.Array  # [1, 1]
    ridge: jax.Array  # [k, 1]


class StepResults(NamedTuple):
    """What the kernel stores."""

    out: jax.Array  # [1, v]
    kk: jax.Array  # [k, k]
    kv: jax.Array  # [k, v]
    num_steps: jax.Array  # [1, 1] int32
    residual: jax.Array  # [1, 1]


def step(token: Token, state: MesaState, results: StepResults, *, config: SolverConfig) -> None:
    """Updates the states, solves with the new one and reads out; all arguments are references to blocks."""
    token = Token(*(ref[...] for ref in token))
    keep, weighted = jnp.exp(token.log_decay), token.beta * token.k
    kk = keep * state.kk[...] + weighted * transpose(token.k)
    results.kk[...] = kk
    found = algebra.solve(token.q, lambda x: jnp.sum(kk * transpose(x), axis=-1, keepdims=True), token.ridge, config)
    kv = keep * state.kv[...] + weighted * token.v
    results.kv[...] = kv
    results.out[...] = sum_down(found.solution * kv)
    results.num_steps[...] = found.num_steps
    results.residual[...] = solver.relative_size(found.residual, token.q)
