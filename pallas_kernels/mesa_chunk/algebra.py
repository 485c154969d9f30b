"""The mathematics of one chunk of one head, as pure functions of values (README.md, section 2).

Arrays end in the axes named beside them; any axes may come before, and all functions broadcast over those. Tokens are
columns: what is computed per token is a row [1, c], and sums over an unknown run down a column, where the vector units
of accelerators add without shuffling. Products run in full precision, unless they are part of a solver step: on TPUs
and GPUs the default is lower than float32, and residuals would stall at it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mesa_chunk.products import (
    split_for,
    times,
    times_marks,
    times_parts,
    times_transposed,
    transpose,
    transposed_times,
)


class Decays(NamedTuple):
    """Cumulative forgetting inside a chunk; 0 wherever a document boundary lies between."""

    within: jax.Array  # [c, c] from token s (row) to token t (column)
    into: jax.Array  # [1, c] from the state before the chunk to token t
    out: jax.Array  # [1, c] from token s to the end of the chunk
    visible: jax.Array  # [c, c] bool, s <= t within one document; `within` may underflow to 0 where this is true
    together: jax.Array  # [c, c] bool, s and t within one document
    in_first: jax.Array  # [1, c] bool, token t is in the document of the chunk's first token
    log_since: jax.Array  # [1, c] log of the decay to token t from before its document's first token in this chunk

    @property
    def through(self) -> jax.Array:
        """[1, 1] from the state before the chunk to the state after it."""
        return jnp.sum(jnp.where(_is_last(self.into.shape[-1]), self.into, 0), axis=-1, keepdims=True)


class Tile(NamedTuple):
    """What one head sees of one chunk: its tokens, their decays, the states before it and the ridge."""

    k: jax.Array  # [c, k]
    v: jax.Array  # [c, v]
    beta: jax.Array  # [1, c]
    decays: Decays
    kk: jax.Array  # [k, k]
    kv: jax.Array  # [k, v]
    ridge: jax.Array  # [k, 1]


class Cotangents(NamedTuple):
    """Gradients of one tile; the ridge is shared by all tiles of a head, so its gradients add up."""

    k: jax.Array  # [k, c]
    v: jax.Array  # [v, c]
    log_decay: jax.Array  # [1, c]
    beta: jax.Array  # [1, c]
    ridge: jax.Array  # [k, 1]


def cumulative_decays(log_decay: jax.Array, starts: jax.Array, precision: str = "float32") -> Decays:
    """Returns the decays of a chunk from its log gates [1, c] and document starts [1, c], int32.

    `precision` is how a kernel comes by a product in full precision.
    """
    s, t = places(log_decay.shape[-1])
    gates, starts = to_column(log_decay), to_column(starts.astype(log_decay.dtype))
    document = sum_down(jnp.where(s <= t, starts, 0))
    together = to_column(document) == document
    visible = (s <= t) & together
    # every sum runs over its own gates: a difference of cumulative sums would drown weak gates beside a strong one
    lag = times_marks(jnp.where(s < t, log_decay, 0), jnp.broadcast_to(s <= t, visible.shape), precision)
    # exp only of what is kept: the masked half would overflow, and 0 * inf is NaN
    within = jnp.where(visible, jnp.exp(jnp.where(visible, lag, 0)), 0)
    in_document = jnp.where(together, gates, 0)
    return Decays(
        within=within,
        into=jnp.where(document == 0, jnp.exp(sum_down(jnp.where(s <= t, gates, 0))), 0),
        out=jnp.where(document == document[..., -1:], jnp.exp(sum_down(jnp.where(s > t, in_document, 0))), 0),
        visible=visible,
        together=together,
        in_first=document == document[..., :1],
        log_since=sum_down(jnp.where(s <= t, in_document, 0)),
    )


def added_states(k: jax.Array, v: jax.Array, beta: jax.Array, decays: Decays) -> tuple[jax.Array, jax.Array]:
    """Returns what the chunk, k [c, k] and v [c, v], adds to the states kk [k, k] and kv [k, v] by its end."""
    weighted = transpose(k) * (decays.out * beta)
    return times(weighted, k), times(weighted, v)


def matrix(tile: Tile) -> Callable[[jax.Array], jax.Array]:
    """Returns the map from x [k, c] to (H_t + Lambda) x_t for every token of the chunk."""
    (apply,) = matrices(tile, ("float32",))
    return apply


def matrices(tile: Tile, precisions: Sequence[str]) -> list[Callable[[jax.Array], jax.Array]]:
    """Returns `matrix` at each of these precisions, the first of which is the finest."""
    strengths, into = _strengths(tile), tile.decays.into

    def apply(state, keys, columns, x):
        weights = times_parts(keys, x) * strengths
        return into * times_parts(state, x) + times_parts(columns, weights) + tile.ridge * x

    parts = split_for((tile.kk, tile.k, transpose(tile.k)), precisions)
    return [functools.partial(apply, *matrices) for matrices in parts]


def read_out(x: jax.Array, tile: Tile) -> jax.Array:
    """Returns o_t = G_t^T x_t [v, c] for x [k, c]."""
    weights = times(tile.k, x) * _strengths(tile)
    return tile.decays.into * transposed_times(tile.kv, x) + transposed_times(tile.v, weights)


def adjoint_rhs(dout: jax.Array, tile: Tile) -> jax.Array:
    """Returns b_t = G_t dout_t [k, c] for dout [v, c], the right-hand side of the backward solve."""
    weights = times(tile.v, dout) * _strengths(tile)
    return tile.decays.into * times(tile.kv, dout) + transposed_times(tile.k, weights)


def added_cotangents(x: jax.Array, y: jax.Array, dout: jax.Array, decays: Decays) -> tuple[jax.Array, jax.Array]:
    """Returns what the chunk adds to the cotangents of the states kk and kv before it.

    Args:
      x, y: forward and backward solutions [k, c].
      dout: cotangent of the output [v, c].
      decays: of the chunk.
    """
    faded = x * decays.into
    return -times_transposed(y, faded), times_transposed(faded, dout)


def cotangents(
    x: jax.Array,
    y: jax.Array,
    residual: jax.Array,
    dout: jax.Array,
    tile: Tile,
    dkk: jax.Array,
    dkv: jax.Array,
) -> Cotangents:
    """Returns the gradients of one tile (README.md, section 4).

    Args:
      x, y: forward and backward solutions [k, c].
      residual: what the latter leave of the backward right-hand side [k, c].
      dout: cotangent of the output [v, c].
      tile: the tile.
      dkk, dkv: cotangents of the states after the chunk, [k, k] and [k, v].
    """
    decays, beta, k = tile.decays, tile.beta, transpose(tile.k)
    # H is symmetric, and meets of dkk what is symmetric; halves first, since the sum may overflow
    dkk_k, dkv_v = times(dkk / 2 + transpose(dkk) / 2, k), times(dkv, transpose(tile.v))
    xk = times(tile.k, x) * decays.within
    surprise = (times(tile.v, dout) - times(tile.k, y)) * decays.within
    seen = times_transposed(x, surprise)
    after = decays.out * (dkk_k + dkv_v)
    dbeta = sum_down(k * (seen + after))
    # <dstate, state> after the chunk, put together from what the state before it and the tokens contribute
    kept = decays.through * (_sum_all(dkk * tile.kk) + _sum_all(dkv * tile.kv))
    added = _sum_all(beta * sum_down(k * after))
    dtotal = sum_down(x * (tile.ridge * y + residual)) - beta * dbeta
    return Cotangents(
        k=beta * (seen - times_transposed(y, xk) + decays.out * (2 * dkk_k + dkv_v)),
        v=beta * (times_transposed(dout, xk) + decays.out * transposed_times(dkv, k)),
        log_decay=_later_tokens(dtotal + jnp.where(_is_last(k.shape[-1]), kept + added, 0), decays.visible),
        beta=dbeta,
        ridge=-jnp.sum(x * y, axis=-1, keepdims=True),
    )


def places(size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the row and the column number of every entry of a [size, size] matrix."""
    shape = (size, size)
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0), jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def sum_down(x: jax.Array) -> jax.Array:
    """Returns the sums [1, m] of the columns of x [n, m]."""
    return jnp.sum(x, axis=-2, keepdims=True)


