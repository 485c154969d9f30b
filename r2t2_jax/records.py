"""A decision as data to keep: everything it rests on, a sentence about it for people, and making it again to compare.

Numbers are written so that reading them gives the same bits. JSON lacks inf and NaN; they are the strings "inf", "-inf"
and "nan", so float() reads every number.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import jax
import numpy as np

from r2t2_jax.decision import FAR, FLAT, NOT_FINITE, REROUTED, STATUSES, TURNED_OFF, UNSURE, Decisions
from r2t2_jax.fingerprint import fingerprint

Record = dict[str, Any]
NOT_COMPARED = {"time", "software", "sequence"}  # they tell when and where a decision was made, not what it was


class Hashes(NamedTuple):
    """What a decision is a function of besides its input: three fingerprints and a name."""

    model: str
    references: str
    config: str
    embedder: str


class Replay(NamedTuple):
    """Whether a decision made again is the same bit for bit."""

    same: bool
    differences: tuple[str, ...]  # each names a field and both its values
    software: str | None  # a sentence, if version or device are not those of the record


def hash_inputs(inputs: Any) -> list[str]:
    """Returns a fingerprint of each row of a tree of arrays."""
    inputs = jax.device_get(inputs)
    count = len(jax.tree.leaves(inputs)[0])
    return [fingerprint(jax.tree.map(lambda x, row=row: x[row], inputs)) for row in range(count)]


def records(
    decisions: Decisions,
    *,
    input_ids: Sequence[str],
    input_hashes: Sequence[str],
    reference_ids: Sequence[str],
    experts: Sequence[str],
    answers: Sequence[str],
    strategy: str,
    hashes: Hashes,
    config: Any,
) -> list[Record]:
    """Returns a record of each decision of a batch, as data that JSON gives back unchanged.

    Args:
      decisions: about b inputs.
      input_ids, input_hashes: [b].
      reference_ids: [r], of the set whose rows decisions.neighbors.indices are.
      experts, answers: names along the axes e and y.
      strategy: its name.
      hashes: of what the decisions are a function of.
      config: a dataclass or a mapping.

    Raises:
      TypeError: config holds what JSON does not know.
      ValueError: the number of names does not fit the decisions.
    """
    decisions = jax.device_get(decisions)
    expected = (*np.shape(decisions.logits), decisions.routing.shape[-1])
    if (len(input_ids), len(answers), len(experts)) != expected or len(input_hashes) != len(input_ids):
        raise ValueError(
            f"records: decisions about {expected[0]} inputs with {expected[1]} answers and {expected[2]} experts need "
            f"as many names, not {len(input_ids)} (and {len(input_hashes)} hashes), {len(answers)} and {len(experts)}."
        )
    shared = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "software": {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
        "hashes": hashes._asdict(),
        "strategy": strategy,
        "config": _plain(config),
        "experts": [str(name) for name in experts],
        "answers": [str(name) for name in answers],
    }
    names = np.array(shared["answers"], dtype=object)
    rows = _table(
        input=_table(id=[str(x) for x in input_ids], hash=[str(x) for x in input_hashes]),
        status=[STATUSES[status] for status in decisions.status.tolist()],
        answer=_table(before=names[decisions.base_answers].tolist(), after=names[decisions.answers].tolist()),
        routing=_table(
            before=_numbers(decisions.base_routing),
            after=_numbers(decisions.routing),
            proposed=_numbers(decisions.proposed),
        ),
        logits=_table(before=_numbers(decisions.base_logits), after=_numbers(decisions.logits)),
        loss=_table(before=_numbers(decisions.loss_before), after=_numbers(decisions.loss_after)),
        neighbors=_neighbors(decisions, reference_ids),
    )
    return [shared | row for row in rows]


def sentence(record: Record) -> str:
    """Returns what was decided and why, for people."""
    if "answer" not in record:
        return "The content of this record was deleted."
    before, after = record["answer"]["before"], record["answer"]["after"]
    beyond = f"{_neighborhood(record)}, loss {_loss(record)}"
    if record["status"] == STATUSES[REROUTED]:
        outcome = (
            f"Changed the answer from {before!r} to {after!r}" if before != after else f"Kept the answer {after!r}"
        )
        if record["strategy"] == "amortised":
            beyond = f"by a network that learned from all references; over its {beyond}"
        return f"{outcome} after re-routing by {record['strategy']}: {_moves(record)} ({beyond})."
    reason = {
        STATUSES[FAR]: f"Abstained because the neighbours are too far ({_neighborhood(record)})",
        STATUSES[FLAT]: f"Abstained because there is too little to gain ({beyond})",
        STATUSES[UNSURE]: f"Abstained because another answer would lead by too little ({beyond})",
        STATUSES[NOT_FINITE]: f"Fell back because re-routing gave a number that is not finite ({beyond})",
        STATUSES[TURNED_OFF]: "Re-routing was turned off",
    }[record["status"]]
    return f"{reason}: the answer {after!r} is the frozen model's own."


def replay(record: Record, run: Callable[[Any], Record], inputs: Any) -> Replay:
    """Makes a decision again and compares it with its record bit for bit.

    Args:
      record: from `records`, or read from a ledger.
      run: makes a record of the decision about these inputs, in the way the first one was made.
      inputs: those of the record.

    Raises:
      ValueError: the record's contents were deleted, or its input, model, references, config or embedder are not those
        of `run`, so that there is nothing to compare.
    """
    if "input" not in record:
        raise ValueError(f"replay: the contents of record {record.get('sequence')} were deleted; choose another.")
    again = run(inputs)
    pairs = {name: (record["hashes"][name], again["hashes"][name]) for name in Hashes._fields}
    pairs["input"] = (record["input"]["hash"], again["input"]["hash"])
    if others := [f"{name} ({then[:12]} then, {now[:12]} now)" for name, (then, now) in pairs.items() if then != now]:
        raise ValueError(f"replay: {', '.join(others)} changed; replay with what the record was made with.")
    differences = tuple(
        difference
        for key in sorted((record.keys() | again.keys()) - NOT_COMPARED)
        for difference in _differences(key, record.get(key, "absent"), again.get(key, "absent"))
    )
    then, now = (" on ".join(x["software"].values()) for x in (record, again))
    software = f"Recorded with jax {then}, replayed with jax {now}." if then != now else None
    return Replay(not differences, differences, software)


def _table(**columns: Sequence[Any]) -> list[Record]:
    """Returns a row for each place of the columns."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _neighbors(decisions: Decisions, reference_ids: Sequence[str]) -> list[list[Record]]:
    """Returns for each input those neighbours that there are."""
    columns = _table(
        id=[[str(reference_ids[i]) for i in row] for row in decisions.neighbors.indices.tolist()],
        similarity=_numbers(decisions.neighbors.similarity),
        weight=_numbers(decisions.neighbors.weights),
        routing=_numbers(decisions.neighbor_routing),
    )
    found = np.isfinite(decisions.neighbors.distance).tolist()
    return [
        [row for row, real in zip(_table(**rows), reals, strict=True) if real]
        for rows, reals in zip(columns, found, strict=True)
    ]


