"""Records hold every number exactly, say in a sentence what happened, and are compared bit for bit when made again."""

import copy
import json

import jax.numpy as jnp
import numpy as np
import pytest

from r2t2_jax.decision import FAR, FLAT, NOT_FINITE, REROUTED, STATUSES, TURNED_OFF, UNSURE, Neighbors
from r2t2_jax.records import Hashes, hash_inputs, replay, sentence
from tests.r2t2_jax.made_up import EXPERTS, HASHES, decisions, recorded


def test_json_gives_every_number_back_bit_for_bit():
    tricky = np.array([[0.1, -0.0, 1e-45, 3.4e38]], np.float32)
    made = decisions(1, logits=tricky)
    again = json.loads(json.dumps(recorded(made), allow_nan=False))[0]
    assert np.array(again["logits"]["after"], np.float32).tobytes() == tricky.tobytes()
    for name, expected in {"before": made.base_routing, "after": made.routing, "proposed": made.proposed}.items():
        assert np.array(again["routing"][name], np.float32).tobytes() == expected.tobytes()
    np.testing.assert_array_equal([n["weight"] for n in again["neighbors"]], made.neighbors.weights[0])
    np.testing.assert_array_equal([n["routing"] for n in again["neighbors"]], made.neighbor_routing[0])
    assert recorded(made)[0] | {"time": ""} == again | {"time": ""}


def test_what_is_not_finite_is_written_so_that_float_reads_it():
    made = decisions(
        2, loss_before=np.array([np.inf, 1], np.float32), loss_after=np.array([np.nan, -np.inf], np.float32)
    )
    first, second = json.loads(json.dumps(recorded(made), allow_nan=False))
    assert first["loss"] == {"before": "inf", "after": "nan"} and second["loss"] == {"before": 1.0, "after": "-inf"}
    assert first["config"] == {"radius": "inf", "steps": [1, 2], "name": None}


def test_numbers_of_the_device_and_of_bfloat16_are_recorded_too():
    made = decisions(1, logits=jnp.asarray([[0.1, 0.2, 0.3, 0.4]], jnp.bfloat16), status=jnp.array([REROUTED]))
    assert recorded(made)[0]["logits"]["after"] == [0.10009765625, 0.2001953125, 0.30078125, 0.400390625]


def test_answers_are_named_before_and_after():
    made = decisions(1, base_logits=np.float32([[0, 1, 0, 0]]), logits=np.float32([[0, 0, 0, 1]]))
    assert recorded(made)[0]["answer"] == {"before": "two", "after": "four"}


def test_neighbours_that_are_not_there_are_left_out():
    neighbors = Neighbors(np.array([[4, 0, 0]]), np.float32([[0.5, np.inf, np.nan]]), np.float32([[1, 0, 0]]))
    (neighbor,) = recorded(decisions(1, neighbors=neighbors))[0]["neighbors"]
    assert (neighbor["id"], neighbor["similarity"], neighbor["weight"]) == ("r4", 0.875, 1.0)


@pytest.mark.parametrize(
    "change", [{"input_ids": ["x"]}, {"experts": EXPERTS[1:]}, {"input_hashes": []}, {"answers": "a"}]
)
def test_as_many_names_are_needed_as_there_are_decisions(change):
    with pytest.raises(ValueError, match="decisions about 6 inputs with 4 answers and 5 experts need as many names"):
        recorded(**change)


def test_a_config_that_json_does_not_know_is_refused():
    with pytest.raises(TypeError, match=r"config holds \{1\}; use dataclasses"):
        recorded(config={"steps": {1}})


def test_inputs_are_hashed_row_by_row():
    inputs = {"image": np.arange(6.0).reshape(3, 2), "text": np.array([1, 1, 2], np.int32)}
    hashes = hash_inputs(inputs)
    assert len(set(hashes)) == 3
    on_device = {"image": inputs["image"][1:], "text": jnp.asarray(inputs["text"][1:])}
    assert hash_inputs(on_device) == hashes[1:]


SENTENCES = {
    REROUTED: "Changed the answer from 'one' to 'two' after re-routing by kernel regression: more weight on 'far' "
    "(0.25 -> 0.75) and less weight on 'near' (0.75 -> 0.25) (3 neighbours of mean similarity 0.88, loss 1.5 -> 0.25).",
    FAR: "Abstained because the neighbours are too far (3 neighbours of mean similarity 0.88): the answer 'one' is the "
    "frozen model's own.",
    FLAT: "Abstained because there is too little to gain (3 neighbours of mean similarity 0.88, loss 1.5 -> 0.25): the "
    "answer 'one' is the frozen model's own.",
    UNSURE: "Abstained because another answer would lead by too little (3 neighbours of mean similarity 0.88, loss "
    "1.5 -> 0.25): the answer 'one' is the frozen model's own.",
    NOT_FINITE: "Fell back because re-routing gave a number that is not finite (3 neighbours of mean similarity 0.88, "
    "loss 1.5 -> 0.25): the answer 'one' is the frozen model's own.",
    TURNED_OFF: "Re-routing was turned off: the answer 'one' is the frozen model's own.",
}


