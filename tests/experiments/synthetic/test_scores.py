"""Accuracies are counted as MAD counts them, and their intervals hold what they promise."""

import numpy as np
import pytest

from experiments.synthetic.examples import IGNORED
from experiments.synthetic.scores import Score, accuracy, grouped, mean, score, tally


def test_an_accuracy_is_the_mean_over_ids_that_were_due_or_said():
    targets = np.array([[0, 0, 0, 1], [IGNORED, 2, IGNORED, IGNORED]])
    predictions = np.array([[0, 0, 4, 1], [3, 2, 1, 1]])
    # id 0: two of three, ids 1 and 2: all, id 4: said and never due, id 3: said only where nothing is asked
    assert accuracy(tally(predictions, targets, 6)) == pytest.approx((2 / 3 + 1 + 1 + 0) / 4)


def test_sequences_that_count_twice_are_as_good_as_two_of_them():
    rng = np.random.default_rng(0)
    targets, predictions = rng.integers(IGNORED, 5, (2, 8, 6))
    weights = np.array([2, 0, 1, 0, 0, 1, 3, 1])
    repeated = (np.repeat(x, weights, axis=0) for x in (predictions, targets))
    expected = accuracy(tally(*repeated, 5))
    assert accuracy(tally(predictions, targets, 5), weights.astype(np.float32)) == pytest.approx(expected)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    rng, held = np.random.default_rng(0), 0
    for seed in range(200):
        targets = np.zeros((100, 4), int)
        right = rng.random((100, 1)) < rng.choice([0.2, 0.9], (100, 1))  # sequences are all right or all wrong
        found = score(tally(np.where(right, 0, 1) + targets, targets, 1 + 1), seed)
        truth = 0.55 / 2  # of id 0, which was due; id 1 was said and never due
        held += abs(found.mean - truth) <= found.half
    assert 180 <= held <= 199


def test_a_perfect_score_has_no_doubt():
    targets = np.random.default_rng(0).integers(0, 4, (50, 6))
    assert score(tally(targets, targets, 4)) == Score(1.0, 0.0)


def test_means_of_other_tests_are_surer_and_seeds_are_not():
    assert mean([Score(0.5, 0.3), Score(0.7, 0.4)]) == pytest.approx((0.6, 0.25))
    entries = [{"cell": {"mixer": "mesa", "seed": n}, "mean": 0.5 + n / 10, "half": 0.2} for n in range(3)]
    assert grouped(entries, ["mixer"])["mesa",] == pytest.approx((0.6, 0.2))
