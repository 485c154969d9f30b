"""The TPU kernel for roots of many small matrices: one matrix per lane, so that no step waits for a sum or a product.

Eliminating one matrix row by row waits for each pivot to cross lanes and rows; with an entry of 128 matrices in one
register row nothing crosses lanes, and everything between two pivots is elementwise.
"""

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.manual import result_like
from pallas_kernels.mesa_chunk import pallas_tpu_kernel
from pallas_kernels.mesa_chunk.pallas_tpu_tiles import LANES, MEBIBYTE

SUBLANES = 8
# groups of columns that are worked on for each time that factors are spread over registers, as many as these hold
OWN_AT_ONCE, BELOW_AT_ONCE = 4, 8


def inverse_root(
    a: jax.Array,
    least: float = 0.0,
    *,
    wanted: jax.Array | None = None,
    vmem_bytes: int = 64 * MEBIBYTE,
    interpret=False,
) -> jax.Array:
    """Returns what positive.inverse_root does, for float32 matrices [..., n, n].

    Args:
      a, least: as there.
      wanted: bool [...], all if it is None. Where none is wanted of 128 in a row, they come back as 0.
      vmem_bytes: what the compiler may use, of which 128 matrices take five times their size.
      interpret: how to run.

    Raises:
      ValueError: n is not a multiple of 8.
    """
    n, num = a.shape[-1], math.prod(a.shape[:-2])
    if n % SUBLANES:
        raise ValueError(f"mesa_chunk_roots: matrices have {n} rows, the kernel takes multiples of {SUBLANES}.")
    rows, num_blocks = a.reshape(num * n, n), pl.cdiv(num, LANES)
    wanted = jnp.ones(num, bool) if wanted is None else wanted.reshape(num)
    wanted = jnp.pad(wanted, (0, num_blocks * LANES - num)).reshape(num_blocks, 1, LANES)
    block = pl.BlockSpec((LANES * n, n), lambda i: (i, 0))
    roots = pl.pallas_call(
        functools.partial(_kernel, least=least),
        grid=(num_blocks,),
        in_specs=[pl.BlockSpec((1, 1, 1), lambda i: (i, 0, 0)), block],
        out_specs=block,
        out_shape=result_like(rows, rows.shape),
        # rows are not a power of two apart, since loads at the same place of several would get into each other's way
        scratch_shapes=[pltpu.VMEM((n, n + SUBLANES, LANES), jnp.float32)],
        cost_estimate=pl.CostEstimate(
            flops=num * n**3, transcendentals=num * n, bytes_accessed=2 * rows.size * rows.dtype.itemsize
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=vmem_bytes),
        interpret=interpret,
        name="mesa_chunk_roots",
    )(jnp.any(wanted, axis=-1, keepdims=True).astype(jnp.float32), rows)
    return roots.reshape(a.shape)


def _kernel(wanted_ref, a_ref, root_ref, memory, *, least: float) -> None:
    """Takes blocks [l * n, n] of matrices below each other, and turns them so that each has a lane of memory."""
    take = functools.partial(_take_roots, a_ref, root_ref, memory, least)
    pallas_tpu_kernel.take_if(jnp.any(wanted_ref[...] > 0), take, (root_ref,))


def _take_roots(a_ref, root_ref, memory, least: float) -> None:
    n = memory.shape[0]

    def load(i, _):
        memory[i, :n] = a_ref[pl.ds(i, LANES, stride=n), :].T

    def store(i, _):
        root_ref[pl.ds(i, LANES, stride=n), :] = memory[i, :n].T

    lax.fori_loop(0, n, load, None, unroll=4)
    _eliminate(memory, least)
    lax.fori_loop(0, n, store, None, unroll=4)


def _eliminate(memory, least: float) -> None:
    """Turns symmetric matrices [n, n, l] into their L^-1 by row operations, a group of eight rows at a time.

    A row holds at once what is left of the matrix, behind the columns of its group, and what the operations so far have
    made of the identity, up to there: neither is needed where the other is. What a row is multiplied by when it is
    taken off another one stands in it, since the matrix is symmetric.

    Loops have a fixed length and branches in them, although half of their turns have nothing to do: the compiler's cost
    estimate counts no others.
    """
    groups = _groups(memory)

    def take(g, _):
        own, sizes, into = _own_columns(memory, g, least)
        _for_columns(memory, OWN_AT_ONCE, functools.partial(_reduce_own, memory, g, sizes, into))
        for i, columns in zip(_rows(g), own, strict=True):
            memory[i, _columns(g), :] = columns
        lax.fori_loop(0, groups, lambda k, _: pl.when(k > g)(lambda: _reduce_below(memory, g, k)), None)
        lax.fori_loop(0, groups, lambda v, _: pl.when(v > g)(lambda: _clear(memory, g, v)), None)

    lax.fori_loop(0, groups, take, None)


