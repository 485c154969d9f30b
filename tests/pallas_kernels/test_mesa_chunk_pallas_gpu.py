"""Rungs 4 and 5: the GPU kernel interpreted, or with --gpu run; then lowered and compiled for absent GPUs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ahead_of_time import GPUS, lower_for_cuda
from cuda_targets import compile_for_cuda, needs_cuda_compiler
from pullbacks import differentiate, random_cotangents
from tolerances import CHUNKWISE, FADED_GATE, NESTED, assert_near

from pallas_kernels import MesaState, SolverConfig
from pallas_kernels.mesa_chunk import algebra, pallas_gpu, xla
from pallas_kernels.mesa_chunk.cases import CASES, Case, sample
from pallas_kernels.mesa_chunk.chunks import to_columns, to_sequence
from pallas_kernels.mesa_chunk.contract import zero_state
from pallas_kernels.mesa_chunk.methods import STEP_PRECISIONS
from pallas_kernels.mesa_chunk.pallas_gpu import GpuConfig
from pallas_kernels.mesa_chunk.solver import relative_size

INTERPRETED = jax.default_backend() != "gpu"
CONVERGED = SolverConfig(max_steps=60, tolerance=0.0)
PLAIN = dataclasses.replace(CONVERGED, preconditioner="none")
ODD_SIZES = Case(
    source="sizes that are no powers of two, a fourth chunk that is short",
    batch=2,
    length=200,
    key_dim=20,
    value_dim=33,
    decay=(0.97, 1.0),
)
DOCUMENTS = np.zeros((2, 200), np.int32)
DOCUMENTS[0, 40:], DOCUMENTS[0, 190:], DOCUMENTS[1, 65:] = 1, 2, 3  # the last boundary is one past that of a chunk


def run(inputs, cotangents, segment_ids=None, **choices):
    """Values and gradients as one tuple, and the report, from the adapter's own forward and backward."""
    q, k, v, log_decay, beta, ridge, kk, kv = (jnp.float32(x) for x in inputs)
    dout, *dstate = (jnp.float32(x) for x in cotangents)
    ids = np.zeros(inputs.q.shape[:2], np.int32) if segment_ids is None else segment_ids
    starts = np.diff(ids, axis=1, prepend=ids[:, :1]).clip(0, 1).astype(np.int32)
    rest = (k, v, log_decay, beta, ridge, MesaState(kk, kv), jnp.asarray(starts))

    @jax.jit
    def both(q, rest, dout, dstate):
        out, state, x, report, factors = pallas_gpu.forward(q, *rest, interpret=INTERPRETED, **choices)
        *grads, before = pallas_gpu.backward(
            rest, x, factors, dout, MesaState(*dstate), interpret=INTERPRETED, **choices
        )
        return (out, *state, *grads, *before), report

    return both(q, rest, dout, dstate)


def expected(inputs, cotangents, segment_ids=None, **choices):
    choices = choices or {"implementation": "reference"}
    found = differentiate(inputs, cotangents, segment_ids, dtype="float64", **choices)
    return found.values | {f"gradient of {name}": g for name, g in found.gradients.items()}


def assert_all_near(found, truth, **looser):
    for value, (name, right) in zip(found, truth.items(), strict=True):
        assert_near(value, right, looser.get(name.removeprefix("gradient of "), CHUNKWISE["float32"]), name)


@pytest.mark.parametrize(
    "solver",
    [*(dataclasses.replace(CONVERGED, precision=p) for p in STEP_PRECISIONS), PLAIN],
    ids=lambda solver: f"{solver.preconditioner}-{solver.precision}",
)
def test_values_and_gradients_of_documents_equal_the_reference(solver):
    inputs = sample(ODD_SIZES)
    arguments = inputs, random_cotangents(inputs), DOCUMENTS
    found, _ = run(*arguments, solver=solver)
    assert_all_near(found, expected(*arguments))


@pytest.mark.parametrize("case", ["one_token", "below_a_chunk", "keeps_all"])
def test_values_and_gradients_equal_the_reference(case):
    inputs = sample(CASES[case])
    cotangents = random_cotangents(inputs)
    found, _ = run(inputs, cotangents, solver=CONVERGED)
    assert_all_near(found, expected(inputs, cotangents))


def test_gates_of_a_hundredth_leave_their_own_small_gradient():
    inputs = sample(CASES["forgets_fast"])
    cotangents = random_cotangents(inputs)
    found, _ = run(inputs, cotangents, solver=CONVERGED)
    assert_all_near(found, expected(inputs, cotangents), log_decay=FADED_GATE["float32"])


