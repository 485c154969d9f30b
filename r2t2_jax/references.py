"""What re-routing remembers: examples with known answers, how the frozen model routed them and what it made of them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from r2t2_jax.coverage import farthest_first, first_of_each, standardise
from r2t2_jax.fingerprint import fingerprint
from r2t2_jax.models.contract import FrozenModel
from r2t2_jax.reference_checks import METADATA, canonical, check, check_same_kind, flat_arrays, names, shown, some
from r2t2_jax.shapes import Readout


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ReferenceSet:
    """References, a row of host arrays each. A set owns its arrays, nothing writes to them; operations return new sets.

    Embeddings and read-outs can betray what an example held: protect a set like the examples, even if it stores none.

    Attributes:
      ids: their names; no two are equal.
      sources: what each example was made from (an image, a file, a person); a test must not share one with them.
      labels: the right answers, indices of `answers`.
      correct: whether the frozen model answers rightly by itself.
      time: when each was added, in any unit the user counts in.
      routing: the frozen model's own.
      embedding: unit vectors by which inputs are neighbours.
      features: what else the frozen model computes about an example; f may be 0.
      readout: logits as an affine function of the routing, exact or linearised.
      optimised: the best routing known for each, or None before it was looked for.
      inputs: the examples themselves, by name; empty where none are stored.
      model: fingerprint of the frozen parameters.
      embedder: name of what computed `embedding`.
      groups: sizes of the groups of experts whose weights sum to 1.
      experts: their names.
      answers: what the entries of the axis y mean.

    Raises:
      TypeError: a field is of another type.
      ValueError: a shape or a value cannot be right; the message names the field, the references and the remedy.
    """

    ids: Shaped[np.ndarray, "r"]
    sources: Shaped[np.ndarray, "r"]
    labels: Int[np.ndarray, "r"]
    correct: Bool[np.ndarray, "r"]
    time: Int[np.ndarray, "r"]
    routing: Float[np.ndarray, "r e"]
    embedding: Float[np.ndarray, "r p"]
    features: Float[np.ndarray, "r f"]
    readout: Readout
    optimised: Float[np.ndarray, "r e"] | None = None
    inputs: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    model: str
    embedder: str
    groups: tuple[int, ...]
    experts: tuple[str, ...]
    answers: tuple[str, ...]

    def __post_init__(self):
        for field, value in canonical(self).items():
            object.__setattr__(self, field, value)
        check(self)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        sources = len(set(self.sources.tolist()))
        return f"ReferenceSet({len(self)} references from {sources} sources, {self.correct.mean():.0%} correct)"

    def rows(self) -> dict:
        """Returns the fields that have a row per reference."""
        return {x.name: getattr(self, x.name) for x in dataclasses.fields(self) if x.name not in METADATA}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of whatever can influence an answer or its record: all but `time` and the stored `inputs`."""
        fields = (field.name for field in dataclasses.fields(self))
        return fingerprint({name: getattr(self, name) for name in fields if name not in ("time", "inputs")})

    def check_model(self, model: FrozenModel, params_fingerprint: str) -> None:
        """Raises unless the set was built with this model.

        Raises:
          ValueError: the message names what differs: parameters, groups, experts or answers.
        """
        own = {"model": params_fingerprint, "groups": model.groups, "experts": model.experts, "answers": model.answers}
        for field, value in own.items():
            if getattr(self, field) != value:
                raise ValueError(
                    f"references: {field} is {shown(getattr(self, field))}, but {shown(value)} for the frozen model; "
                    f"this is the reference set of another model, build one with this model."
                )

    def select(self, rows: Bool[np.ndarray, "r"] | Int[np.ndarray, "n"] | Sequence[int]) -> "ReferenceSet":
        """Returns the references that a mask or indices name, in that order.

        Raises:
          ValueError: nothing would be left, a row is named twice, or there is no such row.
        """
        rows = np.asarray(rows, dtype=None if len(rows) else int)
        if rows.dtype == bool and rows.shape == (len(self),):
            rows = np.flatnonzero(rows)
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
            raise ValueError(
                f"references: rows is {rows.dtype}{list(rows.shape)}; pass indices, or a mask of length {len(self)}."
            )
        if ((rows < 0) | (rows >= len(self))).any():
            raise ValueError(f"references: rows go from 0 to {len(self) - 1}, not from {rows.min()} to {rows.max()}.")
        return dataclasses.replace(self, **jax.tree.map(lambda x: x[rows], self.rows()))

    def correct_only(self) -> "ReferenceSet":
        """Returns those that the frozen model answers rightly."""
        return self.select(self.correct)

    def without_inputs(self) -> "ReferenceSet":
        """Returns the set without the examples. Its fingerprint stays, and so does every record that rests on it."""
        return dataclasses.replace(self, inputs={})

    def add(self, other: "ReferenceSet") -> "ReferenceSet":
        """Returns these references, then the others.

        Raises:
          ValueError: they differ in model, embedder, widths or what they store, or share an id.
        """
        check_same_kind(self, other)
        shared = np.intersect1d(self.ids, other.ids)
        if len(shared):
            raise ValueError(f"references: both sets have the id {some(shared)}; remove it from one of them.")
        both = jax.tree.map(lambda a, b: np.concatenate([a, b]), self.rows(), other.rows())
        return dataclasses.replace(self, **both)

    def remove(self, ids: Sequence[str]) -> "ReferenceSet":
        """Returns the set without the references of these ids.

        Raises:
          TypeError: ids are not a sequence of strings; one id alone is none.
          ValueError: an id is unknown, or nothing would be left.
        """
        return self._without("ids", ids)

    def drop_sources(self, sources: Sequence[str]) -> "ReferenceSet":
        """Returns the set without all that was made from these sources.

        Raises:
          TypeError: sources are not a sequence of strings; one source alone is none.
          ValueError: a source is unknown, or nothing would be left.
        """
        return self._without("sources", sources)

    def _without(self, field: str, unwanted: Sequence[str]) -> "ReferenceSet":
        have, gone = getattr(self, field).tolist(), set(names(field, unwanted).tolist())
        if unknown := sorted(gone - set(have)):
            raise ValueError(f"references: {some(unknown)} is not among the {field}; nothing was removed.")
        return self.select(np.array([name not in gone for name in have]))

    def expire(self, before: int) -> "ReferenceSet":
        """Returns what was added at the time `before` or later."""
        return self.select(self.time >= before)

    def deduplicate(self, similarity: float = 0.95) -> "ReferenceSet":
        """Returns the set without near-duplicates; the earliest of them stays.

        Near-duplicates have the same label, and both their embeddings and their standardised features are more similar
        than `similarity`. Embeddings alone would not do: those of a question are the same whatever the image.
        """
        if not 0 < similarity < 1:
            raise ValueError(f"references: similarity={similarity} must lie between 0 and 1.")
        order = np.argsort(self.time, kind="stable")
        spaces = (self.embedding[order], standardise(self.features)[order])
        return self.select(np.sort(order[first_of_each(spaces, self.labels[order], similarity)]))

    def cap_per_source(self, limit: int) -> "ReferenceSet":
        """Returns at most `limit` references of each source, the latest ones, so that no source floods the set."""
        if limit < 1:
            raise ValueError(f"references: limit={limit} must be at least 1.")
        _, source = np.unique(self.sources, return_inverse=True)
        order = np.lexsort((-np.arange(len(self)), -self.time, source))  # by source, within it the latest first
        place = np.arange(len(self)) - np.searchsorted(source[order], source[order])
        return self.select(np.sort(order[place < limit]))

    def cap(self, size: int) -> "ReferenceSet":
        """Returns at most `size` references, chosen to lie near all: farthest points first (Gonzalez 1985).

        Distance is that of embedding and standardised features together. The choice is a function of the set alone.
        """
        if size < 1:
            raise ValueError(f"references: size={size} must be at least 1.")
        if len(self) <= size:
            return self
        points = np.concatenate([self.embedding, standardise(self.features)], axis=1)
        return self.select(np.sort(farthest_first(points, size)))

    def diff(self, other: "ReferenceSet") -> "Diff":
        """Returns what changes on the way from this set to the other; stored inputs do not count."""
        before, after = _contents(self), _contents(other)
        return Diff(
            added=tuple(name for name in after if name not in before),
            removed=tuple(name for name in before if name not in after),
            changed=tuple(name for name in before if name in after and before[name] != after[name]),
        )


