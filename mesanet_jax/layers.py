"""What every mixer and block is made of. The mathematics is in functions; modules hold parameters.

Parameters carry logical axis names; `sharding.py` says which mesh axis each name means.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mesanet_jax import sharding, weights
from mesanet_jax.config import MesaNetConfig
from mesanet_jax.shapes import Activations, SegmentIds


def named(init: Callable, axes: tuple[str, ...]) -> Callable:
    """Returns the initialiser with logical axis names on what it makes."""
    return nn.with_logical_partitioning(init, axes)


def fan_in_normal(scale: float = 1.0, in_axis: int | tuple[int, ...] = -2):
    """Normal initialiser of variance scale / fan-in."""
    return nn.initializers.variance_scaling(scale, "fan_in", "normal", in_axis=in_axis)


def residual_init(config: MesaNetConfig, in_axis: int | tuple[int, ...] = -2):
    """Initialiser of projections into the residual stream: variance times 2 / number of blocks (appendix G.2)."""
    return fan_in_normal(2.0 / config.num_layers, in_axis)


class Kernel(nn.Module):
    """The parameter of a projection, for `weights.product`."""

    @nn.compact
    def __call__(self, shape: tuple[int, ...], init: Callable) -> jax.Array:
        """Returns the parameter."""
        return self.param("kernel", init, shape)


def project_heads(config: MesaNetConfig, x: Activations, sizes: dict[str, int]) -> list[jax.Array]:
    """Projects x [b, t, d] to [b, t, h, size] for each name, in one product.

    Where heads are split over devices its gradient is one sum over them; apart they would have one for each name.
    """
    init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2))
    shape, axes = (x.shape[-1], config.num_heads), ("embed", "heads", "head")
    kernels = [Kernel(name=name)((*shape, size), named(init, axes)) for name, size in sizes.items()]
    together = weights.product(x, jnp.concatenate(kernels, axis=-1), *axes)
    return jnp.split(together, np.cumsum(list(sizes.values()))[:-1], axis=-1)


def merge_heads(config: MesaNetConfig, x: jax.Array, name: str) -> Activations:
    """Projects x [b, t, h, v] to [b, t, d] into the residual stream."""
    init, axes = residual_init(config, in_axis=(0, 1)), ("heads", "head", "embed")
    kernel = Kernel(name=name)((*x.shape[2:], config.model_dim), named(init, axes))
    return weights.product(x.astype(config.dtype), kernel, *axes)


def rms_norm(config: MesaNetConfig, name: str) -> nn.RMSNorm:
    """RMS norm over the model axis."""
    scale_init = named(nn.initializers.ones, ("embed",))
    return nn.RMSNorm(config.norm_eps, dtype=config.dtype, scale_init=scale_init, name=name)


def head_norm(config: MesaNetConfig, name: str) -> nn.RMSNorm:
    """RMS norm over the values of each head, with weights of its own per head (eq. 44)."""
    scale_init = named(nn.initializers.ones, ("heads", "head"))
    axes = {"reduction_axes": -1, "feature_axes": (-2, -1)}
    return nn.RMSNorm(config.norm_eps, dtype=config.dtype, scale_init=scale_init, name=name, **axes)


def unit_norm(x: jax.Array) -> jax.Array:
    """Scales the last axis to length 1, computed in float32; tiny vectors go to 0 instead of noise."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.sum(x32 * x32, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary position encoding (arXiv 2104.09864) of x [b, t, h, k] at positions [t], computed in float32."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, None, None] * frequency
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


class ShortConv(nn.Module):
    """Causal depthwise convolution along time that stays within documents."""

    config: MesaNetConfig

    @nn.compact
    def __call__(self, x: jax.Array, history: jax.Array | None, segment_ids: SegmentIds | None):
        """Convolves x [b, t, h, c]; history [b, w-1, h, c] holds the inputs before it, None means none.

        Returns:
          (the result, of x's shape, and the history for the next call).
        """
        width = self.config.conv_width
        taps_init = named(nn.initializers.normal(width**-0.5), ("taps", "heads", "head"))
        taps = self.param("taps", taps_init, (width, *x.shape[2:])).astype(x.dtype)
        if history is None:
            history = jnp.zeros((x.shape[0], width - 1, *x.shape[2:]), x.dtype)
        return sharding.short_convolution(x, taps, history, segment_ids)


class SwiGLU(nn.Module):
    """Gated feed-forward layer: (silu(x W_g) * x W_u) W_o, of width three times the model's."""

    config: MesaNetConfig

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        """[b, t, d] -> [b, t, d]."""
        c = self.config
        sizes = {"embed": c.model_dim, "mlp": c.feed_forward_dim}

        def projected(x, name, init, *axes):
            kernel = Kernel(name=name)(tuple(sizes[axis] for axis in axes), named(init, axes))
            return weights.product(x.astype(c.dtype), kernel, *axes)

        gate, up = (projected(x, name, fan_in_normal(), "embed", "mlp") for name in ("gate", "up"))
        return projected(nn.silu(gate) * up, "out", residual_init(c), "mlp", "embed")