def to_column(row: jax.Array) -> jax.Array:
    """Returns [c, 1] of [1, c], without the transpose that kernels lack for single rows."""
    i, j = places(row.shape[-1])
    return jnp.sum(jnp.where(i == j, row, 0), axis=-1, keepdims=True)


def to_row(column: jax.Array) -> jax.Array:
    """Returns [1, c] of [c, 1]."""
    i, j = places(column.shape[-2])
    return sum_down(jnp.where(i == j, column, 0))


def _strengths(tile: Tile) -> jax.Array:
    """How much token t (column) still holds of token s (row): decay times input strength."""
    return tile.decays.within * to_column(tile.beta)


def _later_tokens(dtotal: jax.Array, visible: jax.Array) -> jax.Array:
    """Turns cotangents [1, c] of the cumulative log decay into those of the log gates: a gate moves all later tokens.

    What lies beyond the chunk is in the last entry, as <dstate, state>. The sums stay short that way and do not lose
    small gradients over long contexts.
    """
    return to_row(jnp.sum(jnp.where(visible, dtotal, 0), axis=-1, keepdims=True))


def _is_last(size: int) -> jax.Array:
    """Returns [1, size] bool, true at the end: kernels for GPUs cannot take slices of values."""
    return jax.lax.broadcasted_iota(jnp.int32, (1, size), 1) == size - 1


def _sum_all(x: jax.Array) -> jax.Array:
    """Returns the sum [1, 1] of all entries."""
    return jnp.sum(sum_down(x), axis=-1, keepdims=True)
