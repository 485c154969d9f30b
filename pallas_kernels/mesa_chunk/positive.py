"""Small symmetric positive definite matrices by blocks: what costs is matrix products, which every platform does well.

A library's decompositions would be as fast on a CPU at best, and ten times slower where its threads and XLA's wait for
each other. Where a matrix is not positive definite the results hold NaN.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.mesa_chunk.products import times, times_transposed, transpose, transposed_times

LEAF = 32  # rows of a block that is eliminated row by row; of 16, 32 and 64 the fastest on a CPU


def inverse(a: jax.Array) -> jax.Array:
    """Returns a^-1 [..., n, n]."""
    n = a.shape[-1]
    if n <= LEAF:
        root = inverse_root(a)
        return transposed_times(root, root)
    m = n // 2
    first, across = inverse(a[..., :m, :m]), a[..., :m, m:]
    spread = times(first, across)
    last = inverse(a[..., m:, m:] - transposed_times(across, spread))
    corner = -times(spread, last)
    return _blocks(first - times_transposed(corner, spread), corner, transpose(corner), last)


def inverse_root(a: jax.Array) -> jax.Array:
    """Returns L^-1 [..., n, n], L the lower Cholesky factor of a; row i depends on the first i + 1 rows of a alone."""
    n = a.shape[-1]
    if n <= LEAF:
        return _eliminate(a)
    m = n // 2
    first = inverse_root(a[..., :m, :m])
    across = times(first, a[..., :m, m:])
    last = inverse_root(a[..., m:, m:] - transposed_times(across, across))
    corner = -times(times_transposed(last, across), first)
    return _blocks(first, jnp.zeros_like(transpose(corner)), corner, last)


def _eliminate(a: jax.Array) -> jax.Array:
    """Returns L^-1: what becomes of the identity under the row operations that turn a into L'."""
    n = a.shape[-1]
    i = jax.lax.broadcasted_iota(jnp.int32, (n, 1), 0)

    def take_row(j, both):
        row, column = (jax.lax.dynamic_slice_in_dim(both, j, 1, axis) for axis in (-2, -1))
        size = jax.lax.rsqrt(jax.lax.dynamic_slice_in_dim(row, j, 1, axis=-1))
        below = jnp.where(i > j, column * size, 0)
        return jnp.where(i == j, row * size, both - below * (row * size))

    identity = jnp.broadcast_to(jnp.eye(n, dtype=a.dtype), a.shape)
    return jax.lax.fori_loop(0, n, take_row, jnp.concatenate([a, identity], axis=-1))[..., n:]


def inverse_work(n: int) -> float:
    """Returns the multiply-adds of `inverse`."""
    return inverse_root_work(n) + n**3 if n <= LEAF else inverse_work(n // 2) + inverse_work(n - n // 2) + n**3 / 2


def inverse_root_work(n: int) -> float:
    """Returns the multiply-adds of `inverse_root`."""
    if n <= LEAF:
        return 2 * n**3
    return inverse_root_work(n // 2) + inverse_root_work(n - n // 2) + n**3 / 2


def _blocks(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> jax.Array:
    """Returns the matrix of the blocks a and b above c and d."""
    return jnp.concatenate([jnp.concatenate([a, b], axis=-1), jnp.concatenate([c, d], axis=-1)], axis=-2)
