"""Rungs 4 and 5: the kernel of one token interpreted, or with --gpu run; then lowered and compiled for absent GPUs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from ahead_of_time import GPUS, lower_for_cuda
from cuda_targets import compile_for_cuda, needs_cuda_compiler
from tolerances import CHUNKWISE, DENSE_RESIDUAL, LAW, assert_near

from pallas_kernels import MesaState, SolverConfig
from pallas_kernels.mesa_chunk.cases import Case, Inputs, sample
from pallas_kernels.mesa_step import pallas_gpu, xla

INTERPRETED = jax.default_backend() != "gpu"
CONVERGED = SolverConfig(max_steps=60, tolerance=0.0)
TOKEN = Case(source="decoding", batch=2, length=1, num_heads=3, key_dim=16, value_dim=32, decay=(0.97, 1.0))


def sample_token(**changes) -> Inputs:
    """Inputs without their axis of time, in float64 but of float32's values."""
    inputs = sample(dataclasses.replace(TOKEN, **changes))
    arrays = (x[:, 0] if name in ("q", "k", "v", "log_decay", "beta") else x for name, x in inputs._asdict().items())
    return Inputs(*(np.float64(np.float32(x)) for x in arrays))


def step(inputs: Inputs, solver=CONVERGED, forward=functools.partial(pallas_gpu.forward, interpret=INTERPRETED)):
    *token, kk, kv = (jnp.float32(x) for x in inputs)
    return jax.jit(functools.partial(forward, solver=solver))(*token, MesaState(kk, kv))


def assert_all_near(found, truth, tolerance) -> None:
    for name, value, right in zip(("out", "kk", "kv"), found, truth, strict=True):
        assert_near(value, right, tolerance, name)


@pytest.mark.parametrize("preconditioner", ["none", "nested"])
@pytest.mark.parametrize(
    "changes",
    [
        dict(key_dim=60, value_dim=33),
        dict(batch=1, num_heads=2, key_dim=128, value_dim=128),
        dict(decay=(1.0, 1.0)),
        dict(decay=(0.01, 0.01)),
        dict(beta=(0.0, 0.0)),
        dict(reset=1.0),
    ],
    ids=str,
)
def test_the_kernel_equals_a_dense_solve_in_float64(changes, preconditioner):
    inputs = sample_token(**changes)
    inputs = inputs._replace(log_decay=np.maximum(inputs.log_decay, -80))  # as the public operator does
    out, state, report = step(inputs, dataclasses.replace(CONVERGED, preconditioner=preconditioner))
    truth = oracles.mesa(*(x[:, None] for x in inputs[:5]), *inputs[5:])
    assert_all_near((out, *state), (truth.out[:, 0], truth.kk, truth.kv), CHUNKWISE["float32"])
    assert report.residual.max() <= DENSE_RESIDUAL


@pytest.mark.parametrize(
    "solver", [SolverConfig(max_steps=0), SolverConfig(max_steps=5, tolerance=0.0), SolverConfig(tolerance=1e-2)]
)
def test_a_solve_that_ends_early_ends_where_that_of_xla_does(solver):
    inputs = sample_token()
    out, state, report = step(inputs, solver)
    same_out, same_state, same = step(inputs, forward=xla.forward, solver=solver)
    assert_all_near((out, *state), (same_out, *same_state), LAW["float32"])
    np.testing.assert_array_equal(report.num_steps, same.num_steps)
    np.testing.assert_allclose(report.residual, same.residual, atol=DENSE_RESIDUAL)


@pytest.mark.parametrize(
    ("dtype", "key_dim", "value_dim", "reason"),
    [
        ("float32", 128, 128, None),
        ("float32", 64, 129, "keys have size 64 and values 129, and the kernel takes 128 at most"),
        ("float64", 16, 16, "the kernel computes in float32, not in float64"),
    ],
)
def test_what_the_kernel_cannot_run_is_refused_with_the_reason(dtype, key_dim, value_dim, reason):
    assert pallas_gpu.why_not(jnp.dtype(dtype), key_dim, value_dim) == reason


@pytest.mark.parametrize("compute_capability", GPUS)
@pytest.mark.parametrize("preconditioner", ["none", "nested"])
def test_a_step_lowers_for_every_generation(preconditioner, compute_capability):
    program = lower_for_cuda(*_step(100, 60, preconditioner), compute_capability=compute_capability)
    assert "mesa_step" in program


@needs_cuda_compiler
@pytest.mark.parametrize("compute_capability", GPUS)
def test_a_step_compiles_for_every_generation(compute_capability):
    program = compile_for_cuda(*_step(128, 128, "none"), compute_capability=compute_capability)
    assert "mesa_step" in program


def _step(key_dim, value_dim, preconditioner):
    """The call as a function, and the shapes of its arguments."""
    array = functools.partial(jax.ShapeDtypeStruct, dtype="float32")
    lead = 2, 4
    q, gates = array((*lead, key_dim)), array(lead)
    state = MesaState(array((*lead, key_dim, key_dim)), array((*lead, key_dim, value_dim)))
    solver = SolverConfig(preconditioner=preconditioner)
    arguments = q, q, array((*lead, value_dim)), gates, gates, array((lead[1], key_dim)), state
    return functools.partial(pallas_gpu.forward, solver=solver), *arguments
