"""The recurrences of the models that Mesa is compared with: chunk by chunk or in log depth, never token by token.

All take one document or several packed ones, and a state before the first; a call with one token is a decoding step.
Negative segment ids mark padding: it is ignored whatever it holds, and the state passes through it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mesanet_jax.shapes import Gates, SegmentIds
from pallas_kernels.manual import vary_alike
from pallas_kernels.mesa_chunk.api import document_starts
from pallas_kernels.mesa_chunk.chunks import even_length, to_chunks, to_sequence

CHUNK = 64  # tokens whose pairs are multiplied out
LOWEST_LOG_DECAY = -80.0  # forgets everything in float32, while sums over a chunk stay finite


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: Gates,
    beta: Gates,
    state: jax.Array | None,
    segment_ids: SegmentIds | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns o_t = S_t^T q_t with S_t = gamma_t S_{t-1} + beta_t k_t v_t^T (arXiv 2506.05233, table 1).

    Args:
      q, k, v: [b, t, h, k], [b, t, h, k] and [b, t, h, v].
      log_decay, beta: log gamma <= 0, and strengths.
      state: S before the first token [b, h, k, v]; None is 0.
      segment_ids: documents.

    Returns:
      (o [b, t, h, v] in the dtype of v, the last S in float32).
    """
    tile, start = vary_alike((_cut(q, k, v, log_decay, beta, segment_ids), _start(state, k, v)))
    written = tile.beta[..., None] * tile.v
    added = _product("...ck,...cv->...kv", tile.k * tile.out[..., None], written)

    def chunk(state, inputs):
        through, added = inputs
        return through * state + added, state

    final, before = jax.lax.scan(chunk, start, (tile.through, added))
    return _read(tile, before, written, v), final


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: Gates,
    beta: Gates,
    state: jax.Array | None,
    segment_ids: SegmentIds | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns o_t = S_t^T q_t with S_t = gamma_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T (arXiv 2412.06464).

    What token t writes is u_t = beta_t (v_t - gamma_t S_{t-1}^T k_t), the correction of what is read at k_t. Within a
    chunk those depend on each other through a triangular system, which is solved for all chunks at once; only what the
    state before a chunk adds to them is found one chunk after the other. Arguments and results are those of
    `linear_attention`; keys should have length 1 and beta lie in [0, 1], or else S may grow.
    """
    tile, start = vary_alike((_cut(q, k, v, log_decay, beta, segment_ids), _start(state, k, v)))
    earlier = jnp.tril(tile.within, -1) * _product("...ck,...sk->...cs", tile.k, tile.k)
    faded = (tile.beta * tile.into)[..., None] * tile.k
    known = jnp.concatenate([tile.beta[..., None] * tile.v, faded], axis=-1).astype(earlier.dtype)
    solved = jnp.matmul(_unit_triangular_inverse(tile.beta[..., None] * earlier), known, precision="highest")
    values, reads = jnp.split(solved, [v.shape[-1]], axis=-1)

    def chunk(state, inputs):
        through, k, values, reads = inputs
        written = values - _product("...ck,...kv->...cv", reads, state)
        return through * state + _product("...ck,...cv->...kv", k, written), (state, written)

    arrays = tile.through, tile.k * tile.out[..., None], values, reads
    final, (before, written) = jax.lax.scan(chunk, start, arrays)
    return _read(tile, before, written, v), final


def _unit_triangular_inverse(lower: jax.Array) -> jax.Array:
    """Returns (I + L)^{-1} [..., c, c] for strictly lower triangular L, out of inverses of ever larger diagonal blocks.

    These are products of matrices, which every accelerator is made for; the library's triangular solve goes row by row,
    and on CPUs two of them at a time may wait for each other's threads for ever (jaxlib 0.10.2).
    """
    length = lower.shape[-1]
    size = 1 << (length - 1).bit_length()
    lower = jnp.pad(lower, [(0, 0)] * (lower.ndim - 2) + [(0, size - length)] * 2)
    inverse = jnp.ones((*lower.shape[:-2], size, 1, 1), lower.dtype)  # of blocks [..., blocks, s, s]
    multiply = functools.partial(jnp.matmul, precision="highest")
    while inverse.shape[-3] > 1:
        pairs, s = inverse.shape[-3] // 2, inverse.shape[-1]
        blocks = lower.reshape(*lower.shape[:-2], pairs, 2 * s, pairs, 2 * s)[..., s:, :, :s]
        own = jnp.eye(pairs, dtype=bool)[:, None, :, None]  # not by `jnp.diagonal`, a gather: see `weights.look_up`
        between = jnp.sum(blocks, axis=-2, where=own)  # [..., pairs, s, s], of the pairs: below the diagonal
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -multiply(multiply(second, between), first)
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([upper, jnp.concatenate([corner, second], axis=-1)], axis=-2)
    return inverse[..., 0, :length, :length]


def gated_sum(
    x: jax.Array, log_decay: jax.Array, state: jax.Array | None, segment_ids: SegmentIds | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns h_t = a_t h_{t-1} + x_t for every channel by itself, in log t steps of the whole array.

    Args:
      x, log_decay: [b, t, ...], float32; log a <= 0.
      state: h before the first token [b, ...]; None is 0.
      segment_ids: documents.

    Returns:
      (h [b, t, ...], the last h).
    """
    a = jnp.exp(log_decay)
    if segment_ids is not None:
        real, starts = (_like(mask, x) for mask in (segment_ids >= 0, document_starts(segment_ids)))
        x, a = jnp.where(real, x, 0), jnp.where(real, jnp.where(starts, 0, a), 1)
    if state is not None:
        x = x.at[:, 0].add(a[:, 0] * state)

    def join(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    _, h = jax.lax.associative_scan(join, (a, x), axis=1)
    return h, h[:, -1]


class _Tile(NamedTuple):
    """Chunks of heads, [n, b, h, c, ...]; decays are 0 wherever a document begins in between."""

    q: jax.Array  # [..., c, k]
    k: jax.Array  # [..., c, k]
    v: jax.Array  # [..., c, v]
    beta: jax.Array  # [..., c]
    within: jax.Array  # [..., c, c] from token s (column) to token t (row)
    into: jax.Array  # [..., c] from the state before the chunk to token t
    out: jax.Array  # [..., c] from token s to the end of the chunk
    through: jax.Array  # [..., 1, 1] from the state before the chunk to the one after it


def _cut(q, k, v, log_decay, beta, segment_ids: SegmentIds | None) -> _Tile:
    c = even_length(q.shape[1], CHUNK)
    log_decay = jnp.maximum(log_decay.astype(_summed_in(log_decay)), LOWEST_LOG_DECAY)
    starts = jnp.zeros(q.shape[:2], jnp.int32)
    if segment_ids is not None:
        real, starts = segment_ids >= 0, document_starts(segment_ids)
        q, k, v, log_decay, beta = (jnp.where(_like(real, x), x, 0) for x in (q, k, v, log_decay, beta))
    q, k, v, log_decay, beta = (to_chunks(x, c) for x in (q, k, v, log_decay, beta))
    total = jnp.cumsum(log_decay, axis=-1)
    document = jnp.cumsum(to_chunks(starts[..., None], c), axis=-1)
    visible = jnp.tril(document[..., :, None] == document[..., None, :])
    last = document[..., -1:]
    return _Tile(
        q=q,
        k=k,
        v=v,
        beta=beta,
        # exp only of what is kept: the other half would overflow, and 0 * inf is NaN
        within=jnp.exp(jnp.where(visible, total[..., :, None] - total[..., None, :], -jnp.inf)),
        into=jnp.where(document == 0, jnp.exp(total), 0),
        out=jnp.where(document == last, jnp.exp(total[..., -1:] - total), 0),
        through=jnp.where(last == 0, jnp.exp(total[..., -1:]), 0)[..., None],
    )


def _read(tile: _Tile, before: jax.Array, written: jax.Array, v: jax.Array) -> jax.Array:
    """Reads the queries out of the states before each chunk and of what the chunk's own tokens wrote [..., c, v]."""
    weights = tile.within * _product("...ck,...sk->...cs", tile.q, tile.k)
    out = tile.into[..., None] * _product("...ck,...kv->...cv", tile.q, before)
    out += _product("...cs,...sv->...cv", weights.astype(v.dtype), written)
    return to_sequence(jnp.swapaxes(out, -1, -2), v.shape[1]).astype(v.dtype)


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product in the dtype of its first factor, summed in float32 at least."""
    return jnp.einsum(axes, a, b.astype(a.dtype), preferred_element_type=_summed_in(a))


def _summed_in(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(jnp.float32, x.dtype)


def _start(state: jax.Array | None, k: jax.Array, v: jax.Array) -> jax.Array:
    if state is not None:
        return state
    batch, _, heads, key_dim = k.shape
    return jnp.zeros((batch, heads, key_dim, v.shape[-1]), _summed_in(v))


def _like(mask: jax.Array, x: jax.Array) -> jax.Array:
    """[b, t] as bool, broadcast to the axes of x [b, t, ...]."""
    return mask.reshape(*mask.shape, *[1] * (x.ndim - 2)).astype(bool)
