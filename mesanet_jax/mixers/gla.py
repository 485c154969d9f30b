"""Gated linear attention (arXiv 2312.06635) with the scalar gates per head of arXiv 2506.05233, table 1."""

from mesanet_jax import sharding
from mesanet_jax.mixers.memory import MemoryMixer
from mesanet_jax.recurrences import linear_attention


class GatedLinearAttention(MemoryMixer):
    """S_t = gamma_t S_{t-1} + beta_t k_t v_t^T, read at the query."""

    def remember(self, q, k, v, x, memory, segment_ids):
        """See `MemoryMixer`; the memory is S [b, h, k, v]."""
        q, k, v = sharding.whole_in_time(q, k, v)
        return linear_attention(q, k, v, self.log_forget(x), self.strength(x), memory, segment_ids)
