"""Embedders: callables (params, inputs) -> unit vectors, each with a name that reference sets remember."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from r2t2_jax.models.contract import Inputs, Params
from r2t2_jax.shapes import Embedding


class Embedder(NamedTuple):
    """How inputs become neighbours."""

    name: str
    embed: Callable[[Params, Inputs], Embedding]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standardised:
    """A view of the inputs whose columns are brought to mean 0 and spread 1 by constants fixed once.

    Attributes:
      view: (params, inputs) -> [b, n].
      center, spread: of each of the n columns, measured on the references' inputs.
    """

    view: Callable[[Params, Inputs], Float[Array, "b n"]]
    center: tuple[float, ...]
    spread: tuple[float, ...]

    @classmethod
    def measured(
        cls, view: Callable[[Params, Inputs], Float[Array, "b n"]], params: Params, inputs: Inputs
    ) -> "Standardised":
        """Returns the view with the constants of these inputs."""
        values = np.asarray(view(params, inputs), np.float64)
        spread = np.maximum(values.std(0), 1e-6)
        return cls(view=view, center=tuple(values.mean(0).tolist()), spread=tuple(spread.tolist()))

    def __call__(self, params: Params, inputs: Inputs) -> Float[Array, "b n"]:
        """Returns the standardised columns over sqrt(n): of length 1 where all are one spread off."""
        scaled = (self.view(params, inputs) - jnp.asarray(self.center)) / jnp.asarray(self.spread)
        return scaled / len(self.center) ** 0.5

    @property
    def hash(self) -> str:
        """Eight hex digits that change with any of the constants."""
        return hashlib.sha256(repr((self.center, self.spread)).encode()).hexdigest()[:8]


def beside(question: Callable[[Params, Inputs], Embedding], picture: Standardised, share: float) -> Embedder:
    """Returns question and picture side by side, as one unit vector.

    Args:
      question: (params, inputs) -> unit vectors [b, p], such as FrozenModel.embed.
      picture: what is put beside it.
      share: how much the picture counts; at 1 a picture one standard deviation off in all columns weighs as much as
        the question.

    Raises:
      ValueError: share is negative or not finite.
    """
    if not 0 <= share < math.inf:
        raise ValueError(f"beside: share={share} must be finite and not negative.")

    def embed(params: Params, inputs: Inputs) -> Embedding:
        both = jnp.concatenate([question(params, inputs), share * picture(params, inputs)], axis=-1)
        return both / jnp.linalg.norm(both, axis=-1, keepdims=True)

    return Embedder(f"question + {share:g} picture {picture.hash}", embed)


def given(name: str) -> Embedder:
    """Returns the embedder that finds vectors computed elsewhere, such as by `sentences`, in inputs["embedding"]."""
    return Embedder(name, lambda params, inputs: inputs["embedding"])


def sentences(texts: Sequence[str], model: str = "sentence-transformers/all-MiniLM-L6-v2") -> Float[np.ndarray, "n p"]:
    """Returns unit vectors of texts by a pretrained sentence embedder, on the host; needs the extra `embed`.

    Raises:
      ImportError: the extra is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]  # an extra
    except ModuleNotFoundError as error:
        raise ImportError(
            f"sentences: {error.name} is not installed; pip install 'mesanet-jax[embed]' brings it."
        ) from error
    return np.asarray(SentenceTransformer(model).encode(list(texts), normalize_embeddings=True), np.float32)
