"""Rung 3: what must hold between calls of the operator, whatever implements it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from descents import FLOATS, Cotangents, Differentiated, arrays, descend, differentiate, random_cotangents
from tolerances import DESCENT_LAW, assert_near

from pallas_kernels import router_descent
from pallas_kernels.router_descent import xla
from pallas_kernels.router_descent.cases import CASES, sample
from pallas_kernels.router_descent.contract import Inputs

IMPLEMENTATIONS = ["reference", "xla"]
RULE = dict(groups=(3, 3), optimizer="adam", prox=0.3)
PLAIN = dict(groups=(3, 3), optimizer="sgd")
SMALL = dict(batch=5, neighbors=4, answers=7, steps=3, groups=(3, 3))
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def small(name: str = "moai", **changes) -> Inputs:
    return sample(dataclasses.replace(CASES[name], **SMALL | changes))


def pulled(inputs: Inputs, implementation: str, cotangents: Cotangents | None = None):
    cotangents = random_cotangents(inputs) if cotangents is None else cotangents
    return differentiate(inputs, cotangents, dtype="float64", implementation=implementation, **RULE)


def assert_same(found, expected) -> None:
    for name, value in expected.values.items():
        assert_near(found.values[name], value, DESCENT_LAW, name)
    for name, gradient in expected.gradients.items():
        assert_near(found.gradients[name], gradient, DESCENT_LAW, f"gradient of {name}")


ORDERS = {  # axis name: its place in (log_routing, readout, offset, labels, weights, learning_rates)
    "inputs": dict(log_routing=0, readout=0, offset=0, labels=0, weights=0, routing=0, loss=0),
    "neighbors": dict(readout=1, offset=1, labels=1, weights=1),
    "experts": dict(log_routing=1, readout=2, routing=1),
    "answers": dict(readout=3, offset=2),
}


@each_implementation
@pytest.mark.parametrize("axis", ORDERS)
def test_the_order_of_inputs_neighbors_experts_of_a_group_and_answers_is_of_no_consequence(axis, implementation):
    inputs = small("ball")
    order = {
        "inputs": np.array([4, 2, 0, 1, 3]),
        "neighbors": np.array([2, 0, 3, 1]),
        "experts": np.array([2, 0, 1, 3, 5, 4]),
        "answers": np.array([6, 2, 0, 1, 5, 3, 4]),
    }[axis]

    def turned(named: dict) -> dict:
        return {name: x.take(order, ORDERS[axis][name]) if name in ORDERS[axis] else x for name, x in named.items()}

    turned_inputs = Inputs(**turned(inputs._asdict()))
    if axis == "answers":
        turned_inputs = turned_inputs._replace(labels=np.argsort(order).astype(np.int32)[inputs.labels])
    cotangents = random_cotangents(inputs)
    plain = pulled(inputs, implementation, cotangents)
    expected = type(plain)(turned(plain.values), turned(plain.gradients))
    assert_same(pulled(turned_inputs, implementation, Cotangents(**turned(cotangents._asdict()))), expected)


@each_implementation
def test_a_constant_added_to_the_log_routing_of_a_group_changes_nothing(implementation):
    inputs = small()
    shifted = inputs._replace(log_routing=inputs.log_routing + np.array([7.0, 7.0, 7.0, -3.0, -3.0, -3.0]))
    assert_same(pulled(shifted, implementation), pulled(inputs, implementation))


@each_implementation
def test_neighbors_of_weight_zero_hold_nan_and_nothing_of_it_leaks(implementation):
    inputs, absent = small("ball"), np.s_[:, 2]
    inputs.weights[absent] = 0
    clean = pulled(inputs, implementation)
    for poison in (np.nan, np.inf):
        for x in (inputs.readout, inputs.offset):
            x[absent] = poison
        inputs.labels[absent] = -(2**31) if np.isnan(poison) else 2**31 - 1
        found = pulled(inputs, implementation)
        assert_same(found, clean)
        for name in ("readout", "offset", "weights"):
            assert not found.gradients[name][absent].any(), f"an absent neighbour has a gradient in {name}"


@each_implementation
def test_neighbors_of_weight_zero_equal_no_neighbors(implementation):
    inputs = small()
    inputs.weights[:, 3] = 0
    fewer = inputs._replace(
        **{name: getattr(inputs, name)[:, :3] for name in ("readout", "offset", "labels", "weights")}
    )
    found, expected = (descend(x, implementation=implementation, **RULE) for x in (inputs, fewer))
    assert_near(found.routing, expected.routing, DESCENT_LAW)
    assert_near(found.loss, expected.loss, DESCENT_LAW)


def test_an_input_without_neighbors_stays_where_it_started():
    """To the bit: Adam turns a gradient of one rounding error into a whole step."""
    inputs = small()
    inputs.weights[[0, 3]] = 0
    start = np.array(
        descend(inputs._replace(learning_rates=0 * inputs.learning_rates), dtype="float32", **RULE).routing
    )
    found = descend(inputs, dtype="float32", **RULE)
    np.testing.assert_array_equal(found.routing[[0, 3]], start[[0, 3]])
    np.testing.assert_array_equal(found.loss[[0, 3]], 0)
    assert (found.routing[[1, 2, 4]] != start[[1, 2, 4]]).all()


@each_implementation
def test_masked_answers_equal_no_such_answers(implementation):
    inputs = small()
    inputs.offset[..., [5, 6]] = -np.inf
    inputs = inputs._replace(labels=inputs.labels % 5)
    fewer = inputs._replace(readout=inputs.readout[..., :5], offset=inputs.offset[..., :5])
    found, expected = (descend(x, implementation=implementation, **RULE) for x in (inputs, fewer))
    assert_near(found.routing, expected.routing, DESCENT_LAW)
    assert_near(found.loss, expected.loss, DESCENT_LAW)


@pytest.mark.parametrize("masked", ["label", "everything"])
def test_a_masked_label_costs_infinitely_much_and_moves_finitely(masked):
    inputs = small()
    inputs.offset[1, 2, inputs.labels[1, 2] if masked == "label" else slice(None)] = -np.inf
    cotangents = random_cotangents(inputs)._replace(loss=np.zeros(5))
    found, expected = (pulled(inputs, implementation, cotangents) for implementation in ("xla", "reference"))
    assert found.values["loss"][1] == expected.values["loss"][1] == np.inf
    assert_same(without_infinities(found), without_infinities(expected))


def without_infinities(result: Differentiated) -> Differentiated:
    """Where the loss is infinite so is its derivative in the weight, be its cotangent 0 or not."""
    values = result.values | dict(loss=np.delete(result.values["loss"], 1))
    return Differentiated(values, {name: x for name, x in result.gradients.items() if name != "weights"})


@each_implementation
def test_an_expert_that_starts_switched_off_stays_off_and_equals_no_expert(implementation):
    inputs = small("mova")
    found = descend(inputs, implementation=implementation, **RULE)
    assert not found.routing[:, -1].any()
    fewer = inputs._replace(log_routing=inputs.log_routing[:, :-1], readout=inputs.readout[:, :, :-1])
    expected = descend(fewer, implementation=implementation, **RULE | dict(groups=(3, 2)))
    assert_near(found.routing[:, :-1], expected.routing, DESCENT_LAW)
    assert_near(found.loss, expected.loss, DESCENT_LAW)


@each_implementation
def test_steps_in_two_calls_equal_steps_in_one(implementation):
    """Up to a constant per group, the routing's log is all the state plain descent has; a rate of 0 rests."""
    inputs, run = small(), functools.partial(descend, **PLAIN, implementation=implementation)
    first, second, third = inputs.learning_rates
    half = run(inputs._replace(learning_rates=np.array([first, 0, 0])))
    rest = inputs._replace(log_routing=np.log(half.routing), learning_rates=np.array([second, third, 0]))
    for found, expected in zip(run(rest), run(inputs), strict=True):
        assert_near(found, expected, DESCENT_LAW)


