"""How steps of conjugate gradient are taken: on the matrix or with a factor, and in what precision."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mesa_chunk.products import NUM_PARTS, PRECISIONS, SIX_PASSES

MIXED = "mixed"
STEP_PRECISIONS = (*PRECISIONS, MIXED)


class Level(NamedTuple):
    """The products of a step at one precision.

    Attributes:
      search: maps the residual [k, c] to the preconditioned residual, and to whatever else follows the recurrence of
        search directions: it is added up with the same weights as they are.
      image: maps a direction, as added up of what `search` returns, to scale * A direction.
      until: a token goes on to the next level, if there is one, once its residual is at most so many times what it aims
        at.
    """

    search: Callable[[jax.Array], tuple[jax.Array, ...]]
    image: Callable[..., jax.Array]
    until: float


class Method(NamedTuple):
    """One way to take conjugate-gradient steps on A x = b, each token's equation multiplied by `scale`.

    Attributes:
      levels: of falling precision. What a step rounds off is in proportion to the residual that it begins with, so the
        less of it is left the fewer digits do: conjugate gradient is then as good as with all of them (Simoncini and
        Szyld, Theory of inexact Krylov subspace methods, 2003).
      wanted: [1, c] tokens that this method is to solve.
      scale: [1, c] factor of each token's equation, > 0.
      reduction: how far a round of steps may reduce the residual before it is computed anew; what the recurrence says
        below that is rounding.
      num_directions: how many arrays `search` returns.
    """

    levels: tuple[Level, ...]
    wanted: jax.Array
    scale: jax.Array
    reduction: float
    num_directions: int = 1


def reduction(precision: str, dtype) -> float:
    """Returns to what share of itself a round may bring the residual before the recurrence has lost it."""
    if dtype == jnp.float64:
        return 1e-13
    return {"float32": 1e-5, SIX_PASSES: 1e-5, "bfloat16_3x": 5e-5, "bfloat16": 1e-1}[precision]


def levels_of(
    precisions: Sequence[str], searches: Sequence[Callable], images: Sequence[Callable], share: float
) -> tuple[Level, ...]:
    """Returns the levels of these precisions.

    A coarser one begins where what it rounds off, the residual times its unit roundoff, is at most this share of what a
    token aims at. The share leaves room for what the condition makes of it.
    """
    until = [*(share * 2.0 ** (8 * NUM_PARTS[coarser]) for coarser in precisions[1:]), 0.0]
    return tuple(map(Level, searches, images, until))


def exact_steps(
    matrices: Sequence[Callable[[jax.Array], jax.Array]],
    rhs: jax.Array,
    precisions: Sequence[str] = ("float32",),
    diagonal=None,
) -> Method:
    """Conjugate gradient on the matrix itself, for all tokens; `matrices` apply it in those precisions.

    Preconditioned by a diagonal [k, 1], if one is given. In full precision it begins anew only where the recurrence has
    reached rounding: a new start loses what the directions know of each other.
    """
    ones = jnp.ones(row_shape(rhs), rhs.dtype)
    weights = None if diagonal is None else 1 / diagonal
    exact = precisions[0] in ("float32", SIX_PASSES) or rhs.dtype == jnp.float64

    def search(r):
        return (r if weights is None else weights * r,)

    return Method(
        levels=levels_of(precisions, [search] * len(precisions), matrices, share=0.2),
        wanted=ones > 0,
        scale=ones,
        reduction=float(jnp.finfo(rhs.dtype).eps) if exact else reduction(precisions[0], rhs.dtype),
    )


def row_shape(x: jax.Array) -> tuple[int, ...]:
    """Returns the shape [..., 1, c] of one number per token, for x [..., k, c]."""
    return *x.shape[:-2], 1, x.shape[-1]
