"""The six tasks ask what MAD asks: every sequence is read again, slowly, by rules written down here."""

import dataclasses

import numpy as np
import pytest

from experiments.synthetic import mad
from experiments.synthetic.examples import IGNORED
from experiments.synthetic.mad import Setting, baseline, draw, sweep


@pytest.fixture(scope="module", params=mad.TASKS)
def drawn(request):
    return request.param, *draw(dataclasses.replace(baseline(request.param), num_train=300))


def test_sequences_have_the_size_of_the_setting_and_ids_of_the_vocabulary(drawn):
    task, train, test = drawn
    setting = baseline(task)
    length = setting.length - (task in ("in-context-recall", "noisy-in-context-recall"))  # the last is a target alone
    assert train.inputs.shape == train.targets.shape == (300, length)
    assert test.inputs.shape == test.targets.shape == (1280, length)
    for ids in (*train, *test):
        assert ids.dtype == np.int32 and ids.max() < setting.vocab_size and ids.min() >= IGNORED
    assert (train.inputs >= 0).all() and (test.inputs >= 0).all()


def test_the_same_setting_and_seed_are_the_same_sequences_and_others_are_not(drawn):
    task, train, test = drawn
    setting = dataclasses.replace(baseline(task), num_train=300)
    for again, before in zip(draw(setting), (train, test), strict=True):
        np.testing.assert_array_equal(again.inputs, before.inputs)
        np.testing.assert_array_equal(again.targets, before.targets)
    assert not np.array_equal(draw(setting, seed=1)[1].inputs, test.inputs)
    assert not np.array_equal(train.inputs, test.inputs[:300])


@pytest.mark.parametrize("task", ["in-context-recall", "noisy-in-context-recall"])
def test_recall_asks_for_the_values_of_keys_that_were_shown(task):
    setting = baseline(task)
    first_noise = setting.vocab_size - (mad.NOISE_VOCAB if setting.noise else 0)
    train, test = draw(setting)
    noisy = 0
    for inputs, targets in zip(*test, strict=True):
        tokens = [*inputs, targets[-1]]
        known = {}
        for place in range(0, len(tokens), 2):
            key, value = tokens[place : place + 2]
            if key >= first_noise:
                noisy += 1
                assert value >= first_noise and targets[place] == IGNORED
                continue
            assert key < first_noise // 2 <= value < first_noise
            assert targets[place] == known.get(key, IGNORED)
            assert known.setdefault(key, value) == value
            assert place == 0 or targets[place - 1] == IGNORED  # a key is not asked for
        assert targets[-1] != IGNORED
    assert noisy / (1280 * 64) == pytest.approx(setting.noise, abs=0.01)
    np.testing.assert_array_equal(train.targets[:, :-1], train.inputs[:, 1:])  # all that comes next is learnt


def motifs(tokens: list[int], first_value: int) -> list[tuple[tuple, tuple, int]]:
    """Returns key, value and the place of the value, of all pairs one after another."""
    pairs, place = [], 0
    while place < len(tokens):
        start = place
        while place < len(tokens) and tokens[place] < first_value:
            place += 1
        middle = place
        while place < len(tokens) and tokens[place] >= first_value:
            place += 1
        pairs.append((tuple(tokens[start:middle]), tuple(tokens[middle:place]), middle))
    return pairs


def test_fuzzy_recall_asks_for_values_of_several_ids_at_keys_of_three():
    test = draw(dataclasses.replace(baseline("fuzzy-in-context-recall"), num_train=1))[1]
    sizes = set()
    for inputs, targets in zip(*test, strict=True):
        tokens = [*inputs.tolist(), int(targets[-1])]
        filled = next(i for i, token in enumerate(tokens) if token != 15)
        assert 15 not in tokens[filled:] and (targets[: max(filled - 1, 0)] == IGNORED).all()
        known = {}
        for key, value, place in motifs(tokens[filled:], first_value=7):
            assert len(key) == len(set(key)) == 3 and len(value) == len(set(value)) <= 3
            asked = targets[filled + place - 1 : filled + place - 1 + len(value)]
            expected = value if key in known else (IGNORED,) * len(value)
            np.testing.assert_array_equal(asked, expected)
            assert known.setdefault(key, value) == value
            sizes.add(len(value))
        assert targets[-1] != IGNORED  # the last key was shown before
    assert sizes == {1, 2, 3}


def test_fuzzy_recall_trains_with_keys_of_all_sizes():
    train = draw(dataclasses.replace(baseline("fuzzy-in-context-recall"), num_train=200))[0]
    pairs = [pair for row in train.inputs for pair in motifs([x for x in row.tolist() if x != 15], 7)]
    assert {len(key) for key, _, _ in pairs} == {1, 2, 3}


def test_memorization_has_one_value_for_each_key_in_training_and_test():
    values = {}
    for examples in draw(baseline("memorization")):
        assert (examples.inputs[:, 1::2] == 255).all() and (examples.targets[:, ::2] == IGNORED).all()
        for key, value in zip(examples.inputs[:, ::2].ravel(), examples.targets[:, 1::2].ravel(), strict=True):
            assert values.setdefault(key, value) == value
    assert len(set(values.values())) == len(values) == 127
    assert max(values) < 127 <= min(values.values()) and max(values.values()) < 255


def test_selective_copying_asks_for_what_is_no_blank_in_its_order():
    test = draw(baseline("selective-copying"))[1]
    assert (test.inputs[:, -17] == 15).all() and (test.inputs[:, -16:] == 14).all()
    assert (test.targets[:, :-16] == IGNORED).all()
    copied = np.stack([row[row < 14] for row in test.inputs])
    np.testing.assert_array_equal(test.targets[:, -16:], copied)
    places = np.nonzero(test.inputs[:, :-17] < 14)[1].reshape(-1, 16)
    assert np.mean(places[:, 0]) > 5 and (places[:, -1] == 238).all()  # blanks stand before ids, wherever those are


def test_compression_asks_for_everything():
    test = draw(baseline("compression"))[1]
    np.testing.assert_array_equal(test.inputs, test.targets)
    assert (test.inputs[:, -1] == 15).all() and test.inputs[:, :-1].max() == 14


def test_a_sweep_changes_one_field_at_a_time():
    assert [len(sweep(task)) for task in mad.TASKS] == [11, 14, 11, 6, 13, 11]
    for task in mad.TASKS:
        start, *others = map(dataclasses.asdict, sweep(task))
        assert start == dataclasses.asdict(baseline(task))
        assert all(sum(other[name] != start[name] for name in start) == 1 for other in others)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"task": "recall"}, "task='recall' is unknown; use one of"),
        ({"vocab_size": 1}, "vocab_size=1 of in-context-recall must be at least 2"),
        ({"noise": 0.5, "vocab_size": 17}, "vocab_size=17 of in-context-recall must be at least 18"),
        ({"task": "fuzzy-in-context-recall", "length": 18}, "length=18 of fuzzy-in-context-recall must be at least 19"),
        ({"task": "selective-copying", "num_copied": 64}, "length=128 of selective-copying must be at least 129"),
        ({"noise": 1.0}, r"noise=1.0 must lie in \[0, 1\)"),
        ({"num_train": 0}, "num_train=0 must be at least 1"),
    ],
)
def test_settings_without_sense_end_in_a_sentence(fields, words):
    with pytest.raises(ValueError, match=words):
        Setting(**{"task": "in-context-recall", "vocab_size": 16, "length": 128} | fields)
