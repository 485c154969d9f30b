"""The nested preconditioner over the rows of the study: few steps, and reports that are true."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import NESTED

from pallas_kernels import SolverConfig
from pallas_kernels.mesa_chunk import algebra, chunks, nested, solver, xla
from pallas_kernels.mesa_chunk.cases import STUDY, Case, sample
from pallas_kernels.mesa_chunk.contract import zero_state
from pallas_kernels.mesa_chunk.pallas_tpu_tiles import TpuConfig

SIDES = ("forward", "adjoint")
MOST_STEPS = {1e-4: 9, 1e-6: 12}
BUDGET = 100  # far above what any token takes, so that tokens stop by themselves


class Study:
    """A row of the study at three chunks, with its dense systems in float64."""

    def __init__(self, case: Case):
        self.operands, self.dout = operands_of(case, 192)
        _, k, _, log_decay, beta, ridge = (np.asarray(x, np.float64) for x in self.operands)
        self.matrices = np.empty((k.shape[1], *[k.shape[-1]] * 2))
        kk = np.zeros(self.matrices.shape[1:])
        for t in range(len(self.matrices)):
            kk = np.exp(log_decay[0, t, 0]) * kk + beta[0, t, 0] * np.outer(k[0, t, 0], k[0, t, 0])
            self.matrices[t] = kk + np.diag(ridge[0])

    def solve(self, **choices) -> dict[str, "Solved"]:
        """Solves both sides with these choices of a SolverConfig."""
        found = jax.device_get(_solve(self.operands, self.dout, config=SolverConfig(**choices)))
        return {side: self._judge(*map(_tokens_first, found[side])) for side in SIDES}

    def _judge(self, num_steps, reported, rhs, solution) -> "Solved":
        size = np.linalg.norm(rhs, axis=-1)
        size = np.where(size, size, 1)
        error = rhs - np.einsum("tij,tj->ti", self.matrices, np.float64(solution))
        products = np.einsum("tij,tj->ti", np.abs(self.matrices), np.abs(solution))
        residual, rounding = (np.linalg.norm(x, axis=1) / size for x in (error, products * 2.0**-24))
        return Solved(num_steps[:, 0], reported[:, 0], residual, rounding)


class Solved(NamedTuple):
    """[t] each: what the solver says, and what is true."""

    num_steps: np.ndarray
    reported: np.ndarray
    residual: np.ndarray  # relative, in float64
    rounding: np.ndarray  # what one rounding of float32 of each entry of A x makes of a residual


def operands_of(case: Case, length: int) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """The inputs of at most so many tokens, and a cotangent of the outputs."""
    inputs = sample(dataclasses.replace(case, length=min(case.length, length)))
    dout = np.random.default_rng(1).normal(size=inputs.v.shape)
    return tuple(jnp.asarray(x, jnp.float32) for x in inputs[:6]), jnp.asarray(dout, jnp.float32)


@functools.cache
def study(name: str) -> Study:
    return Study(STUDY[name])


@functools.partial(jax.jit, static_argnames=("config", "chunk_length"))
def _solve(operands, dout, *, config: SolverConfig, chunk_length: int = 64):
    q, k, v, log_decay, beta, ridge = operands
    starts = jnp.zeros(q.shape[:2], jnp.int32)
    tiles, _ = xla.cut(k, v, log_decay, beta, ridge, zero_state(q, v), starts, xla.XlaConfig(chunk_length))

    def solve_tile(inputs):
        q, dout, tile, expected = inputs
        factor = xla.factor_tile(tile, expected, config)
        sides = zip(SIDES, (q, algebra.adjoint_rhs(dout, tile)), strict=True)
        return {side: (rhs, nested.solve_tile(rhs, tile, factor, config)) for side, rhs in sides}

    columns = (chunks.to_columns(x, tiles.k.shape[-2]) for x in (q, dout))
    arrays = *columns, tiles, nested.expected_decays(tiles.decays)
    found = jax.lax.map(solve_tile, jax.tree.map(lambda x: x[:, 0, 0], arrays))
    sizes = {side: jax.vmap(solver.relative_size)(found[side][1].residual, found[side][0]) for side in SIDES}
    return {side: (x.num_steps, sizes[side], rhs, x.solution) for side, (rhs, x) in found.items()}


def _tokens_first(x: np.ndarray) -> np.ndarray:
    """[n, k, c] -> [t, k]."""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1])


each_row = pytest.mark.parametrize("name", STUDY)


@each_row
@pytest.mark.parametrize("tolerance", MOST_STEPS)
def test_steps_are_few_and_the_reported_residual_is_true_in_every_row_of_the_study(name, tolerance):
    for side, found in study(name).solve(max_steps=BUDGET, tolerance=tolerance).items():
        assert found.num_steps.max() <= MOST_STEPS[tolerance], side
        allowed = NESTED["floor"] * found.rounding
        assert (np.abs(found.reported - found.residual) <= allowed).all(), side
        assert (found.residual <= tolerance + allowed).all(), side


@each_row
@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_tiles_of_the_tpu_kernels_take_the_steps_that_their_cost_is_told_for(name, precision):
    operands, dout = operands_of(STUDY[name], 384)
    config = SolverConfig(precision=precision)
    found = jax.device_get(_solve(operands, dout, config=config, chunk_length=TpuConfig().chunk_length))
    remembers = name.endswith((", 0.99-1", ", 1", "no input", "one token"))
    most = 12 if name.endswith("0.95-1") else 6
    for side in SIDES:
        num_steps = found[side][0]  # [n, 1, c]; of what the first chunk forgets nothing is known
        assert num_steps[0 if remembers else 1 :].max() <= most, side


@each_row
def test_without_a_tolerance_a_residual_ends_at_what_float32_allows(name):
    for side, found in study(name).solve(max_steps=30, tolerance=0.0).items():
        assert (found.residual <= NESTED["floor"] * found.rounding).all(), side


@pytest.mark.parametrize("precision", ["mixed", "bfloat16_3x", "bfloat16"])
def test_low_precision_reaches_the_same_tolerance(precision):
    for name in ("silu, 0.95-1", "low_rank, 1"):
        for side, found in study(name).solve(max_steps=BUDGET, tolerance=1e-4, precision=precision).items():
            assert found.num_steps.max() <= 12, (name, side)
            allowed = NESTED["floor"] * found.rounding
            assert (np.abs(found.reported - found.residual) <= allowed).all(), (name, side)
            assert (found.residual <= 1e-4 + allowed).all(), (name, side)


def test_nested_steps_are_a_fraction_of_plain_ones_once_the_gates_are_known():
    steps = {
        preconditioner: study("low_rank, 1").solve(max_steps=BUDGET, tolerance=1e-4, preconditioner=preconditioner)
        for preconditioner in ("none", "nested")
    }
    for side in SIDES:
        nested_steps, plain = (steps[name][side].num_steps[64:].max() for name in ("nested", "none"))
        assert 6 * nested_steps <= plain
