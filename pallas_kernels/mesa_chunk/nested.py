"""The nested preconditioner: one factor that nearly solves all tokens of a chunk (README.md, section 3)."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mesa_chunk import positive, solver
from pallas_kernels.mesa_chunk.algebra import Decays, Tile, matrices, matrix, places, sum_down, to_column, to_row
from pallas_kernels.mesa_chunk.methods import Method, exact_steps, levels_of, reduction
from pallas_kernels.mesa_chunk.products import (
    split_for,
    times,
    times_parts,
    times_transposed,
    transpose,
    transposed_times,
)
from pallas_kernels.mesa_chunk.solver import Solution, SolverConfig

# How much a chunk is expected to keep where nothing is known: at the beginning of a document.
UNKNOWN_KEPT = 0.3
NO_FORECAST = math.log(UNKNOWN_KEPT)
# Tiles that are expected to keep less than this forget so fast that steps on the matrix itself are as few.
LEAST_KEPT = 0.1
# Tokens whose ridge has grown to more than this many times the frozen one take steps on the matrix for that reason.
MOST_APART = 4.0
# Tokens per key channel below which the factor costs more than the steps it saves.
LEAST_TOKENS = 0.125


class Factor(NamedTuple):
    """What solves the frozen systems M_t of a tile: M_t^-1 r_t = B r_t - sum of w_s (w_s . r_t) over s up to t."""

    inverse: jax.Array  # [k, k], B: of the state before the chunk with the frozen ridge
    rows: jax.Array  # [c, k], w_s
    log_anchor: jax.Array  # [1, 1] log of the frozen multiple of the ridge, for the chunk's first document
    usable: jax.Array  # [1, c] bool, whether it is of use to a token; what belongs to others is 0


def serves(config: SolverConfig, c: int, k: int) -> bool:
    """Returns whether chunks of c tokens get factors of key size k: if they are solved so, and long enough for one."""
    return config.max_steps > 0 and config.preconditioner == "nested" and c > 1 and c >= LEAST_TOKENS * k


def expected_decays(decays: Decays) -> jax.Array:
    """Returns the log decay [n, ..., 1, 1] to expect over each of n chunks in a row that have these decays.

    It is what the document that goes on into a chunk lost per token in the chunk before. The chunk itself is not asked:
    no token may depend on later gates, not even in how it is solved.
    """
    forecasts = forecast(decays)
    first = jnp.full_like(forecasts[:1], NO_FORECAST)
    return expected_decay(jnp.concatenate([first, forecasts[:-1]]), decays)


def forecast(decays: Decays) -> jax.Array:
    """Returns the log decay [1, 1] of the next chunk, should it lose as much per token as its document did in this."""
    tokens = sum_down(jnp.where(decays.together, 1.0, 0.0)[..., -1:])
    return decays.log_since[..., -1:] / tokens * decays.into.shape[-1]


def expected_decay(forecast_before: jax.Array, decays: Decays) -> jax.Array:
    """Returns the log decay [1, 1] to expect over a chunk, from the forecast of the chunk before it."""
    return jnp.where(decays.into[..., :1] > 0, forecast_before, NO_FORECAST)


def is_worth_it(expected: jax.Array) -> jax.Array:
    """Returns [1, 1] bool: whether a tile of this expected log decay remembers enough of what it begins with."""
    return expected >= math.log(LEAST_KEPT)


def make_factor(tile: Tile, expected: jax.Array) -> Factor:
    """Factors the frozen systems of a tile of this expected log decay [1, 1].

    Tokens for which it is not worth it or not finite are marked. What overflows spoils later tokens of its document,
    and neither earlier ones nor other documents.
    """
    decays = tile.decays
    inverse = positive.inverse(state_system(tile.kk, tile.ridge, decays, expected))
    half = first_half(inverse, tile.k, tile.beta, tile.ridge, decays, expected)
    rows, usable = second_half(positive.inverse_root(half.gram, least=1.0), half.solved, half.usable, decays)
    return Factor(half.inverse, rows, log_anchor(expected), usable)


class HalfFactor(NamedTuple):
    """What is known of a factor before the second of its two roots is taken."""

    inverse: jax.Array  # [k, k], as in Factor
    solved: jax.Array  # [k, c], B K~
    gram: jax.Array  # [c, c], 1 + K~' B K~
    usable: jax.Array  # [1, c] bool; float32 where kernels hand it on


def log_anchor(expected: jax.Array) -> jax.Array:
    """Returns the logarithm of the multiple of the ridge that is frozen where the first document goes on."""
    return jnp.where(is_worth_it(expected), -expected / 2, 0)


def state_system(kk: jax.Array, ridge: jax.Array, decays: Decays, expected: jax.Array) -> jax.Array:
    """Returns the frozen system [k, k] before the first token."""
    sees_state = jnp.where(decays.into[..., :1] > 0, 1.0, 0.0)
    return sees_state * kk + _diagonal(jnp.exp(log_anchor(expected)) * ridge)


def first_half(
    inverse: jax.Array, k: jax.Array, beta: jax.Array, ridge: jax.Array, decays: Decays, expected: jax.Array
) -> HalfFactor:
    """Returns the system that says how tokens go into each other, from the inverse [k, k] of the one before them."""
    worth, frozen = is_worth_it(expected), _frozen(decays, log_anchor(expected))
    sound = worth & jnp.isfinite(jnp.sum(sum_down(inverse), axis=-1, keepdims=True))
    inverse = jnp.where(sound, inverse, 0)
    usable = worth & frozen.near & (sound | ~decays.in_first)
    keys = transpose(k) * jnp.sqrt(jnp.where(usable, beta * frozen.scale, 0))
    solved = jnp.where(decays.in_first, times(inverse, keys), keys / (frozen.anchor * ridge))
    gram = jnp.where(decays.together, transposed_times(solved, keys), 0)
    usable &= _sees_finite(sum_down(jnp.where(decays.visible, gram, 0)), decays)
    i, j = places(gram.shape[-1])
    gram = jnp.where(usable & _mark_rows(usable), gram, 0) + jnp.where(i == j, 1.0, 0.0)
    return HalfFactor(inverse, jnp.where(usable, solved, 0), gram, usable)


def second_half(root: jax.Array, solved: jax.Array, usable: jax.Array, decays: Decays) -> tuple[jax.Array, jax.Array]:
    """Returns rows [c, k] and marks [1, c] of a factor, of the inverse root of `gram` and the fields of HalfFactor."""
    rows = times_transposed(root, solved)
    usable &= _sees_finite(to_row(jnp.sum(rows, axis=-1, keepdims=True)), decays)
    return jnp.where(_mark_rows(usable), rows, 0), usable


def no_factor(tile: Tile, expected: jax.Array) -> Factor:
    """Returns what stands for the factor of a tile that is not worth one."""
    nobody = jnp.zeros_like(tile.decays.in_first)
    return Factor(jnp.zeros_like(tile.kk), jnp.zeros_like(tile.k), jnp.zeros_like(expected), nobody)


def solve_tile(rhs: jax.Array, tile: Tile, factor: Factor | None, config: SolverConfig) -> Solution:
    """Solves (H_t + Lambda) x_t = rhs_t [k, c] for every token of the chunk."""
    problem, methods, scale = pose_tile(rhs, tile, factor, config, config.precisions())
    found = solver.solve(problem, methods)
    return Solution(found.solution * scale, found.residual * scale, found.num_steps)


def pose_tile(
    rhs: jax.Array, tile: Tile, factor: Factor | None, config: SolverConfig, precisions: Sequence[str]
) -> tuple[solver.Problem, tuple[Method, ...], jax.Array]:
    """Returns the problem of a tile, the methods to solve it with in this order, and the scale [1, c] of its solutions.

    The factor where there is a usable one, and for what is left steps on the matrix itself: where little is remembered
    the ridge is most of it. `precisions` are those of the levels: config's, or how a kernel comes by them.
    """
    problem, scale = solver.pose(matrix(tile), rhs, config)
    diagonal = None if config.preconditioner == "none" else tile.ridge
    exact = exact_steps(matrices(tile, precisions), rhs, precisions, diagonal)
    return problem, (exact,) if factor is None else (_nested(tile, factor, precisions), exact), scale


def _nested(tile: Tile, factor: Factor, precisions: Sequence[str]) -> Method:
    """Steps that need the factor only: A_t is M_t and a multiple of the ridge, and M_t times M_t^-1 r is r.

    Directions are sums of such vectors, so what A_t makes of them is added up along with them.
    """
    decays, frozen = tile.decays, _frozen(tile.decays, factor.log_anchor)
    ridge = frozen.anchor * tile.ridge
    shift = frozen.scale * tile.ridge - ridge
    # what every step would compute anew: one of the two is 0 for every token
    dense, diagonal = jnp.where(decays.in_first, 1.0, 0.0), jnp.where(decays.in_first, 0.0, 1 / ridge)
    visible = jnp.where(decays.visible, 1.0, 0.0)

    def search(inverse, rows, columns, r):
        taken = times_parts(rows, r) * visible
        z = dense * times_parts(inverse, r) + diagonal * r - times_parts(columns, taken)
        return z, r + shift * z

    parts = split_for((factor.inverse, factor.rows, transpose(factor.rows)), precisions)
    searches = [functools.partial(search, *matrices) for matrices in parts]
    images = [lambda direction, image: image] * len(precisions)
    return Method(
        levels=levels_of(precisions, searches, images, share=0.1),
        wanted=factor.usable,
        scale=frozen.scale,
        num_directions=2,
        reduction=reduction(precisions[0], tile.k.dtype),
    )


class _Frozen(NamedTuple):
    """How the frozen systems of a tile stand to its own, [1, c] each."""

    anchor: jax.Array  # multiple of the ridge that is frozen
    scale: jax.Array  # by which a token's equation is multiplied, to see all keys as the beginning of its document did
    near: jax.Array  # bool, whether its ridge, multiplied so, is near the frozen one; scale is 1 where it is not


def _frozen(decays: Decays, log_anchor: jax.Array) -> _Frozen:
    log_anchor = jnp.where(decays.in_first, log_anchor, -NO_FORECAST / 2)
    near = -decays.log_since <= log_anchor + math.log(MOST_APART)
    return _Frozen(jnp.exp(log_anchor), jnp.exp(jnp.where(near, -decays.log_since, 0)), near)


def _sees_finite(sums: jax.Array, decays: Decays) -> jax.Array:
    """Returns [1, c] bool: whether the sums [1, c] of all tokens are finite that a token sees; so are their terms."""
    return sum_down(jnp.where(decays.visible & ~_mark_rows(jnp.isfinite(sums)), 1.0, 0.0)) == 0


def _mark_rows(marks: jax.Array) -> jax.Array:
    """Returns marks [1, c], bool, as [c, 1]."""
    return to_column(jnp.where(marks, 1.0, 0.0)) > 0


def _diagonal(column: jax.Array) -> jax.Array:
    """Returns the matrix [k, k] with this diagonal [k, 1]."""
    i, j = places(column.shape[-2])
    return jnp.where(i == j, column, 0)
