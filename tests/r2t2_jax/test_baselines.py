"""The yardsticks of re-routing do what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2t2_jax import baselines
from r2t2_jax.decision import Neighbors
from tests.r2t2_jax.made_up import GROUPS, reference_set, simplex
from tests.tolerances import FITTED_ROUTING, assert_near


@pytest.fixture(scope="module")
def references():
    return reference_set(60)


def mean_loss(references, routing):
    logits = references.readout(np.broadcast_to(routing, references.routing.shape))
    right = np.take_along_axis(logits, references.labels[:, None], axis=1)[:, 0]
    return float((np.log(np.exp(logits).sum(-1)) - right).mean())


def test_uniform_gives_every_expert_of_a_group_the_same():
    routing = baselines.uniform(GROUPS, 3)
    np.testing.assert_array_equal(routing, np.float32([[1 / 2] * 2 + [1 / 3] * 3] * 3))


def test_no_drawn_routing_fits_the_references_better_than_the_best_single_one(references):
    best = mean_loss(references, baselines.best_global(references))
    drawn = simplex(np.random.default_rng(1), 500)
    assert best < min(mean_loss(references, routing) for routing in drawn)


def test_each_group_gets_the_best_routing_of_its_own_references(references):
    group = np.arange(60) % 2
    fitted = baselines.best_per_group(references, group)
    for g in range(2):
        alone = baselines.best_global(references.select(group == g))
        assert_near(fitted[g], alone, FITTED_ROUTING)


def test_the_best_shift_lowers_the_loss_and_changes_every_routing_alike(references):
    shift = baselines.best_shift(references)
    shifted = baselines.on_simplex(jnp.log(references.routing) + shift, GROUPS)
    before = [mean_loss(references.select([i]), references.routing[i]) for i in range(60)]
    after = [mean_loss(references.select([i]), np.asarray(shifted[i])) for i in range(60)]
    assert np.mean(after) < np.mean(before)
    ratio = np.log(np.asarray(shifted) / references.routing)
    within = ratio[:, :2] - ratio[:, :1], ratio[:, 2:] - ratio[:, 2:3]
    assert max(x.std(0).max() for x in within) < 1e-5


def test_the_vote_counts_weights_not_heads():
    neighbors = Neighbors(np.array([[0, 1, 2]]), np.zeros((1, 3)), np.array([[0.3, 0.3, 0.4]]))
    assert baselines.vote(neighbors, np.array([2, 2, 1]), 4) == [2]
    assert baselines.vote(neighbors._replace(weights=np.array([[0.2, 0.2, 0.6]])), np.array([2, 2, 1]), 4) == [1]


def test_random_neighbors_come_from_all_references_with_weights_that_sum_to_one():
    drawn = baselines.random_neighbors(200, 7, 5, seed=0)
    assert set(drawn.indices.ravel()) == set(range(7))
    np.testing.assert_allclose(drawn.weights.sum(1), 1, rtol=1e-6)


def test_sharpening_lowers_the_entropy_of_the_answer(references):
    def entropy(routing):
        p = jax.nn.softmax(references.readout(routing))
        return float(-(p * jnp.log(p)).sum(-1).mean())

    sharpened = baselines.sharpen(references.routing, jax.tree.map(jnp.asarray, references.readout), GROUPS)
    assert entropy(sharpened) < entropy(references.routing)
    np.testing.assert_allclose(np.asarray(sharpened).sum(1), 2, rtol=1e-5)
