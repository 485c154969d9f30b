"""An affine window is exact where it is opened, off by the square of the distance, and exact everywhere if affine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2t2_jax.linearise import linearised
from tests import tolerances
from tests.r2t2_jax.made_up_model import AFFINE, DEEP, PARAMS, inputs
from tests.tolerances import assert_near

GIVEN = inputs(10, seed=2)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def params(in_float64):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), PARAMS)


@pytest.fixture
def given(in_float64):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), GIVEN)


def window(model, params, given):
    return jax.jit(linearised(model))(params, given, model.router(params, given))


def test_value_and_slope_are_those_of_the_model(params, given):
    routing, step = DEEP.router(params, given), 1e-5
    readout = window(DEEP, params, given)
    expected = DEEP.forward(params, given, routing)
    assert_near(readout(routing), expected, tolerances.LAW["float64"], "value")
    for expert in range(routing.shape[1]):
        above, below = (DEEP.forward(params, given, routing.at[:, expert].add(s)) for s in (step, -step))
        far = [DEEP.forward(params, given, routing.at[:, expert].add(s)) for s in (2 * step, -2 * step)]
        slope = (8 * (above - below) - (far[0] - far[1])) / (12 * step)
        assert_near(readout.weight[:, expert], slope, tolerances.FINITE_DIFFERENCE, f"slope of expert {expert}")


def test_the_error_grows_with_the_square_of_the_distance(params, given):
    routing, readout = DEEP.router(params, given), window(DEEP, params, given)
    way = jnp.asarray(np.random.default_rng(0).normal(size=routing.shape))

    def error(size):
        away = routing + size * way
        return np.abs(readout(away) - DEEP.forward(params, given, away)).max()

    assert error(1e-2) > 1e-4
    assert 3.9 < error(2e-3) / error(1e-3) < 4.1


def test_an_affine_model_gets_its_exact_readout(params, given):
    found, exact = window(AFFINE, params, given), AFFINE.readout(params, given)
    assert_near(found.weight, exact.weight, tolerances.LAW["float64"], "weight")
    assert_near(found.offset, exact.offset, 20 * tolerances.LAW["float64"], "offset, a difference")
