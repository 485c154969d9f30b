"""Matrix products at a stated precision, of values that may sit in a kernel.

The matrix units of accelerators multiply bfloat16. float32 costs them six passes over three parts of each operand;
three passes over the two leading parts keep 16 bits, one pass keeps 8. The first operand is split by `split`, once for
all its products.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

PRECISIONS = ("float32", "bfloat16_3x", "bfloat16")
SIX_PASSES = "bfloat16_6x"  # float32 by hand: left to itself, the compiler for TPUs splits both operands in every step
NUM_PARTS = {"bfloat16": 1, "bfloat16_3x": 2, SIX_PASSES: 3}

COLUMNS = 16  # of a stored matrix that are loaded at once; the least there may be


@dataclasses.dataclass(frozen=True)
class Stored:
    """A matrix that stays in a kernel's memory, at some precision.

    Each product loads it anew, a few columns at a time: the registers of a GPU hold no such matrix.
    """

    ref: jax.Ref  # [n, m]
    precision: str = "float32"
    transposed: bool = False

    @property
    def dtype(self) -> jnp.dtype:
        """Of the entries."""
        return self.ref.dtype

    def times(self, y: jax.Array) -> jax.Array:
        """Returns the product with y [m, c]; transposed, with y [n, c]."""
        first, *others = lax.split(y, [COLUMNS] * (y.shape[0] // COLUMNS), axis=0)
        total = self._times_piece(0, first)
        for i, piece in enumerate(others, 1):  # one after another: products that wait to be added up take registers
            total = total + self._times_piece(i, piece)
        return total

    def _times_piece(self, i: int, piece: jax.Array) -> jax.Array:
        taken = slice(i * COLUMNS, (i + 1) * COLUMNS)
        columns = transpose(self.ref[taken, :]) if self.transposed else self.ref[:, taken]
        return times_parts(split(columns, self.precision), piece)


Parts = tuple[jax.Array, ...] | Stored
"""A matrix at some precision: itself, or its leading bfloat16 parts, or where they are."""


def split(x: jax.Array | Stored, precision: str) -> Parts:
    """Returns the parts of x [..., n, m] that products at this precision use; float64 stays whole.

    Parts that would be below 1e-38 are lost, so entries below 1e-33 keep fewer digits; above 3.39e38 they overflow.
    """
    if isinstance(x, Stored):
        return dataclasses.replace(x, precision=precision)
    if precision == "float32" or x.dtype == jnp.float64:
        return (x,)
    parts = []
    for _ in range(NUM_PARTS[precision] - 1):
        # rounded bit by bit: compilers may take a cast there and back for nothing at all, and then nothing is left over
        bits = (lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(0x8000)) & jnp.uint32(0xFFFF0000)
        part = lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return (*parts, x.astype(jnp.bfloat16))


def split_for(matrices: Sequence[jax.Array | Stored], precisions: Sequence[str]) -> list[list[Parts]]:
    """Returns for each precision, the first of which is the finest, the parts of all matrices; they are split once."""
    finest = [split(x, precisions[0]) for x in matrices]
    return [[_leading(parts, precision) for parts in finest] for precision in precisions]


def _leading(parts: Parts, precision: str) -> Parts:
    """Returns those of a matrix's parts that products at this precision use, which is no finer than theirs."""
    if isinstance(parts, Stored):
        return split(parts, precision)
    return parts[: NUM_PARTS[precision]] if parts[0].dtype == jnp.bfloat16 else split(parts[0], precision)


def times_parts(x: Parts, y: jax.Array) -> jax.Array:
    """Returns x y [..., n, m] for x [..., n, k] and y [..., k, m], at the precision of x."""
    if isinstance(x, Stored):
        return x.times(y)
    if x[0].dtype == y.dtype:
        return times(x[0], y)
    (precision,) = (name for name, number in NUM_PARTS.items() if number == len(x))
    y_parts = split(y, precision)
    # what is left out is below what is kept; small terms first, those of one part of y together, which a matrix unit
    # holds while the parts of x pass, and each added before the next is begun: compilers keep to the order they get
    pairs = [(a, b) for j, b in reversed(list(enumerate(y_parts))) for a in reversed(x[: len(x) - j])]
    return functools.reduce(jnp.add, (_multiply(a, b, -1, -2) for a, b in pairs))


def times_marks(x: jax.Array, marks: jax.Array, precision: str) -> jax.Array:
    """Returns x y [..., n, m] for the y [..., k, m] that is 1 where marked, bool, and else 0: of it one part is all."""
    parts = split(x, precision)
    assert not isinstance(parts, Stored)  # for type checkers
    y = marks.astype(jnp.float32).astype(parts[0].dtype)  # compilers for TPUs lay marks out for numbers of their size
    return functools.reduce(jnp.add, (_multiply(part, y, -1, -2) for part in reversed(parts)))


def times(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x y [..., n, m] for x [..., n, k] and y [..., k, m], in full precision."""
    return _multiply(x, y, -1, -2)


def times_transposed(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x y' [..., n, m] for x [..., n, k] and y [..., m, k], in full precision."""
    return _multiply(x, y, -1, -1)


def transposed_times(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x' y [..., n, m] for x [..., k, n] and y [..., k, m], in full precision."""
    return _multiply(x, y, -2, -2)


def transpose(x: jax.Array) -> jax.Array:
    """Returns x' [..., m, n] for x [..., n, m]."""
    if isinstance(x, Stored):
        return dataclasses.replace(x, transposed=not x.transposed)
    return jnp.swapaxes(x, -1, -2)


def _multiply(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    batch = tuple(range(x.ndim - 2))
    dimensions = (((x.ndim + x_axis,), (y.ndim + y_axis,)), (batch, batch))
    whole = None if x.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    return lax.dot_general(x, y, dimensions, precision=whole, preferred_element_type=wide)
