"""Rungs 4 and 5: the TPU kernels in the interpreter and in the simulator, then compiled for TPUs that are not here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ahead_of_time import CHIPS, compile_for, needs_libtpu
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from pullbacks import differentiate, random_cotangents
from tolerances import CHUNKWISE, assert_near

from pallas_kernels import MesaState, SolverConfig, mesa_chunk
from pallas_kernels.mesa_chunk import pallas_tpu
from pallas_kernels.mesa_chunk.cases import CASES, Case, sample
from pallas_kernels.mesa_chunk.contract import zero_state
from pallas_kernels.mesa_chunk.methods import STEP_PRECISIONS

CONVERGED = SolverConfig(max_steps=60, tolerance=0.0)
TWO_CHUNKS = Case(
    source="a second, short chunk; two batch entries, so that four tiles lie side by side",
    batch=2,
    length=150,
    key_dim=20,
    value_dim=12,
    decay=(0.97, 1.0),
)
DOCUMENTS = np.zeros((2, 150), np.int32)
DOCUMENTS[0, 40:], DOCUMENTS[0, 140:], DOCUMENTS[1, 129:] = 1, 2, 3  # one boundary after another, one past the chunk's


def call(inputs, starts, cotangents, solver=CONVERGED, config=pallas_tpu.TpuConfig(), **choices):
    """Values and gradients as one tuple, from the adapter's own forward and backward."""
    q, k, v, log_decay, beta, ridge, kk, kv = (jnp.float32(x) for x in inputs)
    dout, *dstate = (jnp.float32(x) for x in cotangents)
    rest = (k, v, log_decay, beta, ridge, MesaState(kk, kv), jnp.asarray(starts))

    @jax.jit
    def run(q, rest, dout, dstate):
        out, state, x, report, factors = pallas_tpu.forward(q, *rest, solver=solver, config=config, **choices)
        dstate = MesaState(*dstate)
        *grads, before = pallas_tpu.backward(rest, x, factors, dout, dstate, solver=solver, config=config, **choices)
        return (out, *state, *grads, *before), report

    return run(q, rest, dout, dstate)


def expected(inputs, segment_ids, cotangents):
    found = differentiate(inputs, cotangents, segment_ids, dtype="float64", implementation="reference")
    return found.values | {f"gradient of {name}": g for name, g in found.gradients.items()}


def assert_all_near(found, truth, tolerance=CHUNKWISE["float32"]):
    for value, (name, right) in zip(found, truth.items(), strict=True):
        assert_near(value, right, tolerance, name)


def starts_of(segment_ids):
    return np.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]).clip(0, 1).astype(np.int32)


@pytest.fixture(scope="module")
def truth():
    inputs = sample(TWO_CHUNKS)
    return expected(inputs, DOCUMENTS, random_cotangents(inputs))


@pytest.mark.parametrize("precision", STEP_PRECISIONS)
def test_values_and_gradients_equal_the_reference_at_every_precision_of_the_steps(precision, truth):
    inputs = sample(TWO_CHUNKS)
    solver = dataclasses.replace(CONVERGED, precision=precision)
    found, _ = call(inputs, starts_of(DOCUMENTS), random_cotangents(inputs), solver, interpret=True)
    assert_all_near(found, truth)


@pytest.mark.parametrize("name", ["k", "v", "log_decay", "beta"])
def test_no_output_depends_on_later_tokens_whose_steps_take_other_digits(name):
    """At this tolerance tokens of one tile come to the second level at different steps, and the budget ends them."""
    inputs, last = sample(dataclasses.replace(TWO_CHUNKS, batch=1, decay=(0.9, 1.0))), 90
    later = getattr(inputs, name).copy()
    later[:, last:] = -1.0 if name == "log_decay" else 3 * later[:, last:] + 1
    config = SolverConfig(tolerance=1e-5, max_steps=5, precision="mixed")
    before, after = (jax.device_get(solve_only(x, solver=config)) for x in (inputs, inputs._replace(**{name: later})))
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old[:, :last], new[:, :last])
    assert (before[0][:, last:] != after[0][:, last:]).any()


@functools.partial(jax.jit, static_argnames="solver")
def solve_only(inputs, *, solver):
    """Outputs, steps and residuals."""
    q, k, v, log_decay, beta, ridge, kk, kv = (jnp.float32(x) for x in inputs)
    rest = k, v, log_decay, beta, ridge, MesaState(kk, kv), jnp.zeros(q.shape[:2], jnp.int32)
    config = pallas_tpu.TpuConfig(root_size=32)
    out, _, _, report, _ = pallas_tpu.forward(q, *rest, solver=solver, config=config, interpret=True)
    return out, report.num_steps, report.residual


def test_tiles_that_forget_are_solved_without_a_factor():
    inputs = sample(dataclasses.replace(CASES["all_gates"], length=70))
    cotangents = random_cotangents(inputs)
    found, report = call(inputs, np.zeros((1, 70), np.int32), cotangents, interpret=True)
    assert_all_near(found, expected(inputs, None, cotangents))
    assert report.num_steps.max() > 3, "with a factor it would be fewer"


