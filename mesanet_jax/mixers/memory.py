"""What mixers with a matrix per head for a memory have in common; each says in its own file how it writes and reads."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mesanet_jax import layers, sharding
from mesanet_jax.config import MesaNetConfig
from mesanet_jax.shapes import Activations, Gates, SegmentIds


class MemoryMixerState(NamedTuple):
    """Constant in length: the last inputs of the convolution, and the memory of every head."""

    queries: jax.Array  # [b, w-1, h, k]
    keys: jax.Array  # [b, w-1, h, k]
    memory: Any


class MemoryMixer(nn.Module):
    """Projections, short convolution, the memory, a norm per head, projection back."""

    config: MesaNetConfig

    @nn.compact
    def __call__(self, x: Activations, state: MemoryMixerState | None, segment_ids: SegmentIds | None):
        """Returns (y [b, t, d], state); see `mesanet_jax.mixers`."""
        c = self.config
        queries, keys, memory = state or (None, None, None)
        q, k, v = layers.project_heads(c, x, {"query": c.key_dim, "key": c.key_dim, "value": c.value_dim})
        q, queries = layers.ShortConv(c, name="query_conv")(q, queries, segment_ids)
        k, keys = layers.ShortConv(c, name="key_conv")(k, keys, segment_ids)
        out, memory = self.remember(*self.activate(q, k), v, x, memory, segment_ids)
        out = layers.head_norm(c, "out_norm")(out)
        return layers.merge_heads(c, out, "out"), MemoryMixerState(queries, keys, memory)

    def activate(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns queries and keys as the memory takes them: of length 1."""
        return layers.unit_norm(nn.silu(q)), layers.unit_norm(nn.silu(k))

    def remember(self, q, k, v, x: Activations, memory, segment_ids: SegmentIds | None) -> tuple[jax.Array, Any]:
        """Returns what the queries read [b, t, h, v], and the memory after the last token."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it remembers.")

    def logit(self, name: str, x: Activations, bias: nn.initializers.Initializer) -> Gates:
        """Returns a number per token and head in float32, a projection of x, that a gate is made of."""
        # on every device for all heads: a few columns, whose gradient would otherwise be a sum over devices
        dense = nn.Dense(
            self.config.num_heads,
            dtype=jnp.float32,
            kernel_init=layers.named(layers.fan_in_normal(), ("embed", "gates")),
            bias_init=layers.named(bias, ("gates",)),
            name=name,
        )
        return sharding.lay_out(dense(x), "batch", "time", "gates")

    def strength(self, x: Activations) -> Gates:
        """Returns the input gate beta [b, t, h] in (0, 1)."""
        return nn.sigmoid(self.logit("input_gate", x, nn.initializers.zeros))

    def log_forget(self, x: Activations) -> Gates:
        """Returns log gamma [b, t, h] < 0 of the forget gate."""
        bias = nn.initializers.constant(self.config.forget_bias)
        return nn.log_sigmoid(self.logit("forget_gate", x, bias))
