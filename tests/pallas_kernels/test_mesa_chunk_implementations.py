"""Rung 2: every implementation against the reference, over the named cases; a newcomer is tested by its name below."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from pullbacks import Cotangents, differentiate, random_cotangents
from tolerances import CHUNKWISE, FADED_GATE, SCREAMING, assert_near, relative_error

from pallas_kernels import SolverConfig
from pallas_kernels.mesa_chunk.cases import CASES, Inputs, sample
from pallas_kernels.mesa_chunk.solver import PRECONDITIONERS

IMPLEMENTATIONS = ["xla"]
CONVERGED = SolverConfig(max_steps=60, tolerance=0.0)
SOLVERS = {name: dataclasses.replace(CONVERGED, preconditioner=name) for name in PRECONDITIONERS}


def rounded(arrays, dtype: str):
    """What a computation in `dtype` is given; states stay in float32 at least."""
    state_dtype = jnp.promote_types(dtype, "float32")
    kept = {name: state_dtype if name in ("kk", "kv") else dtype for name in arrays._fields}
    return type(arrays)(*(x.astype(kept[name]).astype(np.float64) for name, x in arrays._asdict().items()))


def tolerance(case: str, dtype: str, name: str) -> float:
    if name in ("kk", "kv", "final_kk", "final_kv"):
        dtype = "float64" if dtype == "float64" else "float32"
    if case == "screaming":
        return SCREAMING[dtype]
    return (FADED_GATE if (case, name) == ("forgets_fast", "log_decay") else CHUNKWISE)[dtype]


@pytest.mark.optimized
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("dtype", "preconditioner"),
    [("float64", "none"), ("float32", "none"), ("bfloat16", "none"), ("float64", "nested"), ("float32", "nested")],
)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_equal_the_reference(case, dtype, preconditioner, implementation):
    inputs = rounded(sample(CASES[case]), dtype)
    cotangents = rounded(random_cotangents(inputs), dtype)
    expected = differentiate(inputs, cotangents, dtype="float64", implementation="reference")
    solver = SOLVERS[preconditioner]
    actual = differentiate(inputs, cotangents, dtype=dtype, implementation=implementation, solver=solver)
    for name, value in expected.values.items():
        assert_near(actual.values[name], value, tolerance(case, dtype, name), name)
    for name, gradient in expected.gradients.items():
        assert_near(actual.gradients[name], gradient, tolerance(case, dtype, name), f"gradient of {name}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_relative_error_of_the_gradient_does_not_depend_on_the_scale_of_the_cotangent(implementation):
    """An absolute epsilon in the solver loses 34 % of the gradient at 1e-4 and all at 1e-5."""
    inputs = rounded(sample(CASES["odd_length"]), "float32")
    unit = rounded(random_cotangents(inputs), "float32")
    truth = differentiate(inputs, unit, dtype="float64", implementation="reference").gradients
    for scale in (1.0, 1e-3, 1e-6, 1e-20):
        found = differentiate(inputs, unit.scaled(scale), implementation=implementation, solver=CONVERGED).gradients
        for name in Inputs._fields:
            assert_near(found[name].astype(np.float64) / scale, truth[name], CHUNKWISE["float32"], f"{name} at {scale}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_cotangent_scaled_by_a_power_of_two_scales_the_gradient_to_the_bit(implementation):
    inputs = rounded(sample(CASES["odd_length"]), "float32")
    unit = random_cotangents(inputs)
    plain = differentiate(inputs, unit, implementation=implementation, solver=CONVERGED).gradients
    scaled = differentiate(inputs, unit.scaled(2.0**-30), implementation=implementation, solver=CONVERGED).gradients
    for name in Inputs._fields:
        np.testing.assert_array_equal(scaled[name] * 2.0**30, plain[name], err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cotangents_of_the_final_state_alone_reach_every_input_that_made_it(implementation):
    inputs = sample(CASES["odd_length"])
    random = random_cotangents(inputs)
    only_state = Cotangents(0 * random.out, random.kk, random.kv)
    found = differentiate(inputs, only_state, implementation=implementation, solver=CONVERGED).gradients
    truth = differentiate(inputs, only_state, dtype="float64", implementation="reference").gradients
    assert not found["q"].any() and not found["ridge"].any()
    for name in ("k", "v", "log_decay", "beta", "kk", "kv"):
        assert relative_error(found[name], truth[name]) <= CHUNKWISE["float32"] and truth[name].any(), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_gradient_that_is_finite_is_found_from_the_largest_cotangent(implementation):
    inputs = sample(CASES["odd_length"])
    inputs = inputs._replace(k=1e-3 * inputs.k, kk=0 * inputs.kk)
    largest = Cotangents(0 * inputs.v, np.full(inputs.kk.shape, 3e38), 0 * inputs.kv)
    found = differentiate(inputs, largest, implementation=implementation, solver=CONVERGED).gradients
    truth = differentiate(inputs, largest, dtype="float64", implementation="reference").gradients
    for name in ("k", "log_decay", "beta", "kk"):
        assert relative_error(found[name], truth[name]) <= CHUNKWISE["float32"] and truth[name].any(), name
