"""Rungs 1 and 2: the reference against float64 truths and closed forms, every implementation against the reference."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from descents import FLOATS, descend, differentiate, random_cotangents, rounded
from tolerances import CONFIDENT, DESCENT, DESCENT_GRADIENT, DESCENT_ORACLE, FINITE_DIFFERENCE, assert_near

from pallas_kernels.router_descent import xla
from pallas_kernels.router_descent.cases import CASES, sample

IMPLEMENTATIONS = ["xla"]
# two tiles of the batch; and the same shapes for all, so that what is compiled once serves all
SAME_SHAPES = dict(batch=xla.LANES + 2, neighbors=4, answers=7, steps=3)
RULES = {
    "sgd": dict(groups=(3, 3), optimizer="sgd", prox=0.0),
    "adam": dict(groups=(6,), optimizer="adam", prox=0.3),
    "exponentiated": dict(groups=(1, 2, 3), optimizer="exponentiated", prox=0.3),
}
KINDS = ("moai", "mova", "ball", "choices", "confident")  # of inputs; the other cases are corners of shape
PAIRS = [  # every rule and every dtype, not every pair of them: compiling is what takes the time
    ("sgd", "bfloat16"),
    ("adam", "float64"),
    ("adam", "float32"),
    ("exponentiated", "float32"),
]


def of_kind(kind: str, rule: str):
    return sample(dataclasses.replace(CASES[kind], **SAME_SHAPES, groups=RULES[rule]["groups"]))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_reference_equals_the_oracle(kind, rule):
    inputs = of_kind(kind, rule)
    found = differentiate(inputs, random_cotangents(inputs), dtype="float64", implementation="reference", **RULES[rule])
    for name, expected in zip(found.values, oracles.router_descent(*inputs, **RULES[rule]), strict=True):
        assert_near(found.values[name], expected, DESCENT_ORACLE, name)


@pytest.mark.parametrize("rule", RULES)
def test_gradient_of_the_reference_is_that_of_finite_differences_of_the_oracle(rule):
    """Along one random direction per argument; weights of 0 and masked answers stay as they are."""
    inputs, rng, width = of_kind("choices", rule), np.random.default_rng(3), 1e-6
    cotangents = random_cotangents(inputs)
    found = differentiate(inputs, cotangents, dtype="float64", implementation="reference", **RULES[rule]).gradients
    for name in FLOATS:
        value = getattr(inputs, name)
        direction = rng.normal(size=value.shape)

        def moved(by, name=name, value=value, direction=direction):
            routing, loss = oracles.router_descent(*inputs._replace(**{name: value + by * direction}), **RULES[rule])
            return np.sum(cotangents.routing * routing) + np.sum(cotangents.loss * loss)

        expected = (moved(width) - moved(-width)) / (2 * width)
        assert_near(np.sum(found[name] * direction), expected, FINITE_DIFFERENCE, f"gradient of {name}")


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_without_steps_the_routing_is_the_softmax_and_the_loss_the_cross_entropy_there(implementation):
    inputs = sample(CASES["no_steps"])
    found = descend(inputs, groups=(3, 3), implementation=implementation)
    routing, loss = oracles.router_descent(*inputs, groups=(3, 3))
    assert_near(found.routing, routing, DESCENT_ORACLE)
    assert_near(found.loss, loss, DESCENT_ORACLE)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_a_single_expert_keeps_all_the_weight(implementation):
    """Its gradient is exactly 0, where the derivative of Adam's root would be infinite."""
    inputs = sample(CASES["one_of_each"])
    choices = dict(groups=(1,), optimizer="adam", prox=0.3, implementation=implementation)
    found = differentiate(inputs, random_cotangents(inputs), **choices)
    np.testing.assert_array_equal(found.values["routing"], 1)
    np.testing.assert_array_equal(found.values["loss"], 0)
    assert not any(gradient.any() for gradient in found.gradients.values())


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_one_step_on_one_neighbor_with_two_answers_is_the_logistic_formula(implementation):
    """z = r a + (1 - r) b on the label against 0: dL/dr = -sigmoid(-z) (a - b), and dr/dtheta = r (1 - r)."""
    inputs = sample(dataclasses.replace(CASES["moai"], batch=1, neighbors=1, groups=(2,), answers=2, steps=1))
    readout, offset = inputs.readout.copy(), 0 * inputs.offset
    readout[..., 1] = 0
    inputs = inputs._replace(readout=readout, offset=offset, labels=0 * inputs.labels)
    found = descend(inputs, implementation=implementation)
    a, b = readout[0, 0, :, 0]
    theta = inputs.log_routing[0, 0] - inputs.log_routing[0, 1]
    r = 1 / (1 + np.exp(-theta))
    slope = -(a - b) / (1 + np.exp(r * a + (1 - r) * b)) * r * (1 - r)
    moved = 1 / (1 + np.exp(-(theta - 2 * inputs.learning_rates[0] * slope)))  # both logits move, oppositely
    assert_near(found.routing[0], [moved, 1 - moved], DESCENT_ORACLE)
    assert_near(found.loss[0], np.log1p(np.exp(-(moved * a + (1 - moved) * b))), DESCENT_ORACLE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rule", "dtype"), PAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_equal_the_reference(kind, rule, dtype, implementation):
    inputs, choices = rounded(of_kind(kind, rule), dtype), RULES[rule]
    cotangents = random_cotangents(inputs)
    expected = differentiate(inputs, cotangents, dtype="float64", implementation="reference", **choices)
    actual = differentiate(inputs, cotangents, dtype=dtype, implementation=implementation, **choices)
    exact = "float64" if dtype == "float64" else "float32"
    is_confident = kind == "confident" and exact == "float32"
    for name, value in expected.values.items():
        assert actual.values[name].dtype == exact
        assert_near(actual.values[name], value, CONFIDENT["value"] if is_confident else DESCENT[exact], name)
    for name, gradient in expected.gradients.items():
        kept = dtype if name == "readout" else exact
        assert actual.gradients[name].dtype == jnp.dtype(kept)
        tolerance = CONFIDENT["gradient"] if is_confident and kept == "float32" else DESCENT_GRADIENT[kept]
        assert_near(actual.gradients[name], gradient, tolerance, f"gradient of {name}")
