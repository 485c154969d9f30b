"""Six experts that look at scenes, a router, and one of two read-outs, as a Flax module and as a FrozenModel."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from r2t2_jax.models.contract import FrozenModel, Inputs, Params
from r2t2_jax.models.scenes.experts import EXPERTS, Expert, encode_question
from r2t2_jax.models.scenes.readouts import AffineReadout, DeepReadout, Router
from r2t2_jax.models.scenes.vocabulary import ANSWERS
from r2t2_jax.shapes import Embedding, Features, Logits, Readout, Routing

GROUPS = {"affine": (6,), "deep": (3, 3)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """Which of the family.

    Attributes:
      readout: "affine", whose logits are affine in the routing, or "deep", where nothing can be cached exactly.
      width: of every expert's tokens and vector.

    Raises:
      ValueError: the read-out is unknown, or attention heads do not divide the width.
    """

    readout: str = "affine"
    width: int = 48

    def __post_init__(self):
        if self.readout not in GROUPS:
            raise ValueError(f"ScenesConfig: readout={self.readout!r} is unknown; use one of {tuple(GROUPS)}.")
        if self.width < 1 or self.width % 4:
            raise ValueError(f"ScenesConfig: width={self.width} must be a positive multiple of 4, the attention heads.")


class ScenesModel(nn.Module):
    """The parameters; what is computed from them are the methods."""

    config: ScenesConfig

    def setup(self):
        """Declares experts, router and read-out."""
        self.experts = [Expert(kind, self.config.width) for kind in EXPERTS]
        if self.config.readout == "affine":
            self.router, self.readout = Router(len(EXPERTS)), AffineReadout()
        else:
            self.deep = DeepReadout(GROUPS["deep"])

    def __call__(self, inputs: Inputs) -> Logits:
        """Returns the model's own answer; init goes through here and touches every parameter."""
        return self.forward(inputs, self.route(inputs))

    def consult(self, inputs: Inputs) -> tuple[Float[Array, "b e t d"], Float[Array, "b e d"]]:
        """Returns what every expert says: tokens of the picture, and a vector in reply to the question."""
        image, question = see(inputs)
        words = [expert(image, question) for expert in self.experts]
        return jnp.stack([tokens for tokens, _ in words], 1), jnp.stack([vector for _, vector in words], 1)

    def route(self, inputs: Inputs) -> Routing:
        """Returns the routing that the model itself chooses."""
        return self.router(*see(inputs)) if self.config.readout == "affine" else self.deep.route(*see(inputs))

    def read(self, inputs: Inputs) -> Readout:
        """Returns the read-out that holds for every routing of these inputs (affine models)."""
        return self.readout(self.consult(inputs)[1])

    def forward(self, inputs: Inputs, routing: Routing) -> Logits:
        """Returns the logits under a routing."""
        if self.config.readout == "affine":
            return self.read(inputs)(routing)
        return self.deep(*see(inputs), self.consult(inputs)[0], routing)

    def features(self, inputs: Inputs) -> Features:
        """Returns question, picture statistics, log routing and the experts' vectors."""
        image, question = see(inputs)
        own = jnp.log(jnp.maximum(self.route(inputs), 1e-6))
        vectors = self.consult(inputs)[1].reshape(len(image), -1)
        return jnp.concatenate([question, picture_statistics(image), own, vectors], axis=-1)


def see(inputs: Inputs) -> tuple[Float[Array, "b 32 32 3"], Float[Array, "b q"]]:
    """Returns {"image": [b, 32, 32, 3] uint8, "question": [b, 3]} as pixels between 0 and 1 and one-hot vectors."""
    return inputs["image"].astype(jnp.float32) / 255, encode_question(inputs["question"])


def picture_statistics(image: Float[Array, "b 32 32 3"]) -> Float[Array, "b 10"]:
    """Returns mean and spread of each colour, roughness along both axes, curvature, and colourfulness."""
    grey = image.mean(-1)
    rough = [jnp.abs(jnp.diff(grey, n, axis=axis)).mean((1, 2)) for n, axis in ((1, 1), (1, 2), (2, 2))]
    colorful = jnp.abs(image - grey[..., None]).mean((1, 2, 3))
    return jnp.concatenate([image.mean((1, 2)), image.std((1, 2)), jnp.stack([*rough, colorful], -1)], axis=-1)


def embed_question(params: Params, inputs: Inputs) -> Embedding:
    """Returns the question as a unit vector, the paper's choice: the picture plays no part in who is a neighbour."""
    return encode_question(inputs["question"]) / 3**0.5


def frozen(config: ScenesConfig) -> FrozenModel:
    """Returns the family's member as pure functions of (params, inputs)."""
    module = ScenesModel(config)

    def method(name):
        return lambda params, *args: module.apply(params, *args, method=name)

    return FrozenModel(
        forward=method("forward"),
        router=method("route"),
        embed=embed_question,
        features=method("features"),
        readout=method("read") if config.readout == "affine" else None,
        groups=GROUPS[config.readout],
        experts=tuple(EXPERTS),
        answers=ANSWERS,
    )