class Diff(NamedTuple):
    """Ids of the references that a change of a set concerns, in the order of the set they are in."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join(
            f"{len(ids)} {what} ({some(ids)})" if ids else f"0 {what}" for what, ids in self._asdict().items()
        )


def refresh(
    references: ReferenceSet,
    feedback: ReferenceSet,
    *,
    size: int,
    per_source: int,
    max_age: int,
    now: int,
    similarity: float = 0.95,
) -> tuple[ReferenceSet, Diff]:
    """Takes labelled feedback in, and keeps the set fresh, free of duplicates, balanced and small.

    In this order: feedback joins, replacing references of the same id; what is older than max_age at `now` leaves; so
    do near-duplicates of earlier ones, what a source has beyond its latest per_source, and what coverage can spare.

    Raises:
      ValueError: the sets do not fit together, or nothing would be left.
    """
    check_same_kind(references, feedback)
    known = np.isin(references.ids, feedback.ids)
    joined = feedback if known.all() else references.select(~known).add(feedback)
    fresh = joined.expire(now - max_age).deduplicate(similarity).cap_per_source(per_source).cap(size)
    return fresh, references.diff(fresh)


def credit(
    indices: Int[np.ndarray, "n m"],
    weights: Float[np.ndarray, "n m"],
    gain: Float[np.ndarray, "n"],
    num_references: int,
) -> Float[np.ndarray, "r"]:
    """Returns what each reference has been worth: its share of the gain of every answer that it had a part in.

    Args:
      indices, weights: neighbours of n inputs and their kernel weights, which sum to 1.
      gain: loss before minus loss after re-routing, in nats; negative where it did harm.
      num_references: r; references that nobody had as a neighbour are worth 0.

    Raises:
      ValueError: a gain is not finite, or an index is not one of the references.
    """
    if not np.isfinite(gain).all():
        raise ValueError("credit: gain is not finite everywhere; leave out the inputs whose loss is not.")
    if np.size(indices) and not 0 <= np.min(indices) <= np.max(indices) < num_references:
        raise ValueError(f"credit: indices must lie between 0 and {num_references - 1}.")
    shares = np.asarray(weights, np.float64) * np.asarray(gain, np.float64)[:, None]
    return np.bincount(np.ravel(indices), shares.ravel(), minlength=num_references)


def _contents(references: ReferenceSet) -> dict[str, tuple]:
    """Returns for each id the source and the bytes of each array's row."""
    arrays = [(name, np.ascontiguousarray(array)) for name, array in flat_arrays(references).items()]
    rows = zip(references.ids.tolist(), references.sources.tolist(), strict=True)
    return {name: (source, *((k, x[i].tobytes()) for k, x in arrays)) for i, (name, source) in enumerate(rows)}