@each_implementation
def test_weights_are_used_as_they_are(implementation):
    """Twice the weights are twice the loss; half the learning rates make up for it in the steps."""
    inputs, run = small(), functools.partial(descend, **PLAIN, implementation=implementation)
    once, twice = (
        run(inputs),
        run(inputs._replace(weights=2 * inputs.weights, learning_rates=inputs.learning_rates / 2)),
    )
    assert_near(twice.routing, once.routing, DESCENT_LAW)
    assert_near(twice.loss, 2 * once.loss, DESCENT_LAW)


@each_implementation
@pytest.mark.parametrize("optimizer", ["sgd", "exponentiated"])
def test_a_strong_proximal_term_holds_the_routing_where_it_started(optimizer, implementation):
    inputs = small()._replace(learning_rates=np.full(100, 1e-2))
    run = functools.partial(descend, implementation=implementation, **PLAIN | dict(optimizer=optimizer, prox=100.0))
    start = run(inputs._replace(learning_rates=np.zeros(100))).routing
    assert np.abs(run(inputs).routing - start).max() < 0.05
    free = descend(small(), implementation=implementation, **PLAIN).routing  # as far in rates, and not held
    assert np.abs(free - start).max() > 0.2


@each_implementation
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "exponentiated"])
def test_small_steps_lower_the_loss_of_every_input(optimizer, implementation):
    inputs = small(learning_rate=1e-3)
    choices = PLAIN | dict(optimizer=optimizer, implementation=implementation)
    before = descend(inputs._replace(learning_rates=np.zeros(3)), **choices).loss
    assert (descend(inputs, **choices).loss < before).all()