def test_without_a_solve_the_kernels_are_linear_attention():
    inputs = sample(dataclasses.replace(TWO_CHUNKS, length=20))
    cotangents, solver = random_cotangents(inputs), SolverConfig(max_steps=0)
    found, _ = call(inputs, np.zeros((2, 20), np.int32), cotangents, solver, interpret=True)
    linear = differentiate(inputs, cotangents, dtype="float64", implementation="xla", solver=solver)
    assert_all_near(found, linear.values | linear.gradients)


def test_how_many_tiles_lie_side_by_side_changes_no_answer():
    inputs = sample(dataclasses.replace(TWO_CHUNKS, batch=1, length=40))
    arguments = inputs, np.zeros((1, 40), np.int32), random_cotangents(inputs)
    together, report = call(*arguments, interpret=True)
    config = pallas_tpu.TpuConfig(side_by_side=1)
    alone, same_report = call(*arguments, interpret=True, config=config)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(report.num_steps, same_report.num_steps)


def test_the_kernels_neither_race_nor_read_what_was_not_written(truth):
    """In the simulator of a TPU: memory starts as NaN, copies arrive when they are waited for, tiles in any order."""
    simulator = pltpu.InterpretParams(detect_races=True, random_seed=5, out_of_bounds_reads="raise")
    inputs = sample(TWO_CHUNKS)
    config = pallas_tpu.TpuConfig(root_size=32)  # it looks at every access to memory, and those grow with the cube
    found, _ = call(inputs, starts_of(DOCUMENTS), random_cotangents(inputs), config=config, interpret=simulator)
    assert_all_near(found, truth)
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(
    ("dim", "x64", "reason"),
    [
        (16, False, "programs here are for cpu, not for tpu; use None, which adapts"),
        (257, False, "keys have size 257 and values 257, and the kernels take 256 at most"),
        (16, True, "the kernels compute in float32, not in float64"),
    ],
)
def test_what_the_kernels_cannot_run_is_refused_with_the_reason(dim, x64, reason):
    with jax.enable_x64(x64):
        q, gates = jnp.ones((1, 3, 2, dim)), jnp.zeros((1, 3, 2))
        with pytest.raises(NotImplementedError) as caught:
            mesa_chunk(q, q, q, gates, gates, jnp.ones((2, dim)), implementation="pallas_tpu")
    assert str(caught.value) == f"mesa_chunk: implementation='pallas_tpu' cannot run this: {reason}."


def both(q, rest, dout, dstate, *, solver):
    out, _, x, _, factors = pallas_tpu.forward(q, *rest, solver=solver)
    return out, pallas_tpu.backward(rest, x, factors, dout, dstate, solver=solver)


@needs_libtpu
def test_a_batch_of_calls_compiles():
    array = functools.partial(jax.ShapeDtypeStruct, dtype="float32")
    n, b, t, h, k = 3, 2, 256, 4, 128
    q, gates, state = array((n, b, t, h, k)), array((n, b, t, h)), MesaState(*[array((n, b, h, k, k))] * 2)
    rest = (q, q, gates, gates, array((n, h, k)), state, jax.ShapeDtypeStruct((n, b, t), "int32"))
    program = compile_for("v5e", jax.vmap(functools.partial(both, solver=SolverConfig())), q, rest, q, state)
    assert "mesa_chunk_roots" in program


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("key_dim", "value_dim", "precision", "preconditioner"),
    [
        (128, 128, None, "nested"),  # steps in float32 and in bfloat16_3x, with the factor and on the matrix
        (128, 128, "bfloat16_3x", "nested"),
        (64, 96, "bfloat16", "nested"),
        (256, 256, "float32", "nested"),
        (128, 256, "float32", "none"),
    ],
)
def test_forward_and_backward_compile_for_every_generation(key_dim, value_dim, precision, preconditioner, chip):
    solver = SolverConfig(tolerance=1e-4, precision=precision, preconditioner=preconditioner)
    array = functools.partial(jax.ShapeDtypeStruct, dtype="float32")
    b, t, h = 1, 300, 4
    q, v, gates = array((b, t, h, key_dim)), array((b, t, h, value_dim)), array((b, t, h))
    state = jax.eval_shape(zero_state, q, v)
    starts = jax.ShapeDtypeStruct((b, t), "int32")
    rest = (q, v, gates, gates, array((h, key_dim)), state, starts)

    program = compile_for(chip, functools.partial(both, solver=solver), q, rest, v, state)
    assert all(f"mesa_chunk_{name}" in program for name in ("forward", "adjoint", "cotangents"))
    makes_factors = preconditioner == "nested"
    assert all((f"mesa_chunk_{name}" in program) == makes_factors for name in ("roots", "tokens", "rows"))
