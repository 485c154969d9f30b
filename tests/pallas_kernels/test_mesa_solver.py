"""Conjugate gradient by itself, and what the operator reports of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from tolerances import DENSE_RESIDUAL, LAW, assert_near

from pallas_kernels import MesaState, SolverConfig, mesa_chunk, mesa_step
from pallas_kernels.mesa_chunk import products
from pallas_kernels.mesa_chunk import solver as solvers
from pallas_kernels.mesa_chunk.cases import EASY, HARD, sample
from pallas_kernels.mesa_chunk.methods import STEP_PRECISIONS, exact_steps
from pallas_kernels.mesa_chunk.solver import PRECONDITIONERS

rng = np.random.default_rng(0)


def systems(num: int, size: int, ridge: float = 0.25):
    """Symmetric positive definite matrices [num, size, size] and right-hand sides [num, size]."""
    roots = rng.normal(size=(num, size, size))
    return roots @ roots.swapaxes(1, 2) / size + ridge * np.eye(size), rng.normal(size=(num, size))


def solve(matrices, rhs, config: SolverConfig):
    def apply(x):
        return products.times(jnp.asarray(matrices), x)

    rhs = rhs[..., None]
    problem, scale = solvers.pose(apply, rhs, config)
    found = solvers.solve(problem, (exact_steps([apply], rhs),))
    return solvers.Solution((found.solution * scale)[..., 0], (found.residual * scale)[..., 0], found.num_steps[..., 0])


def test_solution_is_that_of_a_dense_solve():
    matrices, rhs = systems(5, 8)
    with jax.enable_x64(True):
        found = solve(matrices, jnp.asarray(rhs), SolverConfig(max_steps=12, tolerance=0.0))
        assert_near(found.solution, np.linalg.solve(matrices, rhs[..., None])[..., 0], LAW["float64"])


def test_residual_of_the_recursion_is_the_residual_of_the_solution_at_any_step():
    matrices, rhs = systems(5, 8)
    with jax.enable_x64(True):
        for steps in range(6):
            found = solve(matrices, jnp.asarray(rhs), SolverConfig(max_steps=steps, tolerance=0.0))
            truth = rhs - np.einsum("nij,nj->ni", matrices, found.solution)
            assert_near(found.residual, truth, 10 * LAW["float64"], f"residual after {steps} steps")


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_solutions_scale_with_the_right_hand_side(scale):
    matrices, rhs = systems(5, 8)
    exact = 2.0 ** np.round(np.log2(scale))  # a power of two rounds nothing
    plain = solve(np.float32(matrices), jnp.float32(rhs), SolverConfig(tolerance=0.0))
    scaled = solve(np.float32(matrices), jnp.float32(rhs * exact), SolverConfig(tolerance=0.0))
    np.testing.assert_array_equal(scaled.solution / np.float32(exact), plain.solution)


def test_nothing_to_solve_gives_zero_and_takes_no_step():
    found = solve(np.float32(systems(3, 8)[0]), jnp.zeros((3, 8)), SolverConfig(tolerance=0.0))
    assert not found.solution.any() and not found.num_steps.any()


def test_a_singular_matrix_gives_finite_numbers():
    found = solve(np.zeros((3, 8, 8), np.float32), jnp.ones((3, 8)), SolverConfig(tolerance=0.0))
    assert np.isfinite(found.solution).all()


def test_steps_after_convergence_change_nothing_and_make_no_nan():
    matrices, rhs = systems(5, 4)
    few, many = (solve(np.float32(matrices), jnp.float32(rhs), SolverConfig(max_steps=n)) for n in (30, 300))
    assert_near(many.solution, few.solution, LAW["float32"])


def test_a_token_answers_the_same_whoever_is_solved_beside_it():
    """One query of a chunk is replaced by an eigenvector, which is solved in one step: no bit of any other moves."""
    inputs = sample(dataclasses.replace(HARD, length=64, num_heads=1, key_dim=8, value_dim=8))
    arrays = [jnp.float32(x) for x in inputs]
    run = functools.partial(_run, solver=SolverConfig(tolerance=1e-3, preconditioner="none"), with_report=True)
    matrix = oracles.mesa(*inputs).matrices[0, 20, 0]
    easy = [arrays[0].at[0, 20, 0].set(np.linalg.eigh(matrix)[1][:, -1]), *arrays[1:]]
    (before, _, report_before), (after, _, report_after) = run(arrays), run(easy)
    others = np.arange(64) != 20
    assert report_after.num_steps[0, 20, 0] < report_before.num_steps[0, 20, 0]
    np.testing.assert_array_equal(after[:, others], before[:, others])
    np.testing.assert_array_equal(report_after.num_steps[:, others], report_before.num_steps[:, others])


@functools.partial(jax.jit, static_argnames=("solver", "with_report"))
def _run(arrays, **choices):
    return mesa_chunk(*arrays[:6], MesaState(*arrays[6:]), **choices)


def few_heads(case, length=130):
    return [
        jnp.float32(x) for x in sample(dataclasses.replace(case, length=length, num_heads=2, key_dim=24, value_dim=4))
    ]


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
@pytest.mark.parametrize("precision", STEP_PRECISIONS)
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_tolerance_is_kept_on_easy_and_hard_inputs_or_the_report_says_that_it_is_not(
    preconditioner, precision, tolerance
):
    config = SolverConfig(max_steps=100, tolerance=tolerance, preconditioner=preconditioner, precision=precision)
    for case in (EASY, HARD):
        _, _, report = _run(few_heads(case), solver=config, with_report=True)
        may_fail = (preconditioner, precision) == ("none", "bfloat16")  # a rounded state may not be positive definite
        assert report.residual.max() <= tolerance or (may_fail and np.isfinite(report.residual).all())


def test_plain_steps_are_few_on_easy_inputs_and_many_on_hard_ones():
    config = SolverConfig(max_steps=100, tolerance=1e-4, preconditioner="none")
    easy, hard = (_run(few_heads(c), solver=config, with_report=True)[2].num_steps.mean() for c in (EASY, HARD))
    assert easy < 0.6 * hard


@pytest.mark.parametrize("max_steps", [0, 1, 5, 30])
def test_reported_residual_is_that_of_the_dense_system(max_steps):
    """Values of 0 and gates of 1 keep a memory that starts as the identity, so that the outputs are the solutions."""
    inputs = sample(dataclasses.replace(HARD, length=70, num_heads=2, key_dim=8, value_dim=8))
    inputs = inputs._replace(v=0 * inputs.v, kv=np.broadcast_to(np.eye(8), inputs.kv.shape))
    out, _, report = _run(
        [jnp.float32(x) for x in inputs], solver=SolverConfig(max_steps=max_steps, tolerance=0.0), with_report=True
    )
    rounded = type(inputs)(*(np.float64(np.float32(x)) for x in inputs))
    error = rounded.q - np.einsum("bthij,bthj->bthi", oracles.mesa(*rounded).matrices, out)
    truth = np.linalg.norm(error, axis=-1) / np.linalg.norm(rounded.q, axis=-1)
    assert np.max(np.abs(report.residual - truth)) <= DENSE_RESIDUAL * max(1, truth.max())
    assert report.num_steps.max() <= max_steps and report.num_steps.dtype == jnp.int32


def test_a_step_reports_what_a_sequence_of_one_reports():
    inputs = sample(dataclasses.replace(HARD, length=1, num_heads=2, key_dim=8, value_dim=8))
    arrays = [jnp.float32(x) for x in inputs]
    solver = SolverConfig(tolerance=1e-3)
    _, _, expected = _run(arrays, solver=solver, with_report=True)
    token = (x[:, 0] for x in arrays[:5])
    _, _, report = mesa_step(*token, arrays[5], MesaState(*arrays[6:]), solver=solver, with_report=True)
    np.testing.assert_array_equal(report.num_steps, expected.num_steps[:, 0])
    assert np.max(np.abs(report.residual - expected.residual[:, 0])) <= DENSE_RESIDUAL
