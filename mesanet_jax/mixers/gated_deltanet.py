"""Gated DeltaNet (arXiv 2412.06464): the delta rule on a memory that forgets."""

from mesanet_jax import sharding
from mesanet_jax.mixers.memory import MemoryMixer
from mesanet_jax.recurrences import delta_rule


class GatedDeltaNet(MemoryMixer):
    """S_t = gamma_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, read at the query."""

    def remember(self, q, k, v, x, memory, segment_ids):
        """See `MemoryMixer`; the memory is S [b, h, k, v]."""
        q, k, v = sharding.whole_in_time(q, k, v)
        return delta_rule(q, k, v, self.log_forget(x), self.strength(x), memory, segment_ids)