def test_an_input_gives_the_same_bits_in_any_batch():
    """Of which a replay of one decision lives: other inputs may come, go, or hold NaN."""
    inputs = sample(dataclasses.replace(CASES["moai"], batch=xla.LANES + 6, answers=7, steps=3))
    order = np.random.default_rng(2).permutation(len(inputs.labels))
    whole = by_rows(inputs, np.s_[:])
    for name, chosen in {"turned": order, "one": np.s_[66:67], "a tile": np.s_[: xla.LANES]}.items():
        for found, expected in zip(by_rows(inputs, chosen), whole, strict=True):
            np.testing.assert_array_equal(found, expected[chosen], err_msg=name)
    inputs.readout[::2] = np.nan
    for found, expected in zip(by_rows(inputs, np.s_[:]), whole, strict=True):
        np.testing.assert_array_equal(found[1::2], expected[1::2])


def by_rows(inputs: Inputs, chosen) -> Cotangents:
    rows = {name: x[chosen] for name, x in inputs._asdict().items() if name != "learning_rates"}
    return descend(inputs._replace(**rows), dtype="float32", implementation="xla", **RULE)


def test_only_weighted_sums_of_the_neighbors_count():
    """A neighbour given twice at half its weight is that neighbour."""
    inputs = small()
    twice = {name: np.repeat(getattr(inputs, name), 2, axis=1) for name in ("readout", "offset", "labels", "weights")}
    twice["weights"] = twice["weights"] / 2
    found = descend(inputs._replace(**twice), implementation="xla", **RULE)
    expected = descend(inputs, implementation="xla", **RULE)
    assert_near(found.routing, expected.routing, DESCENT_LAW)
    assert_near(found.loss, expected.loss, DESCENT_LAW)


def test_it_maps_over_a_further_axis_and_splits_over_devices():
    inputs = arrays(small(batch=4), "float32")
    operator = jax.jit(lambda *x: router_descent(*x, **RULE))
    expected = operator(*inputs)
    rows = tuple(jnp.stack([x, x]) for x in inputs[:5])
    mapped = jax.jit(jax.vmap(operator, in_axes=(0, 0, 0, 0, 0, None)))(*rows, inputs.learning_rates)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over, everywhere = jax.P("data"), jax.P()
    split = jax.shard_map(operator, mesh=mesh, in_specs=(*[over] * 5, everywhere), out_specs=over)
    for found, halves, value in zip(mapped, jax.jit(split)(*inputs), expected, strict=True):
        np.testing.assert_array_equal(found, jnp.stack([value, value]))
        np.testing.assert_array_equal(halves, value)


def test_every_case_names_its_source():
    assert all(case.source for case in CASES.values())
    assert set(FLOATS) | {"labels"} == set(Inputs._fields)