def _numbers(values: Any) -> Any:
    """Returns floats, or lists of them, that JSON keeps exactly: every float32 is a float64."""
    exact = np.asarray(values, np.float64)
    if np.isfinite(exact).all():
        return exact.tolist()
    return np.where(np.isfinite(exact), exact.astype(object), exact.astype(str).astype(object)).tolist()


def _plain(value: Any) -> Any:
    """Returns a config as data that JSON gives back unchanged."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return _numbers(value)
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"records: config holds {value!r}; use dataclasses, mappings, lists, strings and numbers.")


def _neighborhood(record: Record) -> str:
    neighbors = record["neighbors"]
    if not neighbors:
        return "no neighbour"
    similarity = math.fsum(float(x["similarity"]) for x in neighbors) / len(neighbors)
    return f"{len(neighbors)} neighbour{'s' * (len(neighbors) > 1)} of mean similarity {similarity:.2f}"


def _loss(record: Record) -> str:
    return " -> ".join(f"{float(record['loss'][when]):.3g}" for when in ("before", "after"))


def _moves(record: Record) -> str:
    """Names the experts whose weight grew and fell most."""
    before, after = (np.array([float(x) for x in record["routing"][when]]) for when in ("before", "after"))
    most, least = int((after - before).argmax()), int((after - before).argmin())
    return " and ".join(
        f"{verb} weight on {record['experts'][i]!r} ({before[i]:.2f} -> {after[i]:.2f})"
        for verb, i in (("more", most), ("less", least))
    )


def _differences(path: str, then: Any, now: Any) -> Iterator[str]:
    """Yields what differs in value or type; -0.0 is not 0.0."""
    if isinstance(then, dict) and isinstance(now, dict) and then.keys() == now.keys():
        for key in then:
            yield from _differences(f"{path}.{key}", then[key], now[key])
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for place, pair in enumerate(zip(then, now, strict=True)):
            yield from _differences(f"{path}[{place}]", *pair)
    elif json.dumps(then) != json.dumps(now):
        yield f"{path}: {json.dumps(then)} then, {json.dumps(now)} now"
