"""What re-routing decided about a batch of inputs: arrays with the batch as first axis, all that a record needs."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

from r2t2_jax.shapes import Logits, Routing

REROUTED, FAR, FLAT, UNSURE, NOT_FINITE, TURNED_OFF = range(6)
STATUSES = {
    REROUTED: "rerouted",
    FAR: "abstained: the neighbours are too far",
    FLAT: "abstained: too little to gain",
    UNSURE: "abstained: the new answer leads by too little",
    NOT_FINITE: "fell back: not a finite number",
    TURNED_OFF: "turned off",
}


class Neighbors(NamedTuple):
    """Neighbours of each input among the references, nearest first."""

    indices: Int[Array, "b m"]  # rows of the reference set; 0 where there is none
    distance: Float[Array, "b m"]  # between unit vectors, 0 to 2; inf where there is none
    weights: Float[Array, "b m"]  # of the kernel, sum 1; 0 where there is none

    @property
    def similarity(self) -> Float[Array, "b m"]:
        """Cosine of the embeddings; -inf where there is no neighbour."""
        return 1 - self.distance**2 / 2


class Decisions(NamedTuple):
    """The answer to every input, before and after, and what it rests on.

    Where the status is not REROUTED, `routing` and `logits` are bit for bit `base_routing` and `base_logits`.
    """

    status: Int[Array, "b"]  # a key of STATUSES
    routing: Routing
    base_routing: Routing
    logits: Logits
    base_logits: Logits
    proposed: Routing  # what the strategy wanted, taken or not
    loss_before: Float[Array, "b"]  # over the neighbours, at base_routing
    loss_after: Float[Array, "b"]  # the same at `proposed`
    neighbors: Neighbors
    neighbor_routing: Float[Array, "b m e"]

    @property
    def answers(self) -> Int[Array, "b"]:
        """The answer given."""
        return self.logits.argmax(-1)

    @property
    def base_answers(self) -> Int[Array, "b"]:
        """The answer of the frozen model."""
        return self.base_logits.argmax(-1)

    @property
    def rerouted(self) -> Bool[Array, "b"]:
        """Whose routing was changed."""
        return self.status == REROUTED
