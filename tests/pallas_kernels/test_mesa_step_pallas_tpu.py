"""Rungs 4 and 5: the kernel of one token in the interpreter and in the simulator, then compiled for absent TPUs."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from ahead_of_time import CHIPS, needs_libtpu
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from tolerances import CHUNKWISE, DENSE_RESIDUAL, LAW, assert_near

from experiments.lower import chips
from pallas_kernels import MesaState, SolverConfig, dispatch, mesa_step
from pallas_kernels.mesa_chunk.cases import Case, Inputs, sample
from pallas_kernels.mesa_step import pallas_tpu, xla

CONVERGED = SolverConfig(max_steps=60, tolerance=0.0)
EIGHT = pallas_tpu.TpuConfig(side_by_side=8)
TOKEN = Case(source="decoding", batch=2, length=1, num_heads=2, key_dim=20, value_dim=12, decay=(0.97, 1.0))
HARD = dict(decay=(1.0, 1.0), ridge=(0.25, 0.25), keys="low_rank")
FIELDS = ("out", "kk", "kv")


def sample_token(**changes) -> Inputs:
    """Inputs without their axis of time, in float64 but of float32's values."""
    inputs = sample(dataclasses.replace(TOKEN, **changes))
    arrays = (x[:, 0] if name in ("q", "k", "v", "log_decay", "beta") else x for name, x in inputs._asdict().items())
    return Inputs(*(np.float64(np.float32(x)) for x in arrays))


def step(inputs: Inputs, solver=CONVERGED, **choices):
    *token, kk, kv = (jnp.float32(x) for x in inputs)
    choices = {"interpret": True} | choices
    out, state, report = jax.jit(functools.partial(pallas_tpu.forward, solver=solver, **choices))(
        *token, MesaState(kk, kv)
    )
    return (out, *state), report


def oracle(inputs: Inputs) -> oracles.Mesa:
    """Truth, with its axis of time taken away from the output."""
    sequences = (x[:, None] for x in inputs[:5])
    found = oracles.mesa(*sequences, *inputs[5:])
    return found._replace(out=found.out[:, 0])


def assert_all_near(found, truth, tolerance=CHUNKWISE["float32"]) -> None:
    for name, value, right in zip(FIELDS[-len(found) :], found, truth, strict=False):
        assert value.dtype == jnp.float32
        assert_near(value, right, tolerance, name)


@pytest.mark.parametrize(
    ("changes", "preconditioner"),
    [
        (dict(key_dim=60, value_dim=33), "nested"),
        (dict(batch=1, num_heads=1, key_dim=128, value_dim=128), "none"),
        (dict(batch=1, num_heads=1, key_dim=256, value_dim=256), "nested"),
        (dict(decay=(1.0, 1.0)), "none"),
        (dict(decay=(0.01, 0.01)), "nested"),
        (dict(beta=(0.0, 0.0)), "none"),
    ],
    ids=str,
)
def test_the_kernel_equals_a_dense_solve_in_float64(changes, preconditioner):
    inputs = sample_token(**changes)
    found, report = step(inputs, dataclasses.replace(CONVERGED, preconditioner=preconditioner))
    assert_all_near(found, oracle(inputs))
    assert report.residual.max() <= DENSE_RESIDUAL


@pytest.mark.parametrize("num_heads", [1, 9])
def test_any_number_of_heads_is_answered_and_no_head_sees_another(num_heads):
    """Nine heads in programs of eight leave seven places empty; their results go nowhere."""
    inputs = sample_token(batch=1, num_heads=num_heads, key_dim=8, value_dim=8)
    found, report = step(inputs, config=EIGHT)
    assert_all_near(found, oracle(inputs))
    poisoned = inputs._replace(kk=np.where(np.arange(num_heads)[:, None, None] == 0, np.nan, inputs.kk))
    others, same_report = step(poisoned, config=EIGHT)
    for a, b in zip((*found, *report), (*others, *same_report), strict=True):
        np.testing.assert_array_equal(a[:, 1:], b[:, 1:])


def test_heads_that_need_fewer_steps_stop_earlier_at_the_same_answers():
    easy, hard = (
        sample_token(batch=1, num_heads=2, key_dim=24, **changes) for changes in (dict(ridge=(9.0, 9.0)), HARD)
    )
    both = Inputs(*(np.concatenate([a, b], axis=0 if a is easy.ridge else 1) for a, b in zip(easy, hard, strict=True)))
    both = both._replace(ridge=np.concatenate([easy.ridge, hard.ridge]))
    solver = SolverConfig(max_steps=50, tolerance=1e-3)
    found, report = step(both, solver)
    assert report.num_steps[:, :2].max() < report.num_steps[:, 2:].min()
    assert report.residual.max() <= solver.tolerance
    alone, alone_report = step(easy, solver)
    np.testing.assert_array_equal(report.num_steps[:, :2], alone_report.num_steps)
    assert_near(found[0][:, :2], alone[0], LAW["float32"])


