"""The amortised re-router starts as the router, learns what references teach, and is the same bits every time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r2t2_jax.amortised import AmortisedConfig, fit, propose, untrained
from tests import tolerances
from tests.r2t2_jax.made_up_model import GROUPS, references
from tests.tolerances import assert_near

CONFIG = AmortisedConfig(hidden=16, epochs=60, batch_size=50)
LEARNED, HELD_OUT = references(), references(300, seed=7)
_propose = jax.jit(propose, static_argnums=3)


def log_routing(made):
    return np.log(np.maximum(made.routing, 1e-6))


@functools.cache
def fitted(config=CONFIG):
    return fit(LEARNED.features, log_routing(LEARNED), LEARNED.readout, LEARNED.labels, GROUPS, config)


def proposed(network, made=HELD_OUT):
    return np.asarray(_propose(network, jnp.asarray(made.features), log_routing(made), GROUPS))


def loss(routing, made=HELD_OUT):
    logits = made.readout(routing)
    return float(optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), made.labels).mean())


def test_an_untrained_network_proposes_the_routers_routing():
    routing = proposed(untrained(LEARNED.features, 5))
    assert_near(routing, HELD_OUT.routing, tolerances.LAW["float32"], "routing")


def test_learning_lowers_the_loss_of_examples_never_seen():
    assert loss(proposed(fitted())) < 0.8 * loss(HELD_OUT.routing)


def test_what_is_learned_depends_on_the_features():
    blind = dataclasses.replace(HELD_OUT, features=np.zeros_like(HELD_OUT.features))
    assert loss(proposed(fitted())) < loss(proposed(fitted(), blind), HELD_OUT) - 0.05


def test_proposals_stay_on_the_simplex_of_each_group():
    routing = proposed(fitted())
    assert (routing >= 0).all()
    for part in np.split(routing, [GROUPS[0]], axis=1):
        np.testing.assert_allclose(part.sum(1), 1, rtol=tolerances.LAW["float32"])


def test_the_same_references_give_the_same_bits_and_another_seed_others():
    again = fit(LEARNED.features, log_routing(LEARNED), LEARNED.readout, LEARNED.labels, GROUPS, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, again, fitted())
    other = fitted(dataclasses.replace(CONFIG, seed=1))
    assert (np.asarray(other.inner) != fitted().inner).all()


def test_the_scale_of_the_inputs_is_not_learned():
    start = untrained(LEARNED.features, 5, CONFIG)
    np.testing.assert_array_equal(fitted().center, start.center)
    np.testing.assert_array_equal(fitted().scale, start.scale)
    assert (np.asarray(fitted().outer) != 0).any() and (np.asarray(fitted().inner) != start.inner).any()


def test_a_strong_pull_keeps_the_routing_near_the_routers():
    held = proposed(fitted(dataclasses.replace(CONFIG, prox=100.0)))
    free = np.abs(proposed(fitted()) - HELD_OUT.routing).mean()
    assert np.abs(held - HELD_OUT.routing).mean() < 0.2 * free


def test_columns_that_never_change_are_not_divided_by_nothing():
    network = untrained(np.ones((5, 3), np.float32), 5)
    np.testing.assert_array_equal(network.scale, np.ones(3))


def test_no_features_are_enough_for_a_routing():
    network = untrained(np.zeros((5, 0), np.float32), 5, CONFIG)
    routing = propose(network, jnp.zeros((2, 0)), jnp.log(jnp.full((2, 5), 0.2)), (5,))
    np.testing.assert_allclose(routing, 0.2, rtol=tolerances.LAW["float32"])


def test_no_references_are_refused():
    none = jax.tree.map(lambda x: x[:0], LEARNED.readout)
    with pytest.raises(ValueError, match="the reference set is empty"):
        fit(LEARNED.features[:0], log_routing(LEARNED)[:0], none, LEARNED.labels[:0], GROUPS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": 0}, "hidden=0 must be at least 1"),
        ({"epochs": 0}, "epochs=0 must"),
        ({"batch_size": 0}, "batch_size=0 must"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"learning_rate": np.nan}, "learning_rate=nan must be finite"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must"),
        ({"prox": np.inf}, "prox=inf must"),
    ],
)
def test_a_bad_config_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        AmortisedConfig(**fields)
