"""Every answer stands where its distance says, and nothing else is asked."""

import numpy as np
import pytest

from experiments.synthetic import memory
from experiments.synthetic.examples import IGNORED
from experiments.synthetic.memory import ASK, FILLERS, KEYS, VALUES, draw


@pytest.fixture(params=memory.TASKS)
def asked(request):
    return request.param, draw(request.param, 65, 200, seed=0)


def test_sequences_have_the_length_and_the_ids_that_are_asked_for(asked):
    _, found = asked
    for array in (*found.examples, found.distance):
        assert array.shape == (200, 65) and array.dtype == np.int32
    assert found.examples.inputs.min() >= 0 and found.examples.inputs.max() <= ASK == memory.VOCAB_SIZE - 1


def test_the_answer_stands_at_its_distance_and_comes_next(asked):
    _, found = asked
    inputs, targets = found.examples
    rows, places = np.nonzero(targets != IGNORED)
    np.testing.assert_array_equal(found.distance > 0, targets != IGNORED)
    answers = targets[rows, places]
    np.testing.assert_array_equal(inputs[rows, places - found.distance[rows, places]], answers)
    inside = places + 1 < inputs.shape[1]
    np.testing.assert_array_equal(inputs[rows[inside], places[inside] + 1], answers[inside])


def test_recall_asks_for_every_key_that_was_shown_at_its_last_showing():
    inputs, targets = draw("recall", 64, 100, seed=1).examples
    distance = draw("recall", 64, 100, seed=1).distance
    for row in range(100):
        shown = {}
        for place in range(0, 64, 2):
            key = inputs[row, place]
            assert key < KEYS <= inputs[row, place + 1] < KEYS + VALUES
            assert distance[row, place] == (place - shown[key] if key in shown else 0)
            assert targets[row, place + 1] == IGNORED
            shown[key] = place + 1


def test_needles_are_few_different_and_anywhere():
    found = draw("needles", 200, 400, seed=0)
    body = found.examples.inputs[:, : 200 - 9]
    filler = (body >= KEYS + VALUES) & (body < KEYS + VALUES + FILLERS)
    assert (np.sum(~filler, axis=1) == 8).all()
    keys = np.stack([row[row < KEYS] for row in body])
    assert all(len(set(row)) == 4 for row in keys.tolist())
    assert (np.sum(found.examples.targets != IGNORED, axis=1) == 4).all()
    assert found.distance.max() > 180 and found.distance[found.distance > 0].min() < 20


def test_copying_asks_for_all_ids_in_their_order():
    inputs, targets = draw("copying", 65, 50, seed=0).examples
    np.testing.assert_array_equal(targets[:, 32:-1], inputs[:, :32])
    np.testing.assert_array_equal(inputs[:, 33:], inputs[:, :32])


def test_the_same_seed_is_the_same_draw_and_another_length_or_seed_is_not():
    one, again = draw("needles", 64, 20, seed=3), draw("needles", 64, 20, seed=3)
    np.testing.assert_array_equal(one.examples.inputs, again.examples.inputs)
    assert not np.array_equal(one.examples.inputs, draw("needles", 64, 20, seed=4).examples.inputs)
    with pytest.raises(ValueError, match="length=19 must be at least 20"):
        draw("copying", 19, 1, seed=0)
