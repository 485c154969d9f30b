"""The definition: token by token, a dense solve each. JAX differentiates it; it shares no code with the fast paths."""

import jax
import jax.numpy as jnp

from pallas_kernels.mesa_chunk.contract import MesaState, SolveReport


def mesa_chunk_reference(
    q, k, v, log_decay, beta, ridge, state: MesaState, starts
) -> tuple[jax.Array, MesaState, SolveReport]:
    """Returns outputs [b, t, h, v], the final state and the report of the dense solves (no steps, only rounding).

    `starts` [b, t] is 1 where a document begins.
    """

    def token(state, inputs):
        q, k, v, log_decay, beta, start = inputs
        keep = jnp.where(start[:, None] == 1, 0.0, jnp.exp(log_decay))[..., None, None]
        strength = beta[..., None, None]
        kk = keep * state.kk + strength * k[..., :, None] * k[..., None, :]
        kv = keep * state.kv + strength * k[..., :, None] * v[..., None, :]
        matrix = kk + ridge[..., :, None] * jnp.eye(ridge.shape[-1], dtype=ridge.dtype)
        x = jnp.linalg.solve(matrix, q[..., None])[..., 0]
        out = jnp.einsum("bhk,bhkv->bhv", x, kv, precision="highest")
        return MesaState(kk, kv), (out, _relative_residual(matrix, x, q))

    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, log_decay, beta, starts))
    state, (out, residual) = jax.lax.scan(token, state, by_time)
    residual = jnp.moveaxis(residual, 0, 1)
    return jnp.moveaxis(out, 0, 1), state, SolveReport(jnp.zeros_like(residual, jnp.int32), residual)


def _relative_residual(matrix: jax.Array, x: jax.Array, q: jax.Array) -> jax.Array:
    """||q - A x|| / ||q||; a measurement, so no gradient passes."""
    matrix, x, q = jax.lax.stop_gradient((matrix, x, q))
    error = jnp.linalg.norm(q - jnp.einsum("bhij,bhj->bhi", matrix, x, precision="highest"), axis=-1)
    size = jnp.linalg.norm(q, axis=-1)
    return jnp.where(size > 0, error / jnp.where(size > 0, size, 1), 0)
