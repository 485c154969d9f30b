"""The mathematics of one chunk of one head, as pure functions of values (README.md, section 2).

Arrays end in the axes named beside them; any axes may come before, and all functions broadcast over those. Products
run at full precision: on TPUs and GPUs the default is lower than float32, and the solve would stall at it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mesa_chunk.solver import Solution, SolverConfig, conjugate_gradient, relative_residual

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Decays(NamedTuple):
    """Cumulative forgetting inside a chunk; 0 wherever a document boundary lies between."""

    within: jax.Array  # [c, c] from token s (column) to token t (row)
    into: jax.Array  # [c] from the state before the chunk to token t
    visible: jax.Array  # [c, c] bool, s <= t within one document; `within` may underflow to 0 where this is true

    @property
    def out(self) -> jax.Array:
        """[c] from token s to the end of the chunk."""
        return self.within[..., -1, :]

    @property
    def through(self) -> jax.Array:
        """[] from the state before the chunk to the state after it."""
        return self.into[..., -1]


class Tile(NamedTuple):
    """What one head sees of one chunk: its tokens, their decays, the states before it and the ridge."""

    k: jax.Array  # [c, k]
    v: jax.Array  # [c, v]
    beta: jax.Array  # [c]
    decays: Decays
    kk: jax.Array  # [k, k]
    kv: jax.Array  # [k, v]
    ridge: jax.Array  # [k]


class Cotangents(NamedTuple):
    """Gradients of one tile."""

    k: jax.Array  # [c, k]
    v: jax.Array  # [c, v]
    log_decay: jax.Array  # [c]
    beta: jax.Array  # [c]
    ridge: jax.Array  # [k]


def cumulative_decays(log_decay: jax.Array, starts: jax.Array) -> Decays:
    """Returns the decays of a chunk from its log gates [c] and document starts [c]."""
    document = jnp.cumsum(starts, axis=-1)
    place = jnp.arange(document.shape[-1])
    upto = place[:, None] >= place[None, :]
    visible = upto & (document[..., :, None] == document[..., None, :])
    # every sum runs over its own gates: a difference of cumulative sums would drown weak gates beside a strong one
    lag = _matmul(upto.astype(log_decay.dtype), jnp.where(upto.T, 0, log_decay[..., :, None]))
    # exp only of what is kept: the masked half would overflow, and 0 * inf is NaN
    within = jnp.where(visible, jnp.exp(jnp.where(visible, lag, 0)), 0)
    into = jnp.where(document == 0, jnp.exp(jnp.cumsum(log_decay, axis=-1)), 0)
    return Decays(within, into, visible)


def added_states(k: jax.Array, v: jax.Array, beta: jax.Array, decays: Decays) -> tuple[jax.Array, jax.Array]:
    """Returns what the chunk adds to the states kk [k, k] and kv [k, v] by its end."""
    weighted = _transpose(k * (decays.out * beta)[..., None])
    return _matmul(weighted, k), _matmul(weighted, v)


def matrix(tile: Tile) -> Callable[[jax.Array], jax.Array]:
    """Returns the map from x [c, k] to (H_t + Lambda) x_t for every token of the chunk."""
    key_dim, strengths, into = tile.k.shape[-1], _strengths(tile), tile.decays.into[..., None]
    state_and_keys = jnp.concatenate([tile.kk, _transpose(tile.k)], axis=-1)

    def apply(x):
        products = _matmul(x, state_and_keys)  # one wide product is faster than two
        weights = products[..., key_dim:] * strengths
        return into * products[..., :key_dim] + _matmul(weights, tile.k) + x * tile.ridge[..., None, :]

    return apply


def read_out(x: jax.Array, tile: Tile) -> jax.Array:
    """Returns o_t = G_t^T x_t [c, v] for x [c, k]."""
    weights = _matmul(x, _transpose(tile.k)) * _strengths(tile)
    return tile.decays.into[..., None] * _matmul(x, tile.kv) + _matmul(weights, tile.v)


def solve(rhs: jax.Array, tile: Tile, config: SolverConfig) -> Solution:
    """Solves (H_t + Lambda) x_t = rhs_t for every token of the chunk."""
    return conjugate_gradient(matrix(tile), rhs, config)


def true_residual(rhs: jax.Array, x: jax.Array, tile: Tile) -> jax.Array:
    """Returns ||rhs_t - (H_t + Lambda) x_t|| / ||rhs_t|| [c]."""
    return relative_residual(matrix(tile), rhs, x)


def adjoint_rhs(dout: jax.Array, tile: Tile) -> jax.Array:
    """Returns b_t = G_t dout_t [c, k], the right-hand side of the backward solve."""
    weights = _matmul(dout, _transpose(tile.v)) * _strengths(tile)
    return tile.decays.into[..., None] * _matmul(dout, _transpose(tile.kv)) + _matmul(weights, tile.k)


def added_cotangents(x: jax.Array, adjoint: Solution, dout: jax.Array, decays: Decays) -> tuple[jax.Array, jax.Array]:
    """Returns what the chunk adds to the cotangents of the states kk and kv before it."""
    faded = _transpose(x * decays.into[..., None])
    return -_transpose(_matmul(faded, adjoint.solution)), _matmul(faded, dout)


def cotangents(
    x: jax.Array, adjoint: Solution, dout: jax.Array, tile: Tile, dkk: jax.Array, dkv: jax.Array
) -> Cotangents:
    """Returns the gradients of one tile (README.md, section 3).

    Args:
      x: forward solutions [c, k].
      adjoint: backward solutions y with their residuals.
      dout: cotangent of the output [c, v].
      tile: the tile.
      dkk, dkv: cotangents of the states after the chunk, [k, k] and [k, v].
    """
    k, v, beta, decays = tile.k, tile.v, tile.beta, tile.decays
    y, out = adjoint.solution, decays.out[..., None]
    xk = _transpose(_matmul(x, _transpose(k)) * decays.within)
    surprise = _transpose((_matmul(dout, _transpose(v)) - _matmul(y, _transpose(k))) * decays.within)
    k_dkk, k_dkv = _matmul(k, dkk), _matmul(k, dkv)
    left = _matmul(surprise, x) + out * (_matmul(v, _transpose(dkv)) + _matmul(k, _transpose(dkk)))
    right = -_matmul(xk, y) + out * k_dkk
    dbeta = jnp.sum(left * k, axis=-1)
    # <dstate, state> after the chunk, put together from what the state before it and the tokens contribute
    kept = decays.through * (jnp.sum(dkk * tile.kk, (-2, -1)) + jnp.sum(dkv * tile.kv, (-2, -1)))
    added = jnp.sum(beta * decays.out * (jnp.sum(k * k_dkk, -1) + jnp.sum(v * k_dkv, -1)), -1)
    dtotal = jnp.sum(x * (tile.ridge[..., None, :] * y + adjoint.residual), axis=-1) - beta * dbeta
    return Cotangents(
        k=beta[..., None] * (left + right),
        v=beta[..., None] * (_matmul(xk, dout) + out * k_dkv),
        log_decay=_later_tokens(dtotal.at[..., -1].add(kept + added), decays.visible),
        beta=dbeta,
        ridge=-jnp.sum(x * y, axis=-2),
    )


def _strengths(tile: Tile) -> jax.Array:
    """How much token t (row) still holds of token s (column): decay times input strength."""
    return tile.decays.within * tile.beta[..., None, :]


def _later_tokens(dtotal: jax.Array, visible: jax.Array) -> jax.Array:
    """Turns cotangents [c] of the cumulative log decay into those of the log gates: each gate moves all later tokens.

    What lies beyond the chunk is in the last entry, as <dstate, state>. The sums stay short that way and do not lose
    small gradients over long contexts.
    """
    return rows_times(dtotal, visible.astype(dtotal.dtype))


def _transpose(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def rows_times(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Returns x^T M [v] for every x [k] and M [k, v]."""
    return _matmul(x[..., None, :], matrix)[..., 0, :]
