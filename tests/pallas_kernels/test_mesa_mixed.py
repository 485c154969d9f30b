"""Steps of two precisions: which tokens take which, and what becomes of those that the coarser one fails."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import NESTED

from pallas_kernels import SolverConfig
from pallas_kernels.mesa_chunk import chunks, nested, solver, xla
from pallas_kernels.mesa_chunk.cases import STUDY, sample
from pallas_kernels.mesa_chunk.contract import zero_state
from pallas_kernels.mesa_chunk.pallas_tpu_tiles import TpuConfig

MIXED = SolverConfig(precision="mixed")


@pytest.mark.parametrize(
    ("fields", "elsewhere", "on_tpus"),
    [
        ({}, ["float32"], ["float32", "bfloat16_3x"]),
        ({"max_steps": 29}, ["float32"], ["float32"]),
        ({"preconditioner": "none"}, ["float32"], ["float32"]),
        ({"precision": "bfloat16"}, ["bfloat16"], ["bfloat16"]),
        ({"precision": "mixed", "preconditioner": "none", "max_steps": 3}, *2 * [["float32", "bfloat16_3x"]]),
        ({"adjoint_max_steps": 5}, ["float32"], ["float32", "bfloat16_3x"]),
    ],
    ids=str,
)
def test_fewer_digits_are_taken_if_asked_for_or_where_no_token_loses_by_them(fields, elsewhere, on_tpus):
    config = SolverConfig(**fields)
    assert list(config.precisions()) == elsewhere
    assert list(config.precisions(otherwise="mixed")) == on_tpus
    if config.adjoint_max_steps:
        assert list(config.adjoint.precisions(otherwise="mixed")) == ["float32"]


def second_tile(name: str, config: SolverConfig = MIXED):
    """Right-hand sides, the second tile of the TPU kernels, and its factor."""
    inputs = sample(dataclasses.replace(STUDY[name], length=256))
    q, k, v, log_decay, beta, ridge = (jnp.asarray(x, jnp.float32) for x in inputs[:6])
    starts, c = jnp.zeros(q.shape[:2], jnp.int32), TpuConfig().chunk_length
    tiles, _ = xla.cut(k, v, log_decay, beta, ridge, zero_state(q, v), starts, xla.XlaConfig(c))
    expected = nested.expected_decays(tiles.decays)
    rhs, tile, expected = jax.tree.map(lambda x: x[1, 0, 0], (chunks.to_columns(q, c), tiles, expected))
    return rhs, tile, xla.factor_tile(tile, expected, config)


def begin(rhs, tile, factor, config: SolverConfig = MIXED):
    """The problem, its first method, its first round, and where tokens stand when that begins."""
    problem, methods, _ = nested.pose_tile(rhs, tile, factor, config, MIXED.precisions())
    rounds = solver.first_round(problem, methods[0], solver.nothing_found(problem))
    return problem, methods[0], rounds, solver.first_step(problem, methods[0], rounds)


def test_with_the_factor_the_first_step_is_taken_in_full_and_later_ones_need_less():
    problem, method, rounds, steps = begin(*second_tile("low_rank, 0.99-1"))
    assert (steps.level == 1).all()
    steps = solver.take_level(problem, method, 1, rounds, steps)
    assert (steps.num_steps == 1).all() and (steps.level == 2).all()
    steps = solver.take_level(problem, method, 2, rounds, steps)
    assert (steps.level == 0).all() and (steps.num_steps <= 6).all()
    assert (solver.end_round(problem, method, rounds, steps).wanted == 0).all()


def test_on_the_matrix_itself_all_steps_to_the_usual_tolerance_need_less():
    rhs, tile, _ = second_tile("silu, 0.95-1")
    *_, steps = begin(rhs, tile, None)
    assert (steps.level == 2).all()
    *_, steps = begin(rhs, tile, None, dataclasses.replace(MIXED, tolerance=1e-6))
    assert (steps.level == 1).all()


def test_a_token_waits_as_it_is_for_those_that_still_need_all_digits():
    rhs, tile, _ = second_tile("silu, 0.95-1")
    problem, method, rounds, steps = begin(rhs, tile, None, dataclasses.replace(MIXED, tolerance=1e-6))
    seen_waiting = 0
    while (steps.level == 1).any():
        waits = np.asarray(steps.level[0] == 2)
        before, steps = steps, solver.step(problem, method, 1, rounds.begun, steps)
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(steps), strict=True):
            np.testing.assert_array_equal(old[:, waits], new[:, waits])
        seen_waiting += waits.sum()
    assert seen_waiting, "all tokens came to the second level at once"


def test_no_method_touches_the_tokens_of_another():
    rhs, tile, factor = second_tile("silu, 0.99-1")
    assert factor is not None
    others = jnp.arange(rhs.shape[1]) % 2 == 0
    loose = dataclasses.replace(MIXED, tolerance=1e-3)  # to which few digits do from the beginning
    problem, method, rounds, steps = begin(rhs, tile, factor._replace(usable=others[None]), loose)
    np.testing.assert_array_equal(steps.level[0], jnp.where(others, 2, 0))
    steps = solver.take_steps(problem, method, rounds)
    assert (steps.num_steps[0, ~others] == 0).all() and (steps.num_steps[0, others] > 0).all()


@pytest.mark.parametrize("wrong", [0.3, 0.0, -1.0, math.nan, math.inf])
def test_what_the_coarser_steps_get_wrong_is_solved_in_full(wrong):
    rhs, tile, _ = second_tile("silu, 0.95-1")
    problem, (method,), _ = nested.pose_tile(rhs, tile, None, MIXED, MIXED.precisions())
    whole, coarse = method.levels
    broken = coarse._replace(image=lambda direction: wrong * whole.image(direction))
    found = solver.solve(problem, (method._replace(levels=(whole, broken)),))
    assert (solver.relative_size(found.residual, problem.rhs) <= MIXED.tolerance).all()


@pytest.mark.parametrize(("name", "scale"), [("bursts, 0.99-1", 300), ("low_rank, 1", 1000), ("repeated, 1", 100)])
def test_where_sixteen_bits_do_not_resolve_the_condition_the_residual_is_that_of_all_digits(name, scale):
    rhs, tile, _ = second_tile(name)
    tile = tile._replace(k=scale * tile.k, kk=scale**2 * tile.kk)
    factor = xla.factor_tile(tile, jnp.full((1, 1), -0.3), MIXED)
    worst = {}
    for precision in ("float32", "bfloat16_3x", "mixed"):
        config = SolverConfig(max_steps=300, precision=precision)
        found = nested.solve_tile(rhs, tile, factor, config)
        worst[precision] = jnp.max(solver.relative_size(found.residual, rhs))
    assert worst["bfloat16_3x"] > 5 * worst["float32"], worst
    assert worst["mixed"] <= 2 * worst["float32"], worst


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
@pytest.mark.parametrize("name", ["low_rank, 0.99-1", "bursts, 0.95-1", "repeated, 1"])
def test_the_tolerance_is_reached_and_in_hardly_more_steps(name, tolerance):
    rhs, tile, factor = second_tile(name)
    config = SolverConfig(tolerance=tolerance, max_steps=100)
    whole, mixed = (
        nested.solve_tile(rhs, tile, factor, dataclasses.replace(config, precision=p)) for p in ("float32", "mixed")
    )
    allowed = jnp.maximum(tolerance, NESTED["floor"] * solver.relative_size(whole.residual, rhs))
    assert (solver.relative_size(mixed.residual, rhs) <= allowed).all()
    assert mixed.num_steps.max() <= 2 * whole.num_steps.max() + 2
