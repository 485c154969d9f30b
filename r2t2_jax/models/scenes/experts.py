"""Six experts that each see something else of a scene; all read the question, all speak in vectors of one width."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from r2t2_jax.models.scenes.vocabulary import COLORS, SHAPES, TEMPLATES

NUM_TOKENS = 4  # the quarters of the picture

Image = Float[Array, "b 32 32 3"]  # between 0 and 1
Tokens = Float[Array, "b t d"]


def encode_question(question: Int[Array, "b 3"]) -> Float[Array, "b q"]:
    """Returns three one-hot vectors side by side: template, shape, colour (the last two with a place for none)."""
    sizes = (len(TEMPLATES), len(SHAPES) + 1, len(COLORS) + 1)
    return jnp.concatenate([jax.nn.one_hot(question[:, i], size) for i, size in enumerate(sizes)], axis=-1)


# --- what an expert sees ---


def _grey(image: Image) -> Float[Array, "b 32 32"]:
    return image.mean(-1)


def _see_color(image: Image):
    return (image - 0.15) / 0.25


def _see_contrast(image: Image):
    """Brightness against its surroundings, in units of the local contrast, and its slopes."""
    grey = _grey(image)
    around = _box(grey, 7)
    spread = jnp.sqrt(_box((grey - around) ** 2, 7) + 1e-3)
    normal = (grey - around) / spread
    right = normal - jnp.roll(normal, 1, axis=2)
    down = normal - jnp.roll(normal, 1, axis=1)
    return jnp.stack([normal, right, down], axis=-1)


def _see_coarse_chroma(image: Image):
    """Colour without brightness, at half of the resolution."""
    coarse = image.reshape(-1, 16, 2, 16, 2, 3).mean((2, 4))
    return (coarse - coarse.mean(-1, keepdims=True)) / 0.15


def _see_layout(image: Image):
    """How far each patch of two by two pixels stands out from the ground."""
    grey = _grey(image).reshape(-1, 16, 2, 16, 2).mean((2, 4))
    ground = jnp.median(grey, axis=(1, 2), keepdims=True)
    return jnp.abs(grey - ground)[..., None] / 0.2


def _box(x: Float[Array, "b i j"], size: int) -> Float[Array, "b i j"]:
    """Mean over a square window."""
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, size, size), (1, 1, 1), "SAME")
    count = jax.lax.reduce_window(jnp.ones_like(x[:1]), 0.0, jax.lax.add, (1, size, size), (1, 1, 1), "SAME")
    return total / count


def quarters(x: Float[Array, "b i j c"]) -> Float[Array, "b t ijc"]:
    """Returns all values of each quarter of the picture side by side."""
    b, i, j, c = x.shape
    return x.reshape(b, 2, i // 2, 2, j // 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, NUM_TOKENS, -1)


# --- how it turns it into tokens ---


HE = nn.initializers.he_normal()


class Convolutions(nn.Module):
    """A small stack of strided convolutions, then one token of each quarter of the picture."""

    see: Callable
    widths: tuple[int, ...]
    width: int

    @nn.compact
    def __call__(self, image: Image) -> Tokens:
        """Returns four tokens of the picture."""
        x = self.see(image)
        for width in self.widths:
            x = nn.relu(nn.Conv(width, (3, 3), strides=(2, 2), kernel_init=HE)(x))
        return nn.relu(nn.Dense(self.width, kernel_init=HE)(quarters(x)))


class DigitReader(nn.Module):
    """A perceptron on the brightness of each quarter of the picture."""

    width: int

    @nn.compact
    def __call__(self, image: Image) -> Tokens:
        """Returns four tokens of the picture."""
        cells = quarters(_grey(image)[..., None])
        x = nn.relu(nn.Dense(128, kernel_init=HE)((cells - cells.mean(-1, keepdims=True)) / 0.2))
        return nn.relu(nn.Dense(self.width, kernel_init=HE)(x))


class Language(nn.Module):
    """Sees nothing: what questions alone tell."""

    width: int

    @nn.compact
    def __call__(self, image: Image) -> Tokens:
        """Returns four tokens of zeros."""
        return jnp.zeros((len(image), NUM_TOKENS, self.width))


EXPERTS: dict[str, Callable[[int], nn.Module]] = {
    "color": lambda width: Convolutions(_see_color, (16, 32, 32), width),
    "contrast": lambda width: Convolutions(_see_contrast, (16, 32, 32), width),
    "coarse chroma": lambda width: Convolutions(_see_coarse_chroma, (24, 32), width),
    "digit reader": lambda width: DigitReader(width),
    "layout": lambda width: Convolutions(_see_layout, (16, 24), width),
    "language": lambda width: Language(width),
}


class Expert(nn.Module):
    """Tokens of the picture, and what they say to the question: each is read with the question in mind."""

    kind: str
    width: int = 48
    num_heads: int = 8

    @nn.compact
    def __call__(self, image: Image, question: Float[Array, "b q"]) -> tuple[Tokens, Float[Array, "b d"]]:
        """Returns tokens of the picture, and a vector in reply to the question."""
        tokens = EXPERTS[self.kind](self.width)(image)
        tokens = nn.LayerNorm()(tokens) + self.param("place", nn.initializers.normal(0.5), tokens.shape[1:])
        size = 2 * self.width // self.num_heads
        asked = nn.relu(nn.Dense(2 * self.width, kernel_init=HE)(question))
        query = nn.DenseGeneral((self.num_heads, size))(asked)
        key = nn.DenseGeneral((self.num_heads, size))(tokens)
        value = nn.DenseGeneral((self.num_heads, size))(tokens)
        scores = jnp.einsum("bhd,bthd->bht", query, key)
        one, many = jnp.split(scores, 2, axis=1)
        attention = jnp.concatenate([jax.nn.softmax(one), jax.nn.sigmoid(many)], axis=1)
        seen = jnp.einsum("bht,bthd->bhd", attention, value).reshape(len(image), -1)
        both = jnp.concatenate([nn.LayerNorm()(seen), asked], axis=-1)
        return tokens, nn.Dense(self.width)(nn.relu(nn.Dense(2 * self.width, kernel_init=HE)(both)))
