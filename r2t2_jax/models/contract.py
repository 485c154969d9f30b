"""What re-routing asks of a model: pure functions of parameters that go in and never come out."""

import dataclasses
from collections.abc import Callable
from typing import Any

from r2t2_jax.shapes import Embedding, Features, Logits, Readout, Routing

Params = Any
Inputs = Any  # a tree of arrays, each with the batch as its first axis


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenModel:
    """A mixture of experts as functions of (params, inputs); none of them returns parameters or keeps state.

    Attributes:
      forward: (params, inputs, routing [b, e]) -> logits [b, y]. The model's own answer is forward at router's routing.
      router: (params, inputs) -> the routing the model itself chooses.
      embed: (params, inputs) -> unit vectors by which inputs are neighbours, usually of the question alone.
      features: (params, inputs) -> what else the frozen model computes about an input, for a learned re-router.
      readout: (params, inputs) -> Readout with readout(routing) = forward(routing), if there is an exact one.
      groups: sizes of the groups of experts whose weights sum to 1, in the order of the axis e.
      experts: their names.
      answers: what the entries of the axis y mean.
    """

    forward: Callable[[Params, Inputs, Routing], Logits]
    router: Callable[[Params, Inputs], Routing]
    embed: Callable[[Params, Inputs], Embedding]
    features: Callable[[Params, Inputs], Features]
    readout: Callable[[Params, Inputs], Readout] | None
    groups: tuple[int, ...]
    experts: tuple[str, ...]
    answers: tuple[str, ...]
