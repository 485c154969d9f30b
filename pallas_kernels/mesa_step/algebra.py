"""The solve of one token, whatever holds its matrix."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.mesa_chunk import solver
from pallas_kernels.mesa_chunk.methods import exact_steps
from pallas_kernels.mesa_chunk.solver import Solution, SolverConfig


def solve(
    rhs: jax.Array,
    times_state: Callable[[jax.Array], jax.Array],
    ridge: jax.Array,
    config: SolverConfig,
) -> Solution:
    """Solves (H + Lambda) x = rhs for columns [..., k, g], each with a matrix H of its own; without a solve x is rhs.

    Products are in float32 whatever the configuration, since decoding waits for memory, not for them; and one token has
    nobody to share a factor with, so that "nested" means what it means in a short chunk.

    Args:
      rhs, ridge: [..., k, g].
      times_state: maps x [..., k, g] to H x.
      config: of the solve.
    """

    def apply_matrix(x):
        return times_state(x) + ridge * x

    if not config.max_steps:
        return Solution(rhs, rhs - apply_matrix(rhs), jnp.zeros_like(rhs[..., :1, :], jnp.int32))
    problem, scale = solver.pose(apply_matrix, rhs, config)
    diagonal = None if config.preconditioner == "none" else ridge
    found = solver.solve(problem, (exact_steps([apply_matrix], rhs, diagonal=diagonal),))
    return Solution(found.solution * scale, found.residual * scale, found.num_steps)