@pytest.mark.parametrize(
    "solver",
    [
        SolverConfig(tolerance=1e-2),
        SolverConfig(max_steps=3),
        SolverConfig(tolerance=1e-3, preconditioner="nested"),
        SolverConfig(max_steps=0),
    ],
    ids=["tolerance", "few steps", "ridge", "linear attention"],
)
def test_the_kernel_does_what_xla_does_step_by_step(solver):
    inputs = sample_token(**HARD)
    *token, kk, kv = (jnp.float32(x) for x in inputs)
    out, state, report = jax.jit(functools.partial(xla.forward, solver=solver))(*token, MesaState(kk, kv))
    found, same_report = step(inputs, solver)
    assert_all_near(found, (out, *state))
    np.testing.assert_array_equal(same_report.num_steps, report.num_steps)
    assert same_report.num_steps.dtype == jnp.int32
    assert np.max(np.abs(same_report.residual - report.residual)) <= DENSE_RESIDUAL


@pytest.mark.parametrize("max_steps", [0, 1, 5])
def test_the_reported_residual_is_that_of_the_dense_system(max_steps):
    """A memory of the identity that nothing is written to, so that the outputs are the solutions."""
    inputs = sample_token(key_dim=8, value_dim=8, **HARD)
    inputs = inputs._replace(v=0 * inputs.v, kv=np.broadcast_to(np.eye(8), inputs.kv.shape))
    (out, *_), report = step(inputs, SolverConfig(max_steps=max_steps))
    error = inputs.q - np.einsum("bhij,bhj->bhi", oracle(inputs).matrices[:, 0], out)
    truth = np.linalg.norm(error, axis=-1) / np.linalg.norm(inputs.q, axis=-1)
    assert np.max(np.abs(report.residual - truth)) <= DENSE_RESIDUAL * max(1, truth.max())


def test_the_kernel_neither_races_nor_reads_what_was_not_written():
    """In the simulator of a TPU: memory starts as NaN, copies arrive when waited for, programs come in any order."""
    simulator = pltpu.InterpretParams(detect_races=True, random_seed=5, out_of_bounds_reads="raise")
    inputs = sample_token(num_heads=8)
    found, _ = step(inputs, interpret=simulator, config=EIGHT)
    assert_all_near(found, oracle(inputs))
    assert not interpret_pallas_call.races.races_found


@pytest.fixture
def interpreted(monkeypatch):
    """The public operator takes the kernel on a process without a TPU, in the interpreter."""
    monkeypatch.setattr(dispatch, "why_not_here", lambda platform: None)
    monkeypatch.setattr(pallas_tpu, "forward", functools.partial(pallas_tpu.forward, interpret=True))


def arguments_of(inputs: Inputs, dtype: str) -> tuple:
    return *(jnp.asarray(x, dtype) for x in inputs[:6]), MesaState(*(jnp.float32(x) for x in inputs[6:]))


def test_the_public_operator_casts_what_is_not_float32(interpreted):
    inputs = sample_token(key_dim=8, value_dim=6)
    arguments = arguments_of(inputs, "bfloat16")
    call = functools.partial(mesa_step, solver=CONVERGED, with_report=True, implementation="pallas_tpu")
    out, state, report = jax.jit(call)(*arguments)
    assert out.dtype == jnp.bfloat16 and state.kk.dtype == report.residual.dtype == jnp.float32
    truth = oracle(Inputs(*(np.float64(x) for x in arguments[:6]), *inputs[6:]))
    assert_near(out, truth.out, CHUNKWISE["bfloat16"])
    assert_all_near(state, truth[1:3])


def test_the_gradient_through_the_kernel_is_that_of_a_sequence_of_one(interpreted):
    *token, state = arguments_of(sample_token(batch=1, key_dim=6, value_dim=4), "float32")

    def loss(implementation, *token):
        out, after = mesa_step(*token, state, solver=CONVERGED, implementation=implementation)
        return jnp.sum(out) + jnp.sum(after.kk) - jnp.sum(after.kv)

    gradient = jax.jit(jax.grad(loss, argnums=range(1, 7)), static_argnums=0)
    for name, a, b in zip(Inputs._fields, gradient("pallas_tpu", *token), gradient("xla", *token), strict=False):
        np.testing.assert_array_equal(a, b, err_msg=f"gradient of {name}")


