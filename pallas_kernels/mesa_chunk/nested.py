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


def make_factor(tile: Tile, factorise: Factorise) -> Factor:
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


def solve_tile(rhs: jax.Array, tile: Tile, factor: Factor | None, config: SolverConfig) -> Solution:
    """Solves (H_t + Lambda) x_t = rhs_t [k, c] for every token of the chunk."""
    problem, methods, scale = pose_tile(rhs, tile, factor, config)
    found = solver.solve(problem, methods)
    return Solution(found.solution * scale, found.residual * scale, found.num_steps)


def pose_tile(
    rhs: jax.Array, tile: Tile, factor: Factor | None, config: SolverConfig
) -> tuple[solver.Problem, tuple[Method, ...], jax.Array]:
    """Returns the problem of a tile, the methods to solve it with in this order, and the scale [1, c] of its solutions.

    The factor where there is a usable one, and for what is left steps on the matrix itself: where little is remembered
    the ridge is most of it.
    """
    problem, scale = solver.pose(matrix(tile), rhs, config)
    diagonal = None if config.preconditioner == "none" else tile.ridge
    exact = solver.exact_steps(matrix(tile, config.precision), rhs, config.precision, diagonal)
    return problem, (exact,) if factor is None else (_nested(tile, factor, config.precision), exact), scale


def _nested(tile: Tile, factor: Factor, precision: str) -> Method:
    """Steps that need the factor only: A_t is M_t and a multiple of the ridge, and M_t times a direction is known.

    The direction is added up of preconditioned residuals M_t^-1 r, so M_t times it is the same sum of residuals.
    """
    decays, first = tile.decays, _in_first(tile.decays)
    ahead, ridge = jnp.exp(decays.log_ahead), jnp.exp(_log_ridge(decays)) * tile.ridge
    shift = ahead * tile.ridge - ridge
    inverse, rows, columns = (split(x, precision) for x in (factor.inverse, factor.rows, transpose(factor.rows)))
    # what every step would compute anew: one of the two is 0 for every token
    dense, diagonal = jnp.where(first, 1.0, 0.0), jnp.where(first, 0.0, 1 / ridge)
    visible = jnp.where(decays.visible, 1.0, 0.0)

    def search(r):
        taken = times_parts(rows, r) * visible
        return dense * times_parts(inverse, r) + diagonal * r - times_parts(columns, taken), r

    return Method(
        search=search,
        image=lambda direction, frozen: frozen + shift * direction,
        wanted=factor.usable & jnp.ones_like(first),
        scale=ahead,
        num_directions=2,
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
