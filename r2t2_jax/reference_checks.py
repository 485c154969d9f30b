"""What a reference set must be: types and shapes made canonical, then values that cannot be right refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from r2t2_jax.shapes import Readout

if TYPE_CHECKING:
    from r2t2_jax.references import ReferenceSet

LAYOUT = {  # of the arrays: dtype, what it may be given as, axes
    "labels": (np.int32, jnp.integer, "r"),
    "correct": (np.bool_, jnp.bool_, "r"),
    "time": (np.int64, jnp.integer, "r"),
    "routing": (np.float32, jnp.floating, "re"),
    "embedding": (np.float32, jnp.floating, "rp"),
    "features": (np.float32, jnp.floating, "rf"),
    "readout.weight": (np.float32, jnp.floating, "rey"),
    "readout.offset": (np.float32, jnp.floating, "ry"),
    "optimised": (np.float32, jnp.floating, "re"),
}
METADATA = ("model", "embedder", "groups", "experts", "answers")
ROUNDING = 2**-8  # a sum of weights, or a length, whose parts a model in bfloat16 rounded by 2^-9 of themselves


def flat_arrays(references: ReferenceSet) -> dict[str, np.ndarray]:
    """Returns the arrays of LAYOUT by name, without those that are None, as they are."""
    if not isinstance(references.readout, Readout):
        raise TypeError(f"references: readout is a {type(references.readout).__name__}; pass a Readout.")
    arrays = {name: getattr(references, name) for name in LAYOUT if not name.startswith("readout.")}
    arrays |= {f"readout.{name}": values for name, values in references.readout._asdict().items()}
    return {name: values for name, values in arrays.items() if values is not None}


def canonical(references: ReferenceSet) -> dict[str, Any]:
    """Returns the fields that are arrays or tuples as read-only copies of the right type.

    Raises:
      TypeError: something cannot be that type.
      ValueError: an integer is too large.
    """
    fields: dict[str, Any] = {name: names(name, getattr(references, name)) for name in ("ids", "sources")}
    arrays = {name: array(name, values) for name, values in flat_arrays(references).items()}
    fields["readout"] = Readout(arrays.pop("readout.weight"), arrays.pop("readout.offset"))
    fields |= arrays
    fields["inputs"] = {name: _stored(name, values) for name, values in references.inputs.items()}
    for leaf in jax.tree.leaves(fields):
        leaf.flags.writeable = False
    names("model, embedder and names of inputs", [references.model, references.embedder, *references.inputs])
    if not all(isinstance(size, int) for size in references.groups):
        raise TypeError(f"references: groups={references.groups!r} must be integers.")
    fields["groups"] = tuple(references.groups)
    return fields | {name: tuple(names(name, getattr(references, name)).tolist()) for name in ("experts", "answers")}


def names(field: str, values: Sequence[str] | np.ndarray) -> np.ndarray:
    """Returns strings as an array no wider than they need.

    Raises:
      TypeError: they are not strings.
    """
    strings = values.tolist() if isinstance(values, np.ndarray) else list(values)
    if isinstance(values, str) or not all(isinstance(x, str) for x in strings):
        raise TypeError(f"references: {field} must be a sequence of strings.")
    return np.array(strings, dtype=str)


def array(field: str, values) -> np.ndarray:
    """Returns a copy of the values in the type that LAYOUT gives the field.

    Raises:
      TypeError: they are of another kind.
      ValueError: an integer is too large.
    """
    dtype, kind, _ = LAYOUT[field]
    given = np.asarray(values)
    if not jnp.issubdtype(given.dtype, kind):
        raise TypeError(f"references: {field} has dtype {given.dtype}; pass an array of {kind.__name__} values.")
    copy = np.array(given, dtype, order="C")
    if kind is jnp.integer and (copy != given).any():
        raise ValueError(f"references: {field} has values that do not fit {np.dtype(dtype)}; use smaller ones.")
    return copy


def _stored(name: str, values) -> np.ndarray:
    copy = np.array(values, order="C")
    if copy.dtype.kind not in "biuf":
        raise TypeError(f"references: inputs[{name!r}] has dtype {copy.dtype}; only numbers can be stored.")
    return copy


def check(references: ReferenceSet) -> None:
    """Raises if shapes do not fit together or a value cannot be right.

    Raises:
      ValueError: the message names the field, the first reference that is wrong, and the remedy.
    """
    check_labelled(references.ids, references.sources, references.labels, references.answers)
    _check_shapes(references)
    for field, values in flat_arrays(references).items():
        if values.dtype == np.float32:
            masked = np.isneginf(values) & (field == "readout.offset")
            _refuse(references.ids, field, ~(np.isfinite(values) | masked), "is not finite; leave such examples out")
    own_offset = references.readout.offset[np.arange(len(references)), references.labels]
    _refuse(references.ids, "readout.offset", np.isneginf(own_offset), "masks the right answer; correct the label")
    length = np.linalg.norm(references.embedding, axis=1)
    _refuse(references.ids, "embedding", abs(length - 1) > ROUNDING, "is not of unit length; divide it by its norm")
    complaint = f"is not non-negative with sum 1 in each group of {references.groups}; normalise it"
    for field in ("routing", "optimised"):
        if getattr(references, field) is not None:
            _refuse(references.ids, field, _off_simplex(getattr(references, field), references.groups), complaint)


def check_labelled(ids: np.ndarray, sources: np.ndarray, labels, answers: Sequence[str]) -> None:
    """Raises if names and labels cannot be those of a reference set; cheap, so that a long build starts with it.

    Raises:
      ValueError: lengths differ, there is nothing, an id occurs twice, or a label is no answer.
    """
    labels = np.asarray(labels)
    if not len(ids):
        raise ValueError("references: there is no reference; keep at least one.")
    for field, values in {"sources": sources, "labels": labels}.items():
        if values.shape != ids.shape:
            raise ValueError(
                f"references: {field} has shape {values.shape}; with {len(ids)} ids it must be {ids.shape}."
            )
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        raise ValueError(f"references: the id {some(unique[counts > 1])} occurs more than once; give each its own.")
    wrong = (labels < 0) | (labels >= len(answers))
    _refuse(ids, "labels", wrong, f"is not an index of the {len(answers)} answers; correct or leave it out")


def check_same_kind(references: ReferenceSet, other: ReferenceSet) -> None:
    """Raises if the two cannot be one set.

    Raises:
      ValueError: the message names the field that differs.
    """
    for field in METADATA:
        a, b = getattr(references, field), getattr(other, field)
        if a != b:
            raise ValueError(f"references: {field} is {shown(a)} here and {shown(b)} there; build both alike.")
    a, b = _row_types(references), _row_types(other)
    for field in sorted(a.keys() | b.keys()):
        here, there = a.get(field, "absent"), b.get(field, "absent")
        if here != there:
            raise ValueError(
                f"references: a row of {field} is {here} here and {there} there; build both alike, or leave out in "
                f"both what one of them lacks."
            )


def stored_arrays(references: ReferenceSet) -> dict[str, np.ndarray]:
    """Returns every array of numbers by a name of its own, inputs included."""
    return flat_arrays(references) | {f"inputs.{name}": x for name, x in references.inputs.items()}


def some(strings: Sequence[str] | np.ndarray, most: int = 5) -> str:
    """Returns the first few of many names, for a message."""
    head = ", ".join(repr(str(x)) for x in strings[:most])
    return head if len(strings) <= most else f"{head} and {len(strings) - most} more"


def shown(value: Any) -> str:
    """Returns a value, cut short, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _row_types(references: ReferenceSet) -> dict[str, str]:
    return {name: f"{x.dtype}{list(x.shape[1:])}" for name, x in stored_arrays(references).items()}


