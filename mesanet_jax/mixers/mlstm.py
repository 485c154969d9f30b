"""mLSTM (xLSTM, arXiv 2405.04517): exponential input gates and a normaliser, gates and biases as in xLSTM-7B.

Its gates are soft-capped at 15 (arXiv 2503.13427), so that exp of them, and sums of it, fit into float32 with room for
10^30 tokens: the running maximum that the paper rescales the memory by is not needed.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mesanet_jax import sharding
from mesanet_jax.mixers.memory import MemoryMixer
from mesanet_jax.recurrences import linear_attention

GATE_CAP = 15.0


class MLSTM(MemoryMixer):
    """S_t = f_t S_{t-1} + i_t k_t v_t^T and z_t = f_t z_{t-1} + i_t k_t, read as S_t^T q_t / max(1, |z_t . q_t|)."""

    def activate(self, q, k):
        """Queries and keys keep their length but for the usual scale."""
        return q, k * k.shape[-1] ** -0.5

    def remember(self, q, k, v, x, memory, segment_ids):
        """See `MemoryMixer`; the memory is S beside z, [b, h, k, v + 1]."""
        strength = jnp.exp(_capped(self.logit("input_gate", x, nn.initializers.constant(-10.0))))
        log_decay = nn.log_sigmoid(_capped(self.logit("forget_gate", x, _spread_from_3_to_6)))
        q, k, v = sharding.whole_in_time(q, k, v)
        values = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1).astype(jnp.float32)
        out, memory = linear_attention(q, k, values, log_decay, strength, memory, segment_ids)
        size = jnp.maximum(jnp.abs(out[..., -1:]), 1)
        return (out[..., :-1] / size).astype(v.dtype), memory


def _capped(logit: jax.Array) -> jax.Array:
    return GATE_CAP * jnp.tanh(logit / GATE_CAP)


def _spread_from_3_to_6(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    del key
    return jnp.broadcast_to(jnp.linspace(3.0, 6.0, shape[-1], dtype=dtype), shape)
