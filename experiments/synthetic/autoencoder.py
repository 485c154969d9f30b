"""The model of MAD's compression task: all that a sequence holds, in what its last position knows."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mesanet_jax import MesaNetConfig, layers
from mesanet_jax.model import embed, stack
from mesanet_jax.shapes import Logits, Tokens


class AutoEncoder(nn.Module):
    """Encoder of any pattern of mixers, and a decoder that says the token at each position from the last one's output.

    The decoder, two layers of the model's width, is that of the authors of MAD (arXiv 2403.17844, appendix B.6).
    """

    config: MesaNetConfig

    @nn.compact
    def __call__(self, tokens: Tokens) -> Logits:
        """[b, t] -> [b, t, y], of the token at each position itself."""
        c = self.config
        x, _ = embed(c, tokens)
        x, _ = stack(c)(x, (None,) * len(c.pattern), None)
        x = x[:, -1:] + _waves(tokens.shape[1], c.model_dim)
        for number in range(2):
            x = layers.rms_norm(c, f"norm_{number}")(x)
            x = nn.gelu(self._dense(c.model_dim, f"dense_{number}")(x))
        return self._dense(c.vocab_size, "read_out")(layers.rms_norm(c, "out_norm")(x)).astype(jnp.float32)

    def _dense(self, size: int, name: str) -> nn.Dense:
        init = layers.named(layers.fan_in_normal(), ("embed", "mlp"))
        return nn.Dense(size, dtype=self.config.dtype, kernel_init=init, name=name)


def _waves(length: int, size: int) -> jax.Array:
    """Sines and cosines of every position, in wavelengths from 2 pi to 20,000 pi: [t, d]."""
    angles = jnp.arange(length)[:, None] / 10_000 ** jnp.linspace(0, 1, size // 2)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