def _check_shapes(references: ReferenceSet) -> None:
    groups, num_experts = references.groups, len(references.experts)
    if not groups or min(groups) < 1 or sum(groups) != num_experts:
        raise ValueError(f"references: groups={groups} must be positive and add up to the {num_experts} experts.")
    sizes = {"r": len(references), "e": num_experts, "y": len(references.answers)}
    for field, values in flat_arrays(references).items():
        axes = LAYOUT[field][2]
        if len(axes) != values.ndim or any(sizes.get(axis, n) != n for axis, n in zip(axes, values.shape, strict=True)):
            expected = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
            raise ValueError(
                f"references: {field} has shape {values.shape}; its axes are [{', '.join(axes)}], here ({expected})."
            )
    for name, stored in references.inputs.items():
        if stored.shape[:1] != (sizes["r"],):
            raise ValueError(f"references: inputs[{name!r}] has shape {stored.shape}; it needs {sizes['r']} rows.")


def _off_simplex(routing: np.ndarray, groups: tuple[int, ...]) -> np.ndarray:
    sums = np.add.reduceat(routing, np.cumsum((0, *groups[:-1])), axis=1)
    return np.logical_or((routing < 0).any(1), (abs(sums - 1) > ROUNDING).any(1))


def _refuse(ids: np.ndarray, field: str, wrong: np.ndarray, complaint: str) -> None:
    """Raises a sentence about the rows that are wrong, if there are any."""
    rows = np.flatnonzero(wrong.reshape(len(wrong), -1).any(1))
    if len(rows):
        raise ValueError(f"references: {field} of {some(ids[rows])} {complaint}.")
