"""DeltaNet (arXiv 2102.11174, 2406.06484): a memory that corrects what it reads at a key, and never forgets."""

import jax.numpy as jnp

from mesanet_jax import sharding
from mesanet_jax.mixers.memory import MemoryMixer
from mesanet_jax.recurrences import delta_rule


class DeltaNet(MemoryMixer):
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, read at the query."""

    def remember(self, q, k, v, x, memory, segment_ids):
        """See `MemoryMixer`; the memory is S [b, h, k, v]."""
        beta = self.strength(x)
        q, k, v = sharding.whole_in_time(q, k, v)
        return delta_rule(q, k, v, jnp.zeros_like(beta), beta, memory, segment_ids)
