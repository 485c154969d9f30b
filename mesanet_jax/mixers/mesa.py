"""The Mesa layer: at every token, the optimal linear map for the context so far (arXiv 2506.05233)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mesanet_jax import layers, sharding
from mesanet_jax.config import MesaNetConfig
from mesanet_jax.shapes import Activations, Gates, SegmentIds
from pallas_kernels import MesaState


class MesaMixerState(NamedTuple):
    """Constant in length: the last inputs of the convolution and the two matrices of every head."""

    queries: jax.Array  # [b, w-1, h, k]
    keys: jax.Array  # [b, w-1, h, k]
    memory: MesaState


class Mesa(nn.Module):
    """Projections, short convolution, gates, the solve, a norm per head, projection back."""

    config: MesaNetConfig

    @nn.compact
    def __call__(self, x: Activations, state: MesaMixerState | None, segment_ids: SegmentIds | None):
        """Returns (y [b, t, d], state); see `mesanet_jax.mixers`."""
        c = self.config
        queries, keys, memory = state or (None, None, None)
        q, k, v = layers.project_heads(c, x, {"query": c.key_dim, "key": c.key_dim, "value": c.value_dim})
        q, queries = layers.ShortConv(c, name="query_conv")(q, queries, segment_ids)
        k, keys = layers.ShortConv(c, name="key_conv")(k, keys, segment_ids)
        q, k = layers.unit_norm(nn.silu(q)), layers.unit_norm(nn.silu(k))
        log_decay, beta = self._gates(x)
        watched = self.is_mutable_collection("intermediates")
        out, memory, *report = sharding.mesa(
            q,
            k,
            v,
            log_decay,
            beta,
            self._ridge(),
            memory,
            segment_ids=segment_ids,
            solver=c.solver,
            with_report=watched,
        )
        if watched:
            self.sow("intermediates", "solve_report", report[0])
        out = layers.head_norm(c, "out_norm")(out)
        return layers.merge_heads(c, "out")(out), MesaMixerState(queries, keys, memory)

    def _gates(self, x: Activations) -> tuple[Gates, Gates]:
        """Returns log_decay and beta [b, t, h] in float32; full input strength lowers the bound of the forget gate."""
        c = self.config

        def logit(name: str, bias: float):
            # on every device for all heads: a few columns, whose gradient would otherwise be a sum over devices
            dense = nn.Dense(
                c.num_heads,
                dtype=jnp.float32,
                kernel_init=layers.named(layers.fan_in_normal(), ("embed", "gates")),
                bias_init=layers.named(nn.initializers.constant(bias), ("gates",)),
                name=name,
            )
            return sharding.lay_out(dense(x), "batch", "time", "gates")

        beta = nn.sigmoid(logit("input_gate", 0.0))
        bound = jnp.log1p(-(1 - c.gate_bound) * beta**2)
        return nn.log_sigmoid(logit("forget_gate", c.forget_bias)) + bound, beta

    def _ridge(self) -> jax.Array:
        """Returns Lambda [h, k] = floor + softplus(parameter), which starts at ridge_init."""
        c = self.config
        start = jnp.log(jnp.expm1(c.ridge_init - c.ridge_floor))
        init = layers.named(nn.initializers.constant(start), ("heads", "head"))
        return c.ridge_floor + nn.softplus(self.param("ridge", init, (c.num_heads, c.key_dim)))
