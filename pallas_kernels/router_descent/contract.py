"""What goes in, how it is checked, and what a step does.

Axis letters: `b` batch, `e` experts, `m` neighbours, `y` answers, `s` steps; inside a tile `l` lanes, a piece of the
batch in the last axis.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

OPTIMIZERS = ("sgd", "adam", "exponentiated")


class Inputs(NamedTuple):
    """The arrays of `router_descent`, in its order."""

    log_routing: Float[Array, "b e"]
    readout: Float[Array, "b m e y"]
    offset: Float[Array, "b m y"]
    labels: Int[Array, "b m"]
    weights: Float[Array, "b m"]
    learning_rates: Float[Array, "s"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What a step does; part of the compiled program.

    Attributes:
      groups: sizes of the groups of experts that share a softmax, in the order of the axis e.
      optimizer: one of OPTIMIZERS.
      prox: strength of the proximal term, >= 0.
    """

    groups: tuple[int, ...]
    optimizer: str
    prox: float

    def __post_init__(self):
        sizes = self.groups if isinstance(self.groups, tuple) else ()
        if not sizes or not all(isinstance(size, int | np.integer) and size > 0 for size in sizes):
            raise ValueError(
                f"router_descent: groups={self.groups} must be a tuple of positive sizes; (3, 3) is twice three."
            )
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"router_descent: optimizer={self.optimizer!r} is unknown; use one of {OPTIMIZERS}.")
        if not 0 <= self.prox < float("inf"):
            raise ValueError(f"router_descent: prox={self.prox} is not a strength; use 0 or a positive number.")


def compute_dtype(inputs: Inputs) -> jnp.dtype:
    """Returns the type of everything in between and of the results: float32, or float64 if an input is float64."""
    return jnp.result_type(jnp.float32, *(x for x in inputs if x is not inputs.labels))


def make_rule(groups: tuple[int, ...] | None, optimizer: str, prox: float, num_experts: int) -> Rule:
    """Returns the rule, with one group of all experts where None are named.

    Raises:
      ValueError: a choice is not one, or the groups do not add up to the experts.
    """
    rule = Rule(groups=(num_experts,) if groups is None else groups, optimizer=optimizer, prox=prox)
    if sum(rule.groups) != num_experts:
        raise ValueError(
            f"router_descent: groups={rule.groups} add up to {sum(rule.groups)}; the axis e has {num_experts} experts."
        )
    return rule


def check_inputs(inputs: Inputs) -> None:
    """Raises one sentence that names the offending argument; values are looked at where they are known.

    Raises:
      TypeError: an argument is not an array, or not of the right kind of number.
      ValueError: a rank or an axis does not fit, a weight is negative or not finite, a label is not an answer.
    """
    _check_kinds(inputs)
    _check_shapes(inputs)
    _check_values(inputs)


def _check_kinds(inputs: Inputs) -> None:
    for name, array in inputs._asdict().items():
        kind, words = (jnp.integer, "integers") if name == "labels" else (jnp.floating, "a floating-point array")
        if not hasattr(array, "dtype"):
            raise TypeError(f"router_descent: {name} is a {type(array).__name__}; pass an array.")
        if not jnp.issubdtype(array.dtype, kind):
            raise TypeError(f"router_descent: {name} has dtype {array.dtype}; pass {words}.")


def _check_shapes(inputs: Inputs) -> None:
    shape = inputs.readout.shape
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"router_descent: readout has shape {shape}; it must be [b, m, e, y] with no empty axis.")
    b, m, e, y = shape
    expected = {"log_routing": (b, e), "offset": (b, m, y), "labels": (b, m), "weights": (b, m)}
    for name, wanted in expected.items():
        found = getattr(inputs, name).shape
        if found != wanted:
            raise ValueError(
                f"router_descent: {name} has shape {found}; with readout of shape {shape} it must be {wanted}."
            )
    if inputs.learning_rates.ndim != 1:
        raise ValueError(
            f"router_descent: learning_rates has shape {inputs.learning_rates.shape}; it must be [s], one per step."
        )


def _check_values(inputs: Inputs) -> None:
    """Looks at weights and labels unless they are traced; what a neighbour of weight 0 holds is nobody's business."""
    if isinstance(inputs.weights, Tracer):
        return
    weights = np.asarray(inputs.weights, np.float64)
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError("router_descent: weights has negative or non-finite entries; 0 leaves a neighbour out.")
    if isinstance(inputs.labels, Tracer):
        return
    labels, answers = np.asarray(inputs.labels), inputs.readout.shape[-1]
    wrong = ((labels < 0) | (labels >= answers)) & (weights > 0)
    if wrong.any():
        raise ValueError(
            f"router_descent: labels has {labels[wrong][0]}; with {answers} answers it must be 0 to {answers - 1}."
        )


def prepare(inputs: Inputs) -> Inputs:
    """Replaces what neighbours of weight 0 hold by zeros, in value and gradient, and casts.

    A bfloat16 read-out stays as it is, because it is by far the largest array and its entries are used one by one.
    """
    present = inputs.weights != 0  # a NaN of unknown value is present, so that it shows
    dtype = compute_dtype(inputs)
    keeps_readout = inputs.readout.dtype == jnp.bfloat16 and dtype == jnp.float32
    readout = jnp.where(present[..., None, None], inputs.readout, 0)
    return Inputs(
        log_routing=inputs.log_routing.astype(dtype),
        readout=readout if keeps_readout else readout.astype(dtype),
        offset=jnp.where(present[..., None], inputs.offset, 0).astype(dtype),
        labels=jnp.where(present, inputs.labels, 0).astype(jnp.int32),
        weights=jnp.where(present, inputs.weights, 0).astype(dtype),
        learning_rates=inputs.learning_rates.astype(dtype),
    )
