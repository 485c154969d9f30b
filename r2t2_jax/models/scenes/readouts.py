"""How the experts' words become an answer: an affine read-out behind a router, or a deep one that mixes twice."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from r2t2_jax.models.scenes.experts import quarters
from r2t2_jax.models.scenes.vocabulary import ANSWERS
from r2t2_jax.shapes import Readout, Routing


def _thumbnail(image: Float[Array, "b 32 32 3"]) -> Float[Array, "b 4 4 3"]:
    return image.reshape(-1, 4, 8, 4, 8, 3).mean((2, 4))


class Router(nn.Module):
    """Weights of the experts from the question and a thumbnail of four by four pixels."""

    num_experts: int
    hidden: int = 64

    @nn.compact
    def __call__(self, image: Float[Array, "b 32 32 3"], question: Float[Array, "b q"]) -> Routing:
        """Returns weights of sum 1."""
        thumbnail = _thumbnail(image).reshape(len(image), -1)
        x = nn.relu(nn.Dense(self.hidden)(jnp.concatenate([question, thumbnail], axis=-1)))
        return jax.nn.softmax(nn.Dense(self.num_experts)(x))


class AffineReadout(nn.Module):
    """One adapter per expert, then answers in common: the logits are affine in the routing."""

    @nn.compact
    def __call__(self, vectors: Float[Array, "b e d"]) -> Readout:
        """Returns what holds for every routing."""
        num_experts, width = vectors.shape[1:]
        adapters = self.param("adapters", nn.initializers.lecun_normal(batch_axis=0), (num_experts, width, width))
        answers = self.param("answers", nn.initializers.lecun_normal(), (width, len(ANSWERS)))
        bias = self.param("bias", nn.initializers.zeros, (len(ANSWERS),))
        weight = jnp.einsum("bed,edf,fy->bey", vectors, adapters, answers)
        return Readout(weight, jnp.broadcast_to(bias, (len(vectors), len(ANSWERS))))


class DeepReadout(nn.Module):
    """Tokens of two groups of experts, mixed at two depths by gates of each token, as in MoAI (arXiv 2403.07508).

    One routing shifts the logits of all gates: gate = softmax(logits + log routing - log mean gate), so that the
    model's own routing, which is the mean gate of the first depth, leaves every token's gates as they are. Nothing
    after the first depth is affine in the routing.
    """

    groups: tuple[int, ...]
    depth: int = 2

    def setup(self):
        """Declares a mixer per depth."""
        self.look = nn.Dense(64)
        self.hear = nn.Dense(64)
        self.mixers = [Mixer(self.groups) for _ in range(self.depth)]
        self.norm = nn.LayerNorm()
        self.answer = nn.Sequential([nn.Dense(96), nn.relu, nn.Dense(len(ANSWERS))])

    def start(self, image: Float[Array, "b 32 32 3"], question: Float[Array, "b q"]) -> Float[Array, "b t d"]:
        """Returns the stream before the first mixer: the question and a glance at each quarter."""
        return self.look(quarters(_thumbnail(image))) + self.hear(question)[:, None]

    def route(self, image: Float[Array, "b 32 32 3"], question: Float[Array, "b q"]) -> Routing:
        """Returns the mean over tokens of the first depth's gates."""
        return self.mixers[0].gates(self.start(image, question), 0.0).mean(1)

    def __call__(
        self,
        image: Float[Array, "b 32 32 3"],
        question: Float[Array, "b q"],
        tokens: Float[Array, "b e t k"],
        routing: Routing | None = None,
    ) -> Float[Array, "b y"]:
        """Returns logits under a routing; None is the model's own, and what the gates learn under."""
        stream = self.start(image, question)
        own = self.mixers[0].gates(stream, 0.0).mean(1)
        shift = 0.0 if routing is None else (_log(routing) - _log(own))[:, None]
        for mixer in self.mixers:
            stream = mixer(stream, tokens, shift)
        return self.answer(self.norm(stream).mean(1))


class Mixer(nn.Module):
    """Adds a gated mix of the experts' tokens to the stream, then a perceptron."""

    groups: tuple[int, ...]

    def setup(self):
        """Declares gates, adapters and the perceptron."""
        self.gate = nn.Dense(sum(self.groups))
        self.before, self.between = nn.LayerNorm(), nn.LayerNorm()
        self.adapt = nn.DenseGeneral(features=64, axis=-1, batch_dims=(0,))
        self.widen, self.narrow = nn.Dense(128), nn.Dense(64)

    def gates(self, stream: Float[Array, "b t d"], shift) -> Float[Array, "b t e"]:
        """Returns the weights of each group of experts for each token."""
        logits = self.gate(self.before(stream)) + shift
        parts = jnp.split(logits, list(itertools.accumulate(self.groups))[:-1], axis=-1)
        return jnp.concatenate([jax.nn.softmax(x) for x in parts], axis=-1)

    def __call__(self, stream: Float[Array, "b t d"], tokens: Float[Array, "b e t k"], shift) -> Float[Array, "b t d"]:
        """Returns the stream after the mix."""
        words = self.adapt(tokens.swapaxes(0, 1)).swapaxes(0, 1)
        stream = stream + jnp.einsum("bte,betd->btd", self.gates(stream, shift), nn.relu(words))
        return stream + self.narrow(nn.relu(self.widen(self.between(stream))))


def _log(routing: Routing) -> Routing:
    return jnp.log(jnp.maximum(routing, 1e-6))
