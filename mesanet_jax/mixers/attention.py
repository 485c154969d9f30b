"""Softmax attention with rotary positions: over the last `max_context` tokens, or over a sliding window."""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mesanet_jax import layers, sharding
from mesanet_jax.config import MesaNetConfig
from mesanet_jax.documents import first_document, last_document
from mesanet_jax.shapes import Activations, SegmentIds

# Each stripe of queries is compiled by itself. Sixteen gained a tenth at most, at 2,048 and 4,096 tokens on a CPU, and
# took twice as long to compile.
SMALLEST_STRIPE = 256
MOST_STRIPES = 8


class AttentionState(NamedTuple):
    """A ring of the last s tokens: the token at position p sits in slot p mod s."""

    k: jax.Array  # [b, h, s, k]
    v: jax.Array  # [b, h, s, v]
    positions: jax.Array  # [b, s] int32, position of the token in each slot; -1 where the slot is empty
    next_position: jax.Array  # [] int32


class Attention(nn.Module):
    """Causal attention over the last `max_context` tokens."""

    config: MesaNetConfig

    @property
    def span(self) -> int:
        """Tokens a query sees, itself included; also the length of the cache."""
        return self.config.max_context

    @nn.compact
    def __call__(self, x: Activations, state: AttentionState | None, segment_ids: SegmentIds | None):
        """Returns (y [b, t, d], state); see `mesanet_jax.mixers`."""
        c = self.config
        start = 0 if state is None else state.next_position
        positions = start + jnp.arange(x.shape[1], dtype=jnp.int32)
        q, k, v = layers.project_heads(c, x, {"query": c.key_dim, "key": c.key_dim, "value": c.value_dim})
        q, k = (layers.rotate(y, positions, c.rope_base) for y in (q, k))
        if segment_ids is None:
            segment_ids = jnp.zeros(x.shape[:2], jnp.int32)
        k, v = sharding.whole_in_time(k, v)
        q, k, v = (jnp.moveaxis(y, 1, 2) for y in (q, k, v))
        new = _Seen(k, v, jnp.broadcast_to(positions, x.shape[:2]), segment_ids)
        after = _remember(state, new, positions, self.span)
        if state is None and sharding.parts_of_time(x.shape[:2]) == 1:
            out = attend_in_stripes(q, positions, segment_ids, new, self.span)
        else:
            out = attend(q, positions, segment_ids, _in_reach(state, new, after), self.span)
        return layers.merge_heads(c, jnp.moveaxis(out, 1, 2), "out"), after


class SlidingWindowAttention(Attention):
    """Causal attention over the last `window` tokens."""

    @property
    def span(self) -> int:
        """Tokens a query sees, itself included; also the length of the cache."""
        return self.config.window


class _Seen(NamedTuple):
    """Tokens that queries may attend to."""

    k: jax.Array  # [b, h, s, k]
    v: jax.Array  # [b, h, s, v]
    positions: jax.Array  # [b, s]
    segment_ids: jax.Array  # [b, s]

    def part(self, slots: slice) -> "_Seen":
        """Returns some of them."""
        return _Seen(self.k[:, :, slots], self.v[:, :, slots], self.positions[:, slots], self.segment_ids[:, slots])


