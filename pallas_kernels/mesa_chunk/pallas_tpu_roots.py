"""The TPU kernel for roots of many small matrices: one matrix per lane, so that no step waits for a sum or a product.

Eliminating one matrix row by row waits for each pivot to cross lanes and rows; with an entry of 128 matrices in one
register row nothing crosses lanes, and everything between two pivots is elementwise.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mesa_chunk.pallas_tpu_tiles import LANES, MEBIBYTE

SUBLANES = 8
AT_ONCE = 4  # rows whose factors stay in registers


def inverse_root(a: jax.Array, least: float = 0.0, *, vmem_bytes: int = 64 * MEBIBYTE, interpret=False) -> jax.Array:
    """Returns what positive.inverse_root does, for float32 matrices [..., n, n].

    `vmem_bytes` is what the compiler may use, of which 128 matrices take five times their size.

    Raises:
      ValueError: n is not a multiple of 8.
    """
    n, num = a.shape[-1], math.prod(a.shape[:-2])
    if n % SUBLANES:
        raise ValueError(f"mesa_chunk_roots: matrices have {n} rows, the kernel takes multiples of {SUBLANES}.")
    rows = a.reshape(num * n, n)
    block = pl.BlockSpec((LANES * n, n), lambda i: (i, 0))
    roots = pl.pallas_call(
        functools.partial(_kernel, least=least),
        grid=(pl.cdiv(num, LANES),),
        in_specs=[block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(rows.shape, jnp.float32),
        scratch_shapes=[pltpu.VMEM((n, n, LANES), jnp.float32)],
        cost_estimate=pl.CostEstimate(
            flops=num * n**3, transcendentals=num * n, bytes_accessed=2 * rows.size * rows.dtype.itemsize
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=vmem_bytes),
        interpret=interpret,
        name="mesa_chunk_roots",
    )(rows)
    return roots.reshape(a.shape)


def _kernel(a_ref, root_ref, memory, *, least: float) -> None:
    """Takes blocks [l * n, n] of matrices below each other, and turns them so that each has a lane of memory."""
    n = memory.shape[0]

    def load(i, _):
        memory[i] = a_ref[pl.ds(i, LANES, stride=n), :].T

    def store(i, _):
        root_ref[pl.ds(i, LANES, stride=n), :] = memory[i].T

    lax.fori_loop(0, n, load, None, unroll=4)
    _eliminate(memory, least)
    lax.fori_loop(0, n, store, None, unroll=4)


def _eliminate(memory, least: float) -> None:
    """Turns symmetric matrices [n, n, l] into their L^-1 by row operations, eight rows at a time.

    A row holds at once what is left of the matrix, behind its eight columns, and what the operations so far have made
    of the identity, up to there: neither is needed where the other is. What a row is multiplied by when it is taken off
    another one stands in it, since the matrix is symmetric.

    Loops have a fixed length and branches in them, although half of their turns have nothing to do: the compiler's cost
    estimate counts no others.
    """
    n, _, lanes = memory.shape
    groups, place = n // SUBLANES, lax.broadcasted_iota(jnp.int32, (SUBLANES, lanes), 0)
    nothing = jnp.zeros((SUBLANES, lanes), jnp.float32)

    def columns(v):
        return pl.ds(pl.multiple_of(v * SUBLANES, SUBLANES), SUBLANES)

    def take_group(g, _):
        taken = [g * SUBLANES + i for i in range(SUBLANES)]
        # the eight columns of the eight rows alone say how they go into each other
        own = [memory[i, columns(g), :] for i in taken]
        sizes, into = [], {}
        for j in range(SUBLANES):
            pivot = _spread(own[j], j)
            sizes.append(lax.rsqrt(jnp.maximum(pivot, least) if least else pivot))
            own[j] = jnp.where(place == j, sizes[j], own[j] * sizes[j])
            for i in range(j + 1, SUBLANES):
                into[i, j] = _spread(own[j], i)
                own[i] = jnp.where(place == j, 0, own[i]) - into[i, j] * own[j]

        def reduce_taken(v, _):
            rows = [memory[i, columns(v), :] for i in taken]
            for j in range(SUBLANES):
                rows[j] = rows[j] * sizes[j]
                for i in range(j + 1, SUBLANES):
                    rows[i] = rows[i] - into[i, j] * rows[j]
            for i, row in zip(taken, rows, strict=True):
                memory[i, columns(v), :] = row

        lax.fori_loop(0, groups, reduce_taken, None)
        for j, i in enumerate(taken):
            memory[i, columns(g), :] = jnp.where(place <= j, own[j], 0)

        def reduce_group(k, _):
            @pl.when(k > g)
            def _():
                for i in range(SUBLANES):
                    memory[k * SUBLANES + i, columns(g), :] = nothing
                factors = [memory[j, columns(k), :] for j in taken]
                for some in range(0, SUBLANES, AT_ONCE):
                    _take_off(range(some, some + AT_ONCE), k, factors)

        def _take_off(places, k, factors):
            into = [[_spread(factor, i) for factor in factors] for i in places]

            def reduce(v, _):
                rows = [memory[j, columns(v), :] for j in taken]
                for i, row_into in zip(places, into, strict=True):
                    products = [factor * row for factor, row in zip(row_into, rows, strict=True)]
                    memory[k * SUBLANES + i, columns(v), :] -= _tree_sum(products)

            lax.fori_loop(0, groups, reduce, None)

        lax.fori_loop(0, groups, reduce_group, None)

        def clear(v, _):
            @pl.when(v > g)
            def _():
                for i in taken:
                    memory[i, columns(v), :] = nothing

        lax.fori_loop(0, groups, clear, None)

    lax.fori_loop(0, groups, take_group, None)


def _spread(rows: jax.Array, i: int) -> jax.Array:
    """Returns row i of [8, l] in place of all eight."""
    return jnp.broadcast_to(rows[i : i + 1], rows.shape)


def _tree_sum(terms: list[jax.Array]) -> jax.Array:
    """Returns the sum of a power of two terms, few of which wait for each other."""
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]
