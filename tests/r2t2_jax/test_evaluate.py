"""Gain and harm, how sure they are, and what any routing could have reached."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from r2t2_jax.evaluate import Paired, interval, mcnemar, pool, reachable, recovered, simplex_grid, wrong_labels
from r2t2_jax.shapes import Readout


def paired(fixed, broken, right=0, wrong=0):
    """So many inputs of each kind."""
    before = [False] * fixed + [True] * broken + [True] * right + [False] * wrong
    after = [True] * fixed + [False] * broken + [True] * right + [False] * wrong
    return Paired(np.array(before, bool), np.array(after, bool))


def test_gain_is_what_was_fixed_less_what_was_broken():
    result = paired(5, 2, 10, 3)
    assert (result.fixed, result.broken) == (0.25, 0.1)
    assert result.gain == pytest.approx(0.15) == pytest.approx(result.after.mean() - result.before.mean())


def test_several_tests_become_one():
    both = pool([paired(5, 2), paired(0, 1, 7)])
    assert both.before.shape == (15,) and both.gain == pytest.approx((5 - 3) / 15)


@pytest.mark.parametrize(("fixed", "broken"), [(0, 0), (1, 0), (7, 2), (2, 7), (6, 6), (84, 42), (1500, 1400)])
def test_mcnemar_is_the_exact_binomial_test(fixed, broken):
    expected = binomtest(fixed, fixed + broken).pvalue if fixed + broken else 1.0
    assert mcnemar(paired(fixed, broken, right=20)) == pytest.approx(expected, rel=1e-9)


def test_the_interval_covers_as_often_as_it_says():
    rng, truth, hits = np.random.default_rng(0), 0.1 - 0.05, 0
    for seed in range(200):
        change = rng.choice([-1, 0, 1], p=[0.05, 0.85, 0.1], size=400)
        low, high = interval(Paired(change < 0, change > 0), resamples=500, seed=seed)
        hits += low <= truth <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_a_surer_interval_is_wider_and_the_same_every_time():
    result = paired(30, 10, 200)
    assert interval(result) == interval(result)
    narrow, wide = (interval(result, confidence) for confidence in (0.5, 0.99))
    assert wide[0] < narrow[0] < result.gain < narrow[1] < wide[1]


def test_the_recovered_share_is_that_of_the_oracles_gain():
    assert recovered(paired(10, 5, 85), paired(20, 0, 80)) == pytest.approx(0.25)
    assert math.isnan(recovered(paired(10, 5), paired(5, 5)))


def test_wrong_labels_are_never_right_and_of_the_same_kind():
    kinds = [[0, 1, 2, 3], [4, 5], [6, 7, 8]]
    labels = np.random.default_rng(0).integers(9, size=500)
    wrong = wrong_labels(labels, kinds, seed=1)
    kind = np.repeat([0, 1, 2], [4, 2, 3])
    assert (wrong != labels).all() and (kind[wrong] == kind[labels]).all()
    assert len(set(zip(labels.tolist(), wrong.tolist(), strict=True))) == 4 * 3 + 2 + 3 * 2  # all that can be drawn
    np.testing.assert_array_equal(wrong, wrong_labels(labels, kinds, seed=1))
    assert (wrong != wrong_labels(labels, kinds, seed=2)).any()


@pytest.mark.parametrize(("experts", "parts", "count"), [(6, 6, 462), (3, 6, 28), (1, 4, 1), (2, 1, 2)])
def test_the_grid_has_every_routing_of_whole_parts_once(experts, parts, count):
    grid = simplex_grid(experts, parts)
    assert grid.shape == (count, experts) == (math.comb(parts + experts - 1, experts - 1), experts)
    assert len(np.unique(grid, axis=0)) == count and (grid >= 0).all()
    np.testing.assert_allclose(grid.sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize("groups", [(3,), (2, 2)], ids=str)
def test_what_can_be_reached_is_what_brute_force_finds(groups):
    rng, size = np.random.default_rng(0), sum(groups)
    readout = Readout(
        rng.normal(size=(30, size, 5)).astype(np.float32), 0.5 * rng.normal(size=(30, 5)).astype(np.float32)
    )
    labels = rng.integers(5, size=30)
    steps = [x for x in itertools.product(range(5), repeat=size)]
    routings = [np.array(x) / 4 for x in steps if all(sum(part) == 4 for part in split(x, groups))]
    expected = [
        any((routing @ weight + offset).argmax() == label for routing in routings)
        for weight, offset, label in zip(*readout, labels, strict=True)
    ]
    np.testing.assert_array_equal(reachable(readout, groups, labels, parts=4), expected)
    assert 3 < sum(expected) < 27


def split(x, groups):
    return [x[end - size : end] for size, end in zip(groups, np.cumsum(groups), strict=True)]