@pytest.mark.parametrize("status", STATUSES)
def test_a_sentence_tells_people_what_happened(status):
    before, after = np.float32([[0.75, 0.25, 1, 0, 0]]), np.float32([[0.25, 0.75, 1, 0, 0]])
    logits, moved = np.float32([[2, 1, 0, 0]]), status == REROUTED
    made = decisions(
        1,
        status=np.array([status]),
        base_routing=before,
        routing=after if moved else before,
        base_logits=logits,
        logits=np.float32([[1, 2, 0, 0]]) if moved else logits,
        loss_before=np.float32([1.5]),
        loss_after=np.float32([0.25]),
        neighbors=Neighbors(np.array([[0, 1, 2]]), np.full((1, 3), 0.5, np.float32), np.full((1, 3), 1 / 3)),
    )
    (record,) = recorded(made)
    assert sentence(record) == SENTENCES[status]
    assert sentence(json.loads(json.dumps(record))) == SENTENCES[status]


def test_a_sentence_counts_neighbours_and_says_when_the_answer_stayed():
    none = Neighbors(np.zeros((1, 3), int), np.full((1, 3), np.inf), np.zeros((1, 3)))
    assert "(no neighbour)" in sentence(recorded(decisions(1, status=np.array([FAR]), neighbors=none))[0])
    one = none._replace(distance=np.array([[0.5, np.inf, np.inf]]))
    same = np.float32([[0, 0, 1, 0]])
    text = sentence(recorded(decisions(1, neighbors=one, logits=same, base_logits=same))[0])
    assert text.startswith("Kept the answer 'three' after re-routing") and "1 neighbour of mean similarity 0.88" in text
    assert sentence({"redacted": "2026-01-01", "sequence": 3}) == "The content of this record was deleted."


def test_a_decision_made_again_is_the_same():
    (record,) = recorded(decisions(1))
    read = json.loads(json.dumps(record)) | {"sequence": 7, "time": "long ago"}
    again = replay(read, lambda inputs: recorded(decisions(1))[0], None)
    assert again.same and not again.differences and again.software is None


def moved(array, by=1):
    """The first entry, one unit of rounding away."""
    array = array.copy()
    array.flat[0] = np.nextafter(array.flat[0], np.float32(by))
    return array


@pytest.mark.parametrize(
    ("field", "path"),
    [
        ("routing", "routing.after[0]"),
        ("base_routing", "routing.before[0]"),
        ("proposed", "routing.proposed[0]"),
        ("logits", "logits.after[0]"),
        ("base_logits", "logits.before[0]"),
        ("loss_before", "loss.before"),
        ("loss_after", "loss.after"),
        ("neighbor_routing", "neighbors[0].routing[0]"),
    ],
)
def test_one_bit_of_difference_is_found_and_named(field, path):
    made = decisions(1)
    other = made._replace(**{field: moved(getattr(made, field))})
    again = replay(recorded(made)[0], lambda inputs: recorded(other)[0], None)
    then, now = (float(getattr(x, field).flat[0]) for x in (made, other))
    assert not again.same
    assert again.differences == (f"{path}: {then} then, {now} now",)


def test_zero_and_minus_zero_are_not_the_same_bits():
    zero, minus = (decisions(1, loss_after=np.float32([x])) for x in (0.0, -0.0))
    again = replay(recorded(zero)[0], lambda inputs: recorded(minus)[0], None)
    assert again.differences == ("loss.after: 0.0 then, -0.0 now",)


def test_other_status_neighbours_and_strategy_are_found():
    made = decisions(1)
    fewer = made.neighbors._replace(distance=np.float32([[0.1, 0.2, np.inf]]))
    other = recorded(made._replace(status=np.array([FAR]), neighbors=fewer), strategy="mode finding")[0]
    found = [line.split(":")[0] for line in replay(recorded(made)[0], lambda inputs: other, None).differences]
    assert found == ["neighbors", "status", "strategy"]


@pytest.mark.parametrize("field", Hashes._fields)
def test_a_replay_with_something_else_is_refused_by_name(field):
    other = recorded(decisions(1), hashes=HASHES._replace(**{field: "other"}))[0]
    with pytest.raises(ValueError, match=rf"replay: {field} \(.* then, other now\) changed"):
        replay(recorded(decisions(1))[0], lambda inputs: other, None)


def test_a_replay_of_another_input_is_refused():
    other = recorded(decisions(1), input_hashes=["f" * 64])[0]
    with pytest.raises(ValueError, match=r"replay: input \(000000000000 then, ffffffffffff now\) changed"):
        replay(recorded(decisions(1))[0], lambda inputs: other, None)


def test_a_replay_of_deleted_content_is_refused():
    with pytest.raises(ValueError, match="the contents of record 3 were deleted"):
        replay({"redacted": "2026-01-01", "sequence": 3}, lambda inputs: None, None)


def test_a_replay_with_other_software_says_so_and_compares():
    (record,) = recorded(decisions(1))
    old = copy.deepcopy(record) | {"software": {"jax": "0.1", "device": "abacus"}}
    again = replay(old, lambda inputs: record, None)
    assert again.same
    assert again.software.startswith("Recorded with jax 0.1 on abacus, replayed with jax ")
