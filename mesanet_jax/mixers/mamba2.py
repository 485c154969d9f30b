"""Mamba-2 (arXiv 2405.21060) as a head of arXiv 2506.05233, table 1, has it: a forget gate and no input gate."""

import jax.numpy as jnp

from mesanet_jax import sharding
from mesanet_jax.mixers.memory import MemoryMixer
from mesanet_jax.recurrences import linear_attention


class Mamba2(MemoryMixer):
    """S_t = gamma_t S_{t-1} + k_t v_t^T, read at the query."""

    def remember(self, q, k, v, x, memory, segment_ids):
        """See `MemoryMixer`; the memory is S [b, h, k, v]."""
        q, k, v = sharding.whole_in_time(q, k, v)
        log_decay = self.log_forget(x)
        return linear_attention(q, k, v, log_decay, jnp.ones_like(log_decay), memory, segment_ids)
