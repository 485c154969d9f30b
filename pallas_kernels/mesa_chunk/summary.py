"""What a stretch of tokens does to the state before it, without a solve: README.md, section 2.

Devices that hold one stretch each of a sequence need this of each other, and nothing else.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.mesa_chunk.contract import (
    LOWEST_LOG_DECAY,
    MesaState,
    check_segment_ids,
    check_sequences,
    solver_dtype,
)


class MesaSummary(NamedTuple):
    """The map from the state before a stretch to the state after it: state -> decay * state + added."""

    decay: Float[Array, "b h"]  # 0 if a document begins in the stretch
    added: MesaState

    def after(self, state: MesaState) -> MesaState:
        """Returns the state after the stretch for the one before it."""
        decay = self.decay[..., None, None]
        return MesaState(*(decay * before + added for before, added in zip(state, self.added, strict=True)))


def mesa_summary(
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    log_decay: Float[Array, "b t h"],
    beta: Float[Array, "b t h"],
    *,
    segment_ids: Int[Array, "b t"] | None = None,
) -> MesaSummary:
    """Returns what these tokens make of any state, in O(t k (k + v)) and with no memory that grows with t.

    `mesa_chunk` ends with the state `mesa_summary(...).after(state)`; arguments are as there. Differentiable.

    Raises:
      TypeError, ValueError: an argument's dtype, rank or size does not fit; the message names it.
    """
    named = {"k": k, "v": v, "log_decay": log_decay, "beta": beta}
    check_sequences("mesa_summary", named, first="k", time_axis=True)
    if segment_ids is not None:
        check_segment_ids("mesa_summary", segment_ids, k.shape[:2])
    dtype = solver_dtype(k, v, log_decay, beta)
    k, v, log_decay, beta = (x.astype(dtype) for x in (k, v, log_decay, beta))
    log_decay = jnp.maximum(log_decay, LOWEST_LOG_DECAY)
    begun = jnp.zeros(k.shape[:2], bool)  # whether a document begins after the token
    if segment_ids is not None:
        last = jnp.max(segment_ids, axis=1, keepdims=True)
        real = (segment_ids >= 0)[..., None]
        k, v = (jnp.where(real[..., None], x, 0) for x in (k, v))
        log_decay, beta = (jnp.where(real, x, 0) for x in (log_decay, beta))
        begun = segment_ids != last
    # summed from the end: a difference of sums from the beginning would drown weak gates beside strong ones
    until_end = jnp.cumsum(log_decay[:, ::-1], axis=1)[:, ::-1]
    after = jnp.concatenate([until_end[:, 1:], jnp.zeros_like(until_end[:, :1])], axis=1)
    weights = jnp.where(begun[..., None], 0, beta * jnp.exp(after))
    keys = weights[..., None] * k
    kk, kv = (jnp.einsum("bthk,bthv->bhkv", keys, x, precision="highest") for x in (k, v))
    return MesaSummary(_decay(until_end[:, 0], segment_ids), MesaState(kk, kv))


def _decay(log_decay: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Returns exp(log_decay) [b, h], and 0 in rows in which a document follows another."""
    if segment_ids is None:
        return jnp.exp(log_decay)
    first = jnp.min(jnp.where(segment_ids >= 0, segment_ids, jnp.iinfo(segment_ids.dtype).max), axis=1)
    one_document = first >= jnp.max(segment_ids, axis=1)
    return jnp.where(one_document[:, None], jnp.exp(log_decay), 0)
