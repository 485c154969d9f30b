"""One token in jax.numpy: update both states, solve with the new one, read out."""

import jax
import jax.numpy as jnp

from pallas_kernels.mesa_chunk import algebra
from pallas_kernels.mesa_chunk.contract import MesaState, SolveReport
from pallas_kernels.mesa_chunk.solver import SolverConfig, conjugate_gradient, relative_residual


def forward(
    q, k, v, log_decay, beta, ridge, state: MesaState, *, solver: SolverConfig, with_report: bool
) -> tuple[jax.Array, MesaState, SolveReport | None]:
    """Returns the output [b, h, v], the new state and, if asked for, the report."""
    keep = jnp.exp(log_decay)[..., None, None]
    weighted = (beta[..., None] * k)[..., :, None]
    kk = keep * state.kk + weighted * k[..., None, :]
    kv = keep * state.kv + weighted * v[..., None, :]

    def apply_matrix(x):
        return algebra.rows_times(x, kk) + x * ridge

    found = conjugate_gradient(apply_matrix, q, solver)
    x = found.solution if solver.max_steps else q
    report = SolveReport(found.num_steps, relative_residual(apply_matrix, q, x)) if with_report else None
    return algebra.rows_times(x, kv), MesaState(kk, kv), report