@pytest.mark.parametrize(
    ("dim", "x64", "reason"),
    [
        (16, False, "programs here are for cpu, not for tpu; use None, which adapts"),
        (257, False, "keys have size 257 and values 257, and the kernels take 256 at most"),
        (16, True, "the kernels compute in float32, not in float64"),
    ],
)
def test_what_the_kernel_cannot_run_is_refused_with_the_reason(dim, x64, reason):
    with jax.enable_x64(x64):
        q, gates, matrix = jnp.ones((1, 2, dim)), jnp.zeros((1, 2)), jnp.zeros((1, 2, dim, dim))
        with pytest.raises(NotImplementedError) as caught:
            mesa_step(q, q, q, gates, gates, q[0], MesaState(matrix, matrix), implementation="pallas_tpu")
        assert not x64 or pallas_tpu.why_not(jnp.float32, 8, 8) == "kernels do not compile while jax_enable_x64 is on"
    assert str(caught.value) == f"mesa_step: implementation='pallas_tpu' cannot run this: {reason}."


def shapes(batch: int, num_heads: int, key_dim: int, value_dim: int) -> tuple:
    """Arguments of the adapter."""
    array = functools.partial(jax.ShapeDtypeStruct, dtype="float32")
    lead = (batch, num_heads)
    state = MesaState(array((*lead, key_dim, key_dim)), array((*lead, key_dim, value_dim)))
    row, gate = array((*lead, key_dim)), array(lead)
    return row, row, array((*lead, value_dim)), gate, gate, array((num_heads, key_dim)), state


def test_the_kernel_is_told_to_write_each_state_where_it_was_and_how_much_it_moves():
    b, h, k, v = 2, 3, 20, 12
    jaxpr = jax.make_jaxpr(functools.partial(pallas_tpu.forward, solver=CONVERGED))(*shapes(b, h, k, v))
    (call,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "pallas_call")
    aliases = {(call.invars[i].aval.shape, call.outvars[o].aval.shape) for i, o in call.params["input_output_aliases"]}
    assert aliases == {((b * h, k, k),) * 2, ((b * h, k, v),) * 2}
    states, vectors = b * h * k * (k + v), b * h * (3 * k + 2 * v + 2)
    assert call.params["cost_estimate"].bytes_accessed == 4 * (2 * states + vectors)


@pytest.mark.parametrize("dims", [(1, 1), (60, 33), (128, 128), (128, 256), (256, 128), (256, 256)], ids=str)
def test_programs_hold_whole_registers_of_heads_within_their_memory(dims):
    config = pallas_tpu.TpuConfig()
    key_dim, value_dim = (-(-dim // 128) * 128 for dim in dims)
    g = pallas_tpu._heads_at_once(10**6, *dims, config)
    assert g % 8 == 0 and 8 <= g <= config.side_by_side
    assert 16 * g * dims[0] * (key_dim + value_dim) + 4 * dims[0] ** 2 * 128 <= config.state_bytes
    assert pallas_tpu._heads_at_once(3, *dims, config) == 3


def test_matrices_of_large_heads_are_few_at_once():
    assert [pallas_tpu._heads_at_once(100, k, k, pallas_tpu.TpuConfig()) for k in (60, 128, 256)] == [64, 64, 8]


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("heads", "dims", "solver"),
    [
        ((16, 16), (128, 128), SolverConfig(tolerance=1e-4)),
        ((3, 7), (60, 33), SolverConfig(preconditioner="nested")),
        ((5, 20), (128, 256), SolverConfig(max_steps=0)),
        ((1, 9), (256, 256), SolverConfig()),
    ],
    ids=str,
)
def test_every_generation_compiles_the_kernel_and_copies_no_state_that_was_donated(heads, dims, solver, chip):
    compiled = compile_donated(chip, functools.partial(pallas_tpu.forward, solver=solver), shapes(*heads, *dims))
    program, memory = compiled.as_text(), compiled.memory_analysis()
    assert "mesa_step" in program
    states = [f"f32[{math.prod(heads)},{dims[0]},{dim}]" for dim in dims]
    begun = [line for line in program.splitlines() if " copy(" in line or " copy-start(" in line]
    copies = [line for line in begun if any(state in line for state in states) and "S(1)" not in line]  # S(1): on chip
    assert not copies, copies[0]
    assert memory.alias_size_in_bytes >= 4 * math.prod(heads) * dims[0] * sum(dims), "states are updated in place"


def compile_donated(chip: str, function, arguments) -> jax.stages.Compiled:
    """Compiles for one core of a chip with the last argument donated."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in chips.ENVIRONMENT.items():
            patch.setenv(name, value)
        topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
        core = jax.sharding.SingleDeviceSharding(topology.devices[0])
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=core), arguments)
        return jax.jit(function, donate_argnums=len(arguments) - 1).lower(*placed).compile()
