"""Rung 3: what must hold between calls of the operator, whatever implements it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pullbacks import Cotangents, differentiate, random_cotangents
from tolerances import CHUNKWISE, LAW, assert_near

from pallas_kernels import MesaState, SolverConfig, mesa_chunk, mesa_step
from pallas_kernels.mesa_chunk import xla
from pallas_kernels.mesa_chunk.cases import CASES, Case, Inputs, sample
from pallas_kernels.mesa_chunk.contract import LOWEST_LOG_DECAY

SMALL = Case(source="crosses the boundary of a chunk of 64", batch=2, length=67, key_dim=6, value_dim=5)
CONVERGED = SolverConfig(max_steps=20, tolerance=0.0)
IMPLEMENTATIONS = ["reference", "xla"]
ONE_OR_TWO = np.repeat([[0, 1], [0, 0]], [40, 27], axis=1)  # documents in the two rows of SMALL
SEQUENCES = ("q", "k", "v", "log_decay", "beta")


def pull(function, inputs: Inputs, cotangents: Cotangents) -> tuple:
    """Returns (out, kk, kv) of function(*inputs) and its gradients, float64."""
    with jax.enable_x64(True):
        values, pullback = jax.vjp(jax.jit(function), *map(jnp.asarray, inputs))
        return jax.device_get((values, pullback(tuple(map(jnp.asarray, cotangents)))))


def assert_same(actual: tuple, expected: tuple, tolerance: float = LAW["float64"]) -> None:
    values, gradients = actual
    for name, value, truth in zip(("out", "kk", "kv"), values, expected[0], strict=True):
        assert_near(value, truth, tolerance, name)
    for name, gradient, truth in zip(Inputs._fields, gradients, expected[1], strict=True):
        assert_near(gradient, truth, tolerance, f"gradient of {name}")


def whole(*arrays, implementation="xla"):
    *arguments, kk, kv = arrays
    out, state = mesa_chunk(*arguments, MesaState(kk, kv), solver=CONVERGED, implementation=implementation)
    return out, *state


@pytest.mark.parametrize("cuts", [(64,), (1, 3)], ids=str)
def test_state_carried_between_calls_equals_one_call(cuts):
    inputs = sample(SMALL)
    cotangents = random_cotangents(inputs)

    def in_pieces(q, k, v, log_decay, beta, ridge, kk, kv):
        state, outs = MesaState(kk, kv), []
        for start, end in zip((0, *cuts), (*cuts, q.shape[1]), strict=True):
            piece = (x[:, start:end] for x in (q, k, v, log_decay, beta))
            out, state = mesa_chunk(*piece, ridge, state, solver=CONVERGED, implementation="xla")
            outs.append(out)
        return jnp.concatenate(outs, axis=1), *state

    assert_same(pull(in_pieces, inputs, cotangents), pull(whole, inputs, cotangents))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_token_steps_equal_one_call(implementation):
    inputs = sample(SMALL)
    cotangents = random_cotangents(inputs)

    def in_steps(q, k, v, log_decay, beta, ridge, kk, kv):
        def token(state, x):
            out, state = mesa_step(*x, ridge, state, solver=CONVERGED, implementation=implementation)
            return state, out

        by_time = [jnp.moveaxis(x, 1, 0) for x in (q, k, v, log_decay, beta)]
        state, out = jax.lax.scan(token, MesaState(kk, kv), by_time)
        return jnp.moveaxis(out, 0, 1), *state

    assert_same(pull(in_steps, inputs, cotangents), pull(whole, inputs, cotangents))


@pytest.mark.parametrize("chunk_length", [1, 7, 128])
def test_chunk_length_changes_no_answer(chunk_length):
    inputs = sample(dataclasses.replace(SMALL, decay=(0.1, 1.0)))
    dout, *dstate = random_cotangents(inputs)
    starts = np.zeros((2, 67), np.int32)
    starts[0, [5, 60, 64]] = starts[1, 33] = 1

    @functools.partial(jax.jit, static_argnums=0)
    def run(config, q, k, v, log_decay, beta, ridge, kk, kv):
        arguments = (k, v, log_decay, beta, ridge, MesaState(kk, kv), starts)
        out, state, x, _, factors = xla.forward(q, *arguments, solver=CONVERGED, config=config)
        *grads, before = xla.backward(arguments, x, factors, dout, MesaState(*dstate), solver=CONVERGED, config=config)
        return (out, *state), (*grads, *before)

    with jax.enable_x64(True):
        assert_same(run(xla.XlaConfig(chunk_length), *inputs), run(xla.XlaConfig(64), *inputs))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_output_depends_on_its_own_and_earlier_tokens_and_on_no_later_one(implementation):
    """The derivative proves it: outputs are analytic in the inputs, so where a dependence exists its derivative at a
    random point is not zero, however small the effect is; and it is exactly zero only where nothing was multiplied in.
    """
    inputs = sample(SMALL)
    positions = np.array([0, 1, 63, 64, 66])
    douts = np.zeros((len(positions), *inputs.v.shape))
    douts[np.arange(len(positions)), :, positions] = random_cotangents(inputs).out[:, positions].swapaxes(0, 1)
    with jax.enable_x64(True):
        operator = functools.partial(whole, implementation=implementation)
        _, pullback = jax.vjp(lambda *x: operator(*x)[0], *map(jnp.asarray, inputs))
        gradients = jax.device_get(jax.jit(jax.vmap(pullback))(jnp.asarray(douts)))
    for name, gradient in zip(SEQUENCES, gradients, strict=False):
        moved = np.any(gradient.reshape(*gradient.shape[:4], -1) != 0, axis=-1)  # [p, b, t, h]
        for moved_at, position in zip(moved, positions, strict=True):
            assert not moved_at[:, position + 1 :].any(), f"{name} after {position} moves the output there"
            seen = moved_at[:, position] if name == "q" else moved_at[:, : position + 1]
            assert seen.all(), f"{name} at or before {position} does not move the output there"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_heads_and_batch_entries_permute(implementation):
    inputs = sample(SMALL)
    cotangents = random_cotangents(inputs)
    run = functools.partial(differentiate, dtype="float64", implementation=implementation, solver=CONVERGED)
    plain = run(inputs, cotangents, ONE_OR_TWO)
    turned_inputs = Inputs(*(_turn(name, x) for name, x in inputs._asdict().items()))
    turned_cotangents = Cotangents(*(_turn(name, x) for name, x in cotangents._asdict().items()))
    turned = run(turned_inputs, turned_cotangents, ONE_OR_TWO[::-1])
    for name, value in plain.values.items():
        assert_near(turned.values[name], _turn(name.removeprefix("final_"), value), LAW["float64"], name)
    for name, gradient in plain.gradients.items():
        assert_near(turned.gradients[name], _turn(name, gradient), LAW["float64"], f"gradient of {name}")


def _turn(name: str, x: np.ndarray) -> np.ndarray:
    """Reverses batch and heads."""
    if name == "ridge":
        return x[::-1]
    return x[::-1, ::-1] if name in ("kk", "kv") else x[::-1, :, ::-1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_documents_equal_separate_documents(implementation):
    inputs = sample(SMALL)
    cotangents = random_cotangents(inputs)
    lengths = [(30, 7, 30), (7, 30, 30)]
    segment_ids = np.stack([np.repeat([3, 4, 9], row) for row in lengths])
    packed = differentiate(
        inputs, cotangents, segment_ids, dtype="float64", implementation=implementation, solver=CONVERGED
    )
    expected_ridge = np.zeros_like(inputs.ridge)
    for row, ends in enumerate(np.cumsum(lengths, axis=1)):
        for number, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
            place = (slice(row, row + 1), slice(start, end))
            is_first, is_last = number == 0, number == 2
            alone = differentiate(
                Inputs(
                    *(x[place] for x in inputs[:5]), inputs.ridge, *(is_first * x[row : row + 1] for x in inputs[6:])
                ),
                Cotangents(cotangents.out[place], *(is_last * x[row : row + 1] for x in cotangents[1:])),
                dtype="float64",
                implementation=implementation,
                solver=CONVERGED,
            )
            assert_near(packed.values["out"][place], alone.values["out"], LAW["float64"], "out")
            expected_ridge += alone.gradients["ridge"]
            for name in SEQUENCES:
                expected = alone.gradients[name]
                if name == "log_decay" and not is_first:
                    # alone it fades an empty state, packed it would fade the document before: it acts on nothing
                    assert not packed.gradients[name][place][:, 0].any()
                    expected = np.concatenate([0 * expected[:, :1], expected[:, 1:]], axis=1)
                assert_near(packed.gradients[name][place], expected, LAW["float64"], f"gradient of {name}")
            for name in ("kk", "kv"):
                if is_first:
                    assert_near(packed.gradients[name][row], alone.gradients[name][0], LAW["float64"], f"d{name}")
                if is_last:
                    final = f"final_{name}"
                    assert_near(packed.values[final][row], alone.values[final][0], LAW["float64"], final)
    assert_near(packed.gradients["ridge"], expected_ridge, LAW["float64"], "gradient of ridge")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("place", ["front", "middle", "end"])
def test_padding_holds_nan_and_nothing_of_it_leaks(place, implementation):
    inputs = sample(SMALL)
    cotangents = random_cotangents(inputs)
    run = functools.partial(differentiate, dtype="float64", implementation=implementation, solver=CONVERGED)
    at = {"front": 0, "middle": 40, "end": 67}[place]
    insert = functools.partial(np.insert, obj=[at] * 5, axis=1)
    poisoned = Inputs(*(insert(x, values=np.nan) for x in inputs[:5]), *inputs[5:])
    padded = run(
        poisoned, Cotangents(insert(cotangents.out, values=7.0), *cotangents[1:]), insert(ONE_OR_TWO, values=-1)
    )
    plain = run(inputs, cotangents, ONE_OR_TWO)
    for name, value in plain.values.items():
        found = padded.values[name]
        if name == "out":
            assert not found[:, at : at + 5].any(), "padding has an output"
            found = np.delete(found, np.s_[at : at + 5], axis=1)
        assert_near(found, value, LAW["float64"], name)
    for name, gradient in plain.gradients.items():
        found = padded.gradients[name]
        if name in SEQUENCES:
            assert not found[:, at : at + 5].any(), f"padding has a gradient in {name}"
            found = np.delete(found, np.s_[at : at + 5], axis=1)
        assert_near(found, gradient, LAW["float64"], f"gradient of {name}")


def test_a_gate_of_zero_equals_the_start_of_a_document():
    inputs = sample(SMALL)
    reset = inputs._replace(log_decay=inputs.log_decay.copy())
    reset.log_decay[:, 40] = -np.inf
    cotangents = random_cotangents(inputs)
    run = functools.partial(differentiate, dtype="float64", implementation="xla", solver=CONVERGED)
    gated = run(reset, cotangents, 0 * ONE_OR_TWO)
    packed = run(inputs, cotangents, np.repeat([[0, 1], [0, 1]], [40, 27], axis=1))
    for name, value in packed.values.items():
        assert_near(gated.values[name], value, LAW["float64"], name)
    for name, gradient in packed.gradients.items():
        assert_near(gated.gradients[name], gradient, LAW["float64"], f"gradient of {name}")


gates = st.sampled_from([-np.inf, 2 * LOWEST_LOG_DECAY, np.log(0.01), -0.5, -1e-4, 0.0])


@settings(max_examples=25)
@given(
    st.data(),
    st.sampled_from([(1, 3, 2), (5, 1, 1), (66, 2, 3)]),
    st.sampled_from([0.0, 1e-3, 1.0]),
)
def test_any_gates_strengths_and_documents_give_the_reference(data, shape, cotangent_scale):
    length, key_dim, value_dim = shape
    inputs = sample(Case(source="hypothesis", length=length, num_heads=1, key_dim=key_dim, value_dim=value_dim))
    tokens = (1, length, 1)
    log_decay = data.draw(arrays.arrays(np.float64, tokens, elements=gates), "log_decay")
    beta = data.draw(arrays.arrays(np.float64, tokens, elements=st.sampled_from([0.0, 1e-3, 0.5, 1.0])), "beta")
    steps = data.draw(arrays.arrays(np.int32, (1, length), elements=st.sampled_from([0, 0, 0, 1, 3])), "steps of ids")
    padding = data.draw(arrays.arrays(bool, (1, length), elements=st.sampled_from([False, False, True])), "padding")
    inputs = inputs._replace(log_decay=log_decay, beta=beta)
    segment_ids = np.where(padding, -1, np.cumsum(steps, axis=1)).astype(np.int32)
    cotangents = random_cotangents(inputs).scaled(cotangent_scale)
    run = functools.partial(differentiate, inputs, cotangents, segment_ids, dtype="float64", solver=CONVERGED)
    actual, expected = run(implementation="xla"), run(implementation="reference")
    for found, truth in zip(actual, expected, strict=True):
        for name, value in truth.items():
            assert_near(found[name], value, 5 * CHUNKWISE["float64"], name)


def test_every_case_names_its_source():
    assert all(case.source for case in CASES.values())