def test_without_a_solve_the_kernel_is_linear_attention():
    inputs = sample(dataclasses.replace(ODD_SIZES, length=20))
    cotangents, solver = random_cotangents(inputs), SolverConfig(max_steps=0)
    found, _ = run(inputs, cotangents, solver=solver)
    assert_all_near(found, expected(inputs, cotangents, implementation="xla", solver=solver))


@pytest.mark.parametrize("preconditioner", ["nested", "none"])
def test_tokens_stop_at_their_tolerance_and_report_the_truth(preconditioner):
    inputs, solver = sample(CASES["low_rank"]), SolverConfig(tolerance=1e-3, preconditioner=preconditioner)
    q, *rest, kk, kv = (jnp.float32(x) for x in inputs)
    rest = (*rest, MesaState(kk, kv), jnp.zeros(q.shape[:2], jnp.int32))
    forward = functools.partial(pallas_gpu.forward, solver=solver, interpret=INTERPRETED)
    _, _, x, report, _ = jax.jit(forward)(q, *rest)
    x = to_sequence(x, q.shape[1])[..., : q.shape[-1]]
    np.testing.assert_allclose(report.residual, _residual(q, x, rest), atol=NESTED["floor"] * np.finfo(np.float32).eps)
    assert report.residual.max() <= 1e-3
    assert 0 < report.num_steps.min() < report.num_steps.max() < 30


def _residual(q, x, rest):
    """Relative residuals [b, t, h] of solutions x, in float64."""
    with jax.enable_x64(True):
        q, x, *sequences, state, starts = jax.tree.map(lambda a: np.asarray(a).astype(np.float64), (q, x, *rest))
        tiles, _ = xla.cut(*sequences, state, jnp.int32(starts), xla.XlaConfig(chunk_length=q.shape[1]))
        q, x = (to_columns(jnp.asarray(y), q.shape[1]) for y in (q, x))
        return to_sequence(relative_size(q - algebra.matrix(tiles)(x), q), q.shape[-1])[..., 0]


def test_how_tokens_are_shared_out_changes_no_answer():
    inputs = sample(ODD_SIZES)
    arguments = inputs, random_cotangents(inputs)
    usual, _ = run(*arguments, solver=PLAIN)
    smaller, _ = run(*arguments, solver=PLAIN, config=GpuConfig(chunk_length=32, tokens=16))
    assert_all_near(usual, {str(i): x for i, x in enumerate(smaller)})


@pytest.mark.parametrize(
    ("dtype", "key_dim", "reason"),
    [
        ("float32", 128, None),
        ("float32", 129, "keys have size 129, and the kernel takes 128 at most"),
        ("float64", 16, "the kernel computes in float32, not in float64"),
    ],
)
def test_what_the_kernel_cannot_run_is_refused_with_the_reason(dtype, key_dim, reason):
    assert pallas_gpu.why_not(jnp.dtype(dtype), key_dim, 300) == reason


@pytest.mark.parametrize("compute_capability", GPUS)
@pytest.mark.parametrize("preconditioner", ["nested", "none"])
@pytest.mark.parametrize("precision", STEP_PRECISIONS)
def test_forward_and_backward_lower_for_every_generation(precision, preconditioner, compute_capability):
    solver = SolverConfig(precision=precision, preconditioner=preconditioner)
    program = lower_for_cuda(*_both(solver, 300, 100, 60), compute_capability=compute_capability)
    assert program.count("mesa_chunk_solve") >= 2


@needs_cuda_compiler
@pytest.mark.parametrize("compute_capability", GPUS)
def test_forward_and_backward_compile_for_every_generation(compute_capability):
    solver = SolverConfig(preconditioner="none", precision="bfloat16")  # others take the compiler a minute
    program = compile_for_cuda(*_both(solver, 300, 64, 60), compute_capability=compute_capability)
    assert program.count("mesa_chunk_solve") >= 2


def _both(solver, length, key_dim, value_dim):
    """Forward and backward as one function, and the shapes of its arguments."""
    array = functools.partial(jax.ShapeDtypeStruct, dtype="float32")
    b, t, h = 1, length, 4
    q, v, gates = array((b, t, h, key_dim)), array((b, t, h, value_dim)), array((b, t, h))
    state = jax.eval_shape(zero_state, q, v)
    rest = (q, v, gates, gates, array((h, key_dim)), state, jax.ShapeDtypeStruct((b, t), "int32"))

    def both(q, rest, dout, dstate):
        out, _, x, _, factors = pallas_gpu.forward(q, *rest, solver=solver)
        return out, pallas_gpu.backward(rest, x, factors, dout, dstate, solver=solver)

    return both, q, rest, v, state