def attend(q: jax.Array, positions: jax.Array, segment_ids: SegmentIds, seen: _Seen, span: int) -> jax.Array:
    """Returns attention of q [b, h, t, k] at positions [t] to the seen tokens of its document at most span - 1 back."""
    lag = positions[None, :, None] - seen.positions[:, None, :]
    near = (lag >= 0) & (lag < span) & (seen.positions[:, None, :] >= 0)
    same = segment_ids[:, :, None] == seen.segment_ids[:, None, :]
    # jax.nn.dot_product_attention takes time before heads, for which a CPU copies the whole cache to decode one token
    logits = jnp.einsum("bhtk,bhsk->bhts", q, seen.k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    logits = jnp.where((near & same)[:, None], logits, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bhts,bhsv->bhtv", jax.nn.softmax(logits).astype(seen.v.dtype), seen.v)


def attend_in_stripes(q: jax.Array, positions: jax.Array, segment_ids: SegmentIds, seen: _Seen, span: int) -> jax.Array:
    """Returns `attend` of a sequence to itself; each stripe of queries is shown only what it may attend to."""
    length, out = q.shape[2], []
    size = max(SMALLEST_STRIPE, -(-length // MOST_STRIPES))
    block = max(SMALLEST_STRIPE, span // 2)  # the larger, the more is masked; the smaller, the more often k is read
    for start in range(0, max(length, 1), size):
        own, near = slice(start, start + size), slice(max(0, start - span + 1), start + size)
        stripe = (q[:, :, own], positions[own], segment_ids[:, own], seen.part(near), span)
        out.append(attend_in_blocks(*stripe, block) if 2 * block <= size else attend(*stripe))
    return jnp.concatenate(out, axis=2)


def attend_in_blocks(
    q: jax.Array, positions: jax.Array, segment_ids: SegmentIds, seen: _Seen, span: int, size: int
) -> jax.Array:
    """Returns `attend` of queries that are the last of the seen tokens; work and memory grow as t (size + span)."""
    length = q.shape[2]
    count, before = -(-length // size), -(-(span - 1) // size)  # blocks of queries, and of keys before a query's own
    after = count * size - length
    ahead = (count + before) * size - seen.k.shape[2] - after

    def cut(x: jax.Array, axis: int, ahead: int, fill: int = 0) -> jax.Array:
        padded = jnp.pad(x, [(ahead, after) if i == axis else (0, 0) for i in range(x.ndim)], constant_values=fill)
        return jnp.moveaxis(padded.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)

    def windows(x: jax.Array, axis: int, fill: int = 0) -> jax.Array:
        blocks = cut(x, axis, ahead, fill)
        return jnp.concatenate([blocks[i : i + count] for i in range(before + 1)], axis=axis + 1)

    near = _Seen(windows(seen.k, 2), windows(seen.v, 2), windows(seen.positions, 1, -1), windows(seen.segment_ids, 1))
    own = (cut(q, 2, 0), cut(positions, 0, 0), cut(segment_ids, 1, 0))
    out = jnp.moveaxis(jax.vmap(partial(attend, span=span))(*own, near), 0, 2)
    return out.reshape(*q.shape[:2], count * size, -1)[:, :, :length]


def _in_reach(before: AttentionState | None, new: _Seen, after: AttentionState) -> _Seen:
    """Returns the tokens of a call and those of the ring before it, which belong to the first document of the call."""
    if before is None:
        return new
    single = new.positions.shape[1] == 1
    ring = after if single else before  # what a single token overwrites lies too far back for it
    document = jnp.broadcast_to(first_document(new.segment_ids), ring.positions.shape)
    kept = _Seen(ring.k, ring.v, ring.positions, document)
    if single:
        return kept
    k, v = (jnp.concatenate(pair, axis=2) for pair in ((kept.k, new.k), (kept.v, new.v)))
    return _Seen(k, v, *(jnp.concatenate(pair, axis=1) for pair in zip(kept[2:], new[2:], strict=True)))


def _remember(state: AttentionState | None, new: _Seen, positions: jax.Array, span: int) -> AttentionState:
    """Writes the new tokens of the last document into the ring, over the oldest."""
    (batch, length), heads = new.positions.shape, new.k.shape[1]
    document = last_document(new.segment_ids)
    current = (new.segment_ids == document) & (new.segment_ids >= 0)
    recent = new._replace(positions=jnp.where(current, new.positions, -1))
    recent = recent.part(slice(-span, None))
    slots = positions[-span:] % span
    if state is None:
        empty = AttentionState(
            k=jnp.zeros((batch, heads, span, new.k.shape[-1]), new.k.dtype),
            v=jnp.zeros((batch, heads, span, new.v.shape[-1]), new.v.dtype),
            positions=jnp.full((batch, span), -1, jnp.int32),
            next_position=jnp.int32(0),
        )
    else:
        # a document that began in this call leaves nothing of the one before it
        begun = (document >= 0) & (document != first_document(new.segment_ids))
        empty = state._replace(positions=jnp.where(begun, -1, state.positions))
    return AttentionState(
        k=empty.k.at[:, :, slots].set(recent.k),
        v=empty.v.at[:, :, slots].set(recent.v),
        positions=empty.positions.at[:, slots].set(recent.positions),
        next_position=empty.next_position + length,
    )
