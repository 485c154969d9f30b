"""Hawk (arXiv 2402.19427): a gated linear recurrence of channels, the RG-LRU, beside a GeLU branch."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mesanet_jax import layers, sharding
from mesanet_jax.config import MesaNetConfig
from mesanet_jax.recurrences import gated_sum
from mesanet_jax.shapes import Activations, SegmentIds

SHARPNESS = 8.0  # the paper's c
SLOWEST, FASTEST = 0.999, 0.9  # decays at initialisation, before the power c r_t
SMALLEST_GAP = 2.5e-7  # of 1 - a^2: keeps the gradient of its root below 1,000


class HawkState(NamedTuple):
    """Constant in length: the last inputs of the convolution, and the channels."""

    inputs: jax.Array  # [b, w-1, h, r]
    hidden: jax.Array  # [b, h, r] float32


class Hawk(nn.Module):
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t) with a_t = a^(c r_t); channels in as many groups r as heads."""

    config: MesaNetConfig

    @nn.compact
    def __call__(self, x: Activations, state: HawkState | None, segment_ids: SegmentIds | None):
        """Returns (y [b, t, d], state); see `mesanet_jax.mixers`."""
        c = self.config
        inputs, hidden = state or (None, None)
        size = c.channels // c.num_heads
        branch, y = layers.project_heads(c, x, {"gate": size, "input": size})
        y, inputs = layers.ShortConv(c, name="conv")(y, inputs, segment_ids)
        (y,) = sharding.whole_in_time(y)
        log_decay, entering = self._gated(y.astype(jnp.float32))
        h, hidden = gated_sum(entering, log_decay, hidden, segment_ids)
        out = h.astype(x.dtype) * nn.gelu(branch)
        return layers.merge_heads(c, out, "out"), HawkState(inputs, hidden)

    def _gated(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns log a_t and what enters the channels, both [b, t, h, r] in float32."""
        rate = nn.sigmoid(_GroupDense(name="recurrence_gate")(x))
        speed = nn.softplus(self.param("decay", layers.named(_decay_init, ("heads", "head")), x.shape[2:]))
        log_decay = -SHARPNESS * rate * speed
        gap = jnp.maximum(-jnp.expm1(2 * log_decay), SMALLEST_GAP)
        return log_decay, jnp.sqrt(gap) * nn.sigmoid(_GroupDense(name="input_gate")(x)) * x


class _GroupDense(nn.Module):
    """A projection of every group of channels onto itself."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, t, h, r] -> [b, t, h, r]."""
        heads, size = x.shape[2:]
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=2, batch_axis=0)
        kernel = self.param("kernel", layers.named(init, ("heads", "head", None)), (heads, size, size))
        bias = self.param("bias", layers.named(nn.initializers.zeros, ("heads", "head")), (heads, size))
        return jnp.einsum("bthr,hrs->bths", x, kernel) + bias


def _decay_init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Decays whose squares are uniform, as parameters: a = exp(-softplus(parameter))."""
    square = jax.random.uniform(key, shape, dtype, FASTEST**2, SLOWEST**2)
    return jnp.log(jnp.expm1(-0.5 * jnp.log(square)))
