"""One token in jax.numpy: update both states, solve with the new one, read out."""

import jax
import jax.numpy as jnp

from pallas_kernels.mesa_chunk import products, solver
from pallas_kernels.mesa_chunk.contract import MesaState, SolveReport
from pallas_kernels.mesa_chunk.solver import SolverConfig


def forward(
    q, k, v, log_decay, beta, ridge, state: MesaState, *, config: SolverConfig
) -> tuple[jax.Array, MesaState, SolveReport]:
    """Returns the output [b, h, v], the new state and the report.

    Products are in float32 whatever the configuration, since decoding waits for memory, not for them; and one token has
    nobody to share a factor with, so that "nested" means what it means in a short chunk.
    """
    keep = jnp.exp(log_decay)[..., None, None]
    weighted = (beta[..., None] * k)[..., :, None]
    kk = keep * state.kk + weighted * k[..., None, :]
    kv = keep * state.kv + weighted * v[..., None, :]

    def apply_matrix(x):
        return products.times(kk, x) + ridge * x

    ridge, rhs = ridge[..., None], q[..., None]
    diagonal = None if config.preconditioner == "none" else ridge
    problem, scale = solver.pose(apply_matrix, rhs, config)
    found = solver.solve(problem, (solver.exact_steps(apply_matrix, rhs, diagonal=diagonal),))
    if config.max_steps:
        x, residual = found.solution * scale, found.residual * scale
    else:
        x, residual = rhs, rhs - apply_matrix(rhs)
    report = SolveReport(found.num_steps[..., 0, 0], solver.relative_size(residual, rhs)[..., 0, 0])
    return products.transposed_times(kv, x)[..., 0], MesaState(kk, kv), report
