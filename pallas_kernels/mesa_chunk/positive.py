"""Small symmetric positive definite matrices by blocks: what costs is matrix products, which every platform does well.

A library's decompositions would be as fast on a CPU at best, and ten times slower where its threads and XLA's wait for
each other. Where a matrix is not positive definite the results hold NaN.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.mesa_chunk.products import times, times_transposed, transpose, transposed_times

LEAF = 32  # rows of a block that is eliminated row by row; 32 is faster than 16 on a CPU


def inverse(a: jax.Array) -> jax.Array:
    """Returns a^-1 [..., n, n].

    Of its root, although Schur complements of inverses are fewer products: those lose the square of the condition.
    """
    root, m = inverse_root(a), a.shape[-1] // 2
    first, below, last = root[..., :m, :m], root[..., m:, :m], root[..., m:, m:]
    corner = transposed_times(last, below)  # above it the root is 0
    above = transposed_times(first, first) + transposed_times(below, below)
    return _blocks(above, transpose(corner), corner, transposed_times(last, last))


def inverse_root(a: jax.Array, least: float = 0.0) -> jax.Array:
    """Returns L^-1 [..., n, n], L the lower Cholesky factor of a; row i depends on the first i + 1 rows of a alone.

    Args:
      a: the matrix.
      least: a number below its smallest eigenvalue, if one is known; squares on the diagonal of L that rounding has
        brought below it are raised to it.
    """
    n = a.shape[-1]
    if n <= LEAF:
        return _eliminate(a, least)
    m = n // 2
    first = inverse_root(a[..., :m, :m], least)
    across = times(first, a[..., :m, m:])
    last = inverse_root(a[..., m:, m:] - transposed_times(across, across), least)
    corner = -times(times_transposed(last, across), first)
    return _blocks(first, jnp.zeros_like(transpose(corner)), corner, last)


def _eliminate(a: jax.Array, least: float) -> jax.Array:
    """Returns L^-1: what becomes of the identity under the row operations that turn a into L'."""
    n = a.shape[-1]
    i = jax.lax.broadcasted_iota(jnp.int32, (n, 1), 0)

    def take_row(j, both):
        row, column = (jax.lax.dynamic_slice_in_dim(both, j, 1, axis) for axis in (-2, -1))
        pivot = jax.lax.dynamic_slice_in_dim(row, j, 1, axis=-1)
        size = jax.lax.rsqrt(jnp.maximum(pivot, least) if least else pivot)
        below = jnp.where(i > j, column * size, 0)
        return jnp.where(i == j, row * size, both - below * (row * size))

    identity = jnp.broadcast_to(jnp.eye(n, dtype=a.dtype), a.shape)
    return jax.lax.fori_loop(0, n, take_row, jnp.concatenate([a, identity], axis=-1))[..., n:]


def inverse_work(n: int) -> float:
    """Returns the multiply-adds of `inverse`."""
    return inverse_root_work(n) + n**3 / 2


def inverse_root_work(n: int) -> float:
    """Returns the multiply-adds of `inverse_root`."""
    if n <= LEAF:
        return 2 * n**3
    return inverse_root_work(n // 2) + inverse_root_work(n - n // 2) + n**3 / 2


def _blocks(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> jax.Array:
    """Returns the matrix of the blocks a and b above c and d."""
    return jnp.concatenate([jnp.concatenate([a, b], axis=-1), jnp.concatenate([c, d], axis=-1)], axis=-2)
