"""One token in jax.numpy: update both states, solve with the new one, read out."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.mesa_chunk import products
from pallas_kernels.mesa_chunk.contract import MesaState, SolveReport
from pallas_kernels.mesa_chunk.solver import SolverConfig, relative_size
from pallas_kernels.mesa_step import algebra


def forward(
    q, k, v, log_decay, beta, ridge, state: MesaState, *, solver: SolverConfig
) -> tuple[jax.Array, MesaState, SolveReport]:
    """Returns the output [b, h, v], the new state and the report."""
    keep = jnp.exp(log_decay)[..., None, None]
    weighted = (beta[..., None] * k)[..., :, None]
    kk = keep * state.kk + weighted * k[..., None, :]
    kv = keep * state.kv + weighted * v[..., None, :]
    rhs = q[..., None]
    found = algebra.solve(rhs, functools.partial(products.times, kk), ridge[..., None], solver)
    report = SolveReport(found.num_steps[..., 0, 0], relative_size(found.residual, rhs)[..., 0, 0])
    return products.transposed_times(kv, found.solution)[..., 0], MesaState(kk, kv), report
