"""The legend of axis letters, then the arrays that have a name.

`b` batch, `e` experts, `r` references, `m` neighbours of one input, `p` embedding, `f` features, `y` answers,
`s` steps.
"""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

Routing = Float[Array, "b e"]  # non-negative; each group of experts sums to 1
Logits = Float[Array, "b y"]
Labels = Int[Array, "b"]
Embedding = Float[Array, "b p"]  # unit length
Features = Float[Array, "b f"]


class Readout(NamedTuple):
    """Logits as an affine function of the routing: logits[y] = sum_e routing[e] weight[e, y] + offset[y]."""

    weight: Float[Array, "*b e y"]
    offset: Float[Array, "*b y"]

    def __call__(self, routing: Float[Array, "*b e"]) -> Float[Array, "*b y"]:
        """Returns the logits under a routing. An offset of -inf masks an answer."""
        return (routing[..., None] * self.weight).sum(-2) + self.offset

    def take(self, indices: Int[Array, "..."]) -> "Readout":
        """Returns the rows of a [r, ...] read-out that the indices name."""
        return jax.tree.map(lambda x: x[indices], self)
