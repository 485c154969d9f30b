"""Farthest points and near-duplicates against the definitions, in arithmetic without rounding."""

import numpy as np
import pytest

from r2t2_jax import coverage
from r2t2_jax.coverage import farthest_first, first_of_each, standardise
from tests import tolerances
from tests.tolerances import assert_near


def by_definition(points, size):
    """Farthest-point selection, one distance to all at a time."""
    points = points.astype(np.float64)
    centre = points.mean(0).astype(np.float32)
    chosen = [int(((points - centre) ** 2).sum(-1).argmin())]
    distance = np.full(len(points), np.inf)
    while len(chosen) < size:
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(-1))
        distance[chosen] = -1
        chosen.append(int(distance.argmax()))
    return chosen


@pytest.mark.parametrize(("values", "dimension"), [(3, 3), (80, 4), (1, 2)])  # many ties, few, nothing but duplicates
@pytest.mark.parametrize("size", [1, 2, 300, 1200])
def test_each_choice_is_the_point_farthest_from_all_before_it(values, dimension, size):
    points = np.random.default_rng(0).integers(0, values, (1200, dimension)).astype(np.float32)
    assert farthest_first(points, size).tolist() == by_definition(points, size)


@pytest.mark.parametrize("values", [3, 80])
def test_the_choice_does_not_depend_on_the_size_of_blocks(values, monkeypatch):
    monkeypatch.setattr(coverage, "BLOCK", 5)
    points = np.random.default_rng(1).integers(0, values, (500, 4)).astype(np.float32)
    assert farthest_first(points, 200).tolist() == by_definition(points, 200)


def test_many_choices_cost_few_passes_over_the_points(monkeypatch):
    passes = []
    certain = coverage._certain_choices
    monkeypatch.setattr(coverage, "_certain_choices", lambda *args: passes.append(1) or certain(*args))
    farthest_first(np.random.default_rng(2).normal(size=(5000, 64)).astype(np.float32), 1000)
    assert len(passes) < 20


def duplicates_by_definition(spaces, labels, similarity):
    kept = []
    for i in range(len(labels)):
        for j in kept:
            alike = all(1 - ((points[i] - points[j]) ** 2).sum() / 2 > similarity for points in spaces)
            if alike and labels[i] == labels[j]:
                break
        else:
            kept.append(i)
    return kept


def test_a_row_is_kept_unless_a_row_kept_before_it_is_its_duplicate(monkeypatch):
    monkeypatch.setattr(coverage, "BLOCK", 16)
    rng = np.random.default_rng(3)
    spaces = [rng.integers(0, 3, (200, 3)).astype(np.float32) / 2 for _ in range(2)]
    labels = rng.integers(0, 2, 200)
    keep = first_of_each(spaces, labels, 0.8)
    assert np.flatnonzero(keep).tolist() == duplicates_by_definition(spaces, labels, 0.8)
    assert 50 < keep.sum() < 200


def test_standardised_features_of_unrelated_rows_lie_as_far_apart_as_unrelated_unit_vectors():
    features = np.random.default_rng(4).normal(size=(400, 6)) * [1, 10, 100, 0.1, 5, 0] + [0, 5, 0, 1, 3, 1e6]
    points = standardise(features.astype(np.float32))
    square = ((points[:, None] - points) ** 2).sum(-1)
    assert abs(square.sum() / (400 * 399) - 2) < 0.01  # 2 * 400 / 399
    assert_near(points[:, :5].std(0), np.full(5, 5**-0.5), tolerances.STANDARDISED)
    assert not points[:, 5].any()  # what never varies tells nothing


@pytest.mark.parametrize("shape", [(5, 0), (1, 3)])
def test_features_that_tell_nothing_are_points_at_zero(shape):
    points = standardise(np.ones(shape, np.float32))
    assert points.shape == shape and not points.any()
