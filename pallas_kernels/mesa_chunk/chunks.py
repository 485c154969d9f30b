"""Sequences in chunks and back: [b, t, h, ...] is [n, b, h, c, ...] where tiles are, one chunk of one head each."""

import jax
import jax.numpy as jnp

from pallas_kernels.mesa_chunk.contract import MesaState
from pallas_kernels.tiling import pad_axis, round_up


def even_length(length: int, longest: int) -> int:
    """Returns the shortest chunk that cuts a sequence into as few chunks as the longest one does."""
    return -(-length // -(-length // longest))


def to_chunks(x: jax.Array, c: int) -> jax.Array:
    """[b, t, h, ...] -> [n, b, h, c, ...], the last chunk padded with zeros."""
    x = pad_axis(x, 1, round_up(x.shape[1], c))
    x = x.reshape(x.shape[0], -1, c, *x.shape[2:])
    return jnp.moveaxis(x, (1, 3), (0, 2))


def to_columns(x: jax.Array, c: int) -> jax.Array:
    """[b, t, h, k] -> [n, b, h, k, c]."""
    return jnp.swapaxes(to_chunks(x, c), -1, -2)


def to_rows(x: jax.Array, c: int) -> jax.Array:
    """[b, t, h] -> [n, b, h, 1, c]."""
    return to_chunks(x, c)[..., None, :]


def to_sequence(x: jax.Array, length: int) -> jax.Array:
    """[n, b, h, k, c] -> [b, t, h, k], dropping the padding."""
    x = jnp.moveaxis(x, (0, 2, 4), (1, 3, 2))
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def scan_states(
    added: MesaState, through: jax.Array, state: MesaState, reverse: bool = False
) -> tuple[MesaState, MesaState]:
    """Runs state <- through * state + added over chunks; returns the states each chunk starts from, and the last."""

    def chunk(state, inputs):
        through, added = inputs
        return jax.tree.map(lambda s, a: through * s + a, state, added), state

    final, before = jax.lax.scan(chunk, state, (through, added), reverse=reverse)
    return before, final
