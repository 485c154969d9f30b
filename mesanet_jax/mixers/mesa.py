"""The Mesa layer: at every token, the optimal linear map for the context so far (arXiv 2506.05233)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mesanet_jax import layers, sharding
from mesanet_jax.mixers.memory import MemoryMixer
from mesanet_jax.shapes import Activations, Gates, SegmentIds
from pallas_kernels import MesaState


class SolveInputs(NamedTuple):
    """What the systems of a layer are made of, but for the values."""

    q: jax.Array  # [b, t, h, k]
    k: jax.Array  # [b, t, h, k]
    log_decay: Gates
    beta: Gates
    ridge: jax.Array  # [h, k]


class Mesa(MemoryMixer):
    """Reads (H_t + Lambda)^{-1} q_t out of G_t, where both sums forget."""

    def remember(self, q, k, v, x: Activations, memory: MesaState | None, segment_ids: SegmentIds | None):
        """Solves; where somebody watches, leaves a SolveReport in "intermediates" and what was solved in "solves"."""
        beta = self.strength(x)
        # full input strength lowers the bound of the forget gate
        log_decay = self.log_forget(x) + jnp.log1p(-(1 - self.config.gate_bound) * beta**2)
        ridge = self._ridge()
        if not self.is_initializing():  # which would take it for a parameter
            self.sow("solves", "inputs", SolveInputs(q, k, log_decay, beta, ridge))
        watched = self.is_mutable_collection("intermediates")
        out, memory, *report = sharding.mesa(
            q,
            k,
            v,
            log_decay,
            beta,
            ridge,
            memory,
            segment_ids=segment_ids,
            solver=self.config.solver,
            with_report=watched,
        )
        if watched:
            self.sow("intermediates", "solve_report", report[0])
        return out, memory

    def _ridge(self) -> jax.Array:
        """Returns Lambda [h, k] = floor + softplus(parameter), which starts at ridge_init."""
        c = self.config
        start = jnp.log(jnp.expm1(c.ridge_init - c.ridge_floor))
        init = layers.named(nn.initializers.constant(start), ("heads", "head"))
        return c.ridge_floor + nn.softplus(self.param("ridge", init, (c.num_heads, c.key_dim)))
