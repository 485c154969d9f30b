"""Small symmetric positive definite matrices by blocks: what costs is matrix products, which every platform does well.

A library's decompositions would be as fast on a CPU at best, and ten times slower where its threads and XLA's wait for
each other. Where a matrix is not positive definite the results hold NaN.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mesa_chunk.products import times, times_transposed, transpose, transposed_times


class Leaf(NamedTuple):
    """How blocks are taken that are cut no further: up to what size, and by what, which is as `inverse_root`."""

    size: int
    inverse_root: Callable[[jax.Array, float], jax.Array]


def inverse(a: jax.Array) -> jax.Array:
    """Returns a^-1 [..., n, n].

    Of its root, although Schur complements of inverses are fewer products: those lose the square of the condition.
    """
    root, m = inverse_root(a), a.shape[-1] // 2
    first, below, last = root[..., :m, :m], root[..., m:, :m], root[..., m:, m:]
    corner = transposed_times(last, below)  # above it the root is 0
    above = transposed_times(first, first) + transposed_times(below, below)
    return _blocks(above, transpose(corner), corner, transposed_times(last, last))


def inverse_root(a: jax.Array, least: float = 0.0, leaf: Leaf | None = None) -> jax.Array:
    """Returns L^-1 [..., n, n], L the lower Cholesky factor of a; row i depends on the first i + 1 rows of a alone.

    Args:
      a: the matrix.
      least: a number below its smallest eigenvalue, if one is known; squares on the diagonal of L that rounding has
        brought below it are raised to it.
      leaf: how to take the last blocks; None eliminates them row by row.
    """
    n, leaf = a.shape[-1], leaf or BY_ROWS
    if n <= leaf.size:
        return leaf.inverse_root(a, least)
    m = n // 2
    first = inverse_root(a[..., :m, :m], least, leaf)
    across = times(first, a[..., :m, m:])
    last = inverse_root(a[..., m:, m:] - transposed_times(across, across), least, leaf)
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


BY_ROWS = Leaf(32, _eliminate)  # 32 rows are faster than 16 on a CPU


def inverse_work(n: int) -> float:
    """Returns the multiply-adds of `inverse`."""
    return inverse_root_work(n) + n**3 / 2


def inverse_root_work(n: int) -> float:
    """Returns the multiply-adds of `inverse_root`."""
    if n <= BY_ROWS.size:
        return 2 * n**3
    return inverse_root_work(n // 2) + inverse_root_work(n - n // 2) + n**3 / 2


def _blocks(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> jax.Array:
    """Returns the matrix of the blocks a and b above c and d."""
    return jnp.concatenate([jnp.concatenate([a, b], axis=-1), jnp.concatenate([c, d], axis=-1)], axis=-2)
