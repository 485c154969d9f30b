"""The nested preconditioner: one factor that nearly solves all tokens of a chunk (README.md, section 3)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mesa_chunk import solver
from pallas_kernels.mesa_chunk.algebra import Decays, Tile, matrix, places, sum_down
from pallas_kernels.mesa_chunk.products import split, times, times_parts, transpose
from pallas_kernels.mesa_chunk.solver import Method, Solution, SolverConfig

# The frozen ridge stands in the middle of the chunk's decay, on a logarithmic scale, but not below this.
LOWEST_LOG_RIDGE = -0.35
# Tiles of which a token keeps less than this share of the frozen ridge forget so fast that other steps are as few.
LEAST_KEPT = 0.1
# Tokens per key channel below which the factor costs more than the steps it saves.
LEAST_TOKENS = 0.125


class Factor(NamedTuple):
    """What solves the frozen systems M_t of a tile: M_t^-1 r_t = B r_t - sum of w_s (w_s . r_t) over s up to t."""

    inverse: jax.Array  # [k, k], B: of the state before the chunk with the frozen ridge
    rows: jax.Array  # [c, k], w_s
    usable: jax.Array  # [1, 1] bool; if not, both are 0


class Factorise(NamedTuple):
    """The two dense steps of a factor, as the platform does them best; NaN where a matrix is not positive.

    Attributes:
      invert: maps a symmetric positive definite matrix [k, k] to its inverse.
      whiten: maps such a matrix [c, c] and rows [c, k] to L^-1 rows, L its Cholesky factor.
    """

    invert: Callable[[jax.Array], jax.Array]
    whiten: Callable[[jax.Array, jax.Array], jax.Array]


def serves(c: int, k: int) -> bool:
    """Returns whether a chunk of c tokens is long enough for a factor of key size k; one token never is."""
    return c > 1 and c >= LEAST_TOKENS * k


def is_worth_it(decays: Decays) -> jax.Array:
    """Returns [1, 1] bool: whether the tile remembers enough of what it began with."""
    kept = decays.log_ahead - _log_ridge(decays)
    return jnp.min(kept, axis=-1, keepdims=True) >= jnp.log(LEAST_KEPT)


def factor(tile: Tile, factorise: Factorise) -> Factor:
    """Factors the frozen systems of a tile; what is not finite or not worth it is marked, and holds zeros."""
    decays, ridge = tile.decays, jnp.exp(_log_ridge(tile.decays)) * tile.ridge
    inverse = factorise.invert(_state_weight(decays) * tile.kk + _diagonal(ridge[..., :1]))
    keys = transpose(tile.k) * jnp.sqrt(tile.beta * jnp.exp(decays.log_ahead))
    solved = jnp.where(_in_first(decays), times(inverse, keys), keys / ridge)
    gram = jnp.where(decays.together, times(transpose(solved), keys), 0)
    i, j = places(gram.shape[-1])
    rows = factorise.whiten(gram + jnp.where(i == j, 1.0, 0.0), transpose(solved))
    # a sum is finite only if all its terms are
    total = jnp.sum(sum_down(inverse), axis=-1, keepdims=True) + jnp.sum(sum_down(rows), axis=-1, keepdims=True)
    usable = is_worth_it(decays) & jnp.isfinite(total)
    return Factor(jnp.where(usable, inverse, 0), jnp.where(usable, rows, 0), usable)


def no_factor(tile: Tile) -> Factor:
    """Returns what stands for the factor of a tile that is not worth one."""
    return Factor(jnp.zeros_like(tile.kk), jnp.zeros_like(tile.k), jnp.zeros_like(tile.decays.through, dtype=bool))


def solve_tile(rhs: jax.Array, tile: Tile, found: Factor | None, config: SolverConfig) -> Solution:
    """Solves (H_t + Lambda) x_t = rhs_t [k, c] for every token of the chunk.

    With the factor where there is a usable one, and what is left with steps on the matrix itself: where little is
    remembered the ridge is most of it.
    """
    diagonal = None if config.preconditioner == "none" else tile.ridge
    methods = [solver.exact_steps(matrix(tile, config.precision), rhs, config.precision, diagonal)]
    if found is not None:
        methods.insert(0, _nested(tile, found, config.precision))
    return solver.solve(matrix(tile), rhs, tuple(methods), config)


def _nested(tile: Tile, found: Factor, precision: str) -> Method:
    """Steps that need the factor only: A_t is M_t and a multiple of the ridge, and M_t times a direction is known.

    The direction is added up of preconditioned residuals M_t^-1 r, so M_t times it is the same sum of residuals.
    """
    decays, first = tile.decays, _in_first(tile.decays)
    ahead, ridge = jnp.exp(decays.log_ahead), jnp.exp(_log_ridge(decays)) * tile.ridge
    shift = ahead * tile.ridge - ridge
    inverse, rows, columns = (split(x, precision) for x in (found.inverse, found.rows, transpose(found.rows)))

    def search(r):
        taken = jnp.where(decays.visible, times_parts(rows, r), 0)
        return jnp.where(first, times_parts(inverse, r), r / ridge) - times_parts(columns, taken), r

    return Method(
        search=search,
        image=lambda direction, frozen: frozen + shift * direction,
        wanted=found.usable & jnp.ones_like(first),
        scale=ahead,
        reduction=solver.reduction(precision, tile.k.dtype),
    )


def _log_ridge(decays: Decays) -> jax.Array:
    """Log of the frozen factor of the ridge [1, c], in the frame of the end of each token's document."""
    return jnp.maximum(decays.log_whole / 2, LOWEST_LOG_RIDGE)


def _in_first(decays: Decays) -> jax.Array:
    """[1, c] bool: whether a token is in the document of the chunk's first token, to which the state belongs if any."""
    return decays.together[..., :1, :]


def _state_weight(decays: Decays) -> jax.Array:
    """[1, 1] decay from the state before the chunk to the end of the first token's document; 0 if it sees no state."""
    return jnp.where(decays.into[..., :1] > 0, jnp.exp(decays.log_whole[..., :1]), 0)


def _diagonal(column: jax.Array) -> jax.Array:
    """Returns the matrix [k, k] with this diagonal [k, 1]."""
    i, j = places(column.shape[-2])
    return jnp.where(i == j, column, 0)