def _own_columns(memory, g, least: float) -> tuple[list[jax.Array], list[jax.Array], dict[tuple[int, int], jax.Array]]:
    """Returns what becomes of the columns of group g in its own rows, which alone say how these go into each other.

    Returns:
      The columns of each row, the factor of each row, and for (i, j) how often row j goes into row i; [8, l] each.
    """
    own = [memory[i, _columns(g), :] for i in _rows(g)]
    place = lax.broadcasted_iota(jnp.int32, own[0].shape, 0)
    sizes, into = [], {}
    for j in range(SUBLANES):
        pivot = _spread(own[j], j)
        sizes.append(lax.rsqrt(jnp.maximum(pivot, least) if least else pivot))
        own[j] = jnp.where(place == j, sizes[j], own[j] * sizes[j])
        for i in range(j + 1, SUBLANES):
            into[i, j] = _spread(own[j], i)
            own[i] = jnp.where(place == j, 0, own[i]) - into[i, j] * own[j]
    return [jnp.where(place <= j, x, 0) for j, x in enumerate(own)], sizes, into


def _reduce_own(memory, g, sizes, into, columns) -> Iterator[tuple[int, jax.Array]]:
    """Yields the rows of group g after they were taken off each other in these columns."""
    rows = [memory[i, columns, :] for i in _rows(g)]
    for j in range(SUBLANES):
        rows[j] = rows[j] * sizes[j]
        for i in range(j + 1, SUBLANES):
            rows[i] = rows[i] - into[i, j] * rows[j]
    yield from zip(_rows(g), rows, strict=True)


def _reduce_below(memory, g, k) -> None:
    """Takes the rows of group g off those of group k, whose columns of group g so far belong to the matrix."""
    factors = [memory[j, _columns(k), :] for j in _rows(g)]
    for i in _rows(k):
        memory[i, _columns(g), :] = jnp.zeros_like(factors[0])
    for place, i in enumerate(_rows(k)):
        into = [_spread(factor, place) for factor in factors]

        def reduce(columns, i=i, into=into):
            taken = [x * memory[j, columns, :] for x, j in zip(into, _rows(g), strict=True)]
            yield i, memory[i, columns, :] - _tree_sum(taken)

        _for_columns(memory, BELOW_AT_ONCE, reduce)


def _for_columns(memory, at_once: int, reduce: Callable) -> None:
    """Stores the rows that `reduce` yields of groups of columns, several groups at a time."""
    groups = _groups(memory)
    wide = math.gcd(at_once, groups)

    def take(turn, _):
        several = [_columns(turn * wide + v) for v in range(wide)]
        found = [(i, columns, row) for columns in several for i, row in reduce(columns)]
        for i, columns, row in found:  # after all of them, since no load overtakes a store
            memory[i, columns, :] = row

    lax.fori_loop(0, groups // wide, take, None)


def _clear(memory, g, v) -> None:
    """Forgets the matrix behind the columns of group g, in its rows."""
    for i in _rows(g):
        memory[i, _columns(v), :] = jnp.zeros((SUBLANES, memory.shape[-1]), jnp.float32)


def _groups(memory) -> int:
    return memory.shape[0] // SUBLANES


def _rows(g) -> list:
    return [g * SUBLANES + i for i in range(SUBLANES)]


def _columns(g):
    return pl.ds(pl.multiple_of(g * SUBLANES, SUBLANES), SUBLANES)


def _spread(rows: jax.Array, i: int) -> jax.Array:
    """Returns row i of [8, l] in place of all eight."""
    return jnp.broadcast_to(rows[i : i + 1], rows.shape)


def _tree_sum(terms: list[jax.Array]) -> jax.Array:
    """Returns the sum of a power of two terms, few of which wait for each other."""
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]
