"""Chunks change nothing: every recurrence equals its definition, token by token, in value, state and gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesanet_jax.recurrences import CHUNK, delta_rule, gated_sum, linear_attention
from tests import tolerances

LENGTHS = (1, 63, 2 * CHUNK + 5)


def steps(q, k, v, log_decay, beta, state, *, corrects: bool):
    """The definition, one document after the other token; shares no code with what is tested."""

    def step(state, token):
        q, k, v, log_decay, beta = token
        state = jnp.exp(log_decay)[..., None, None] * state
        known = jnp.einsum("bhk,bhkv->bhv", k, state) if corrects else 0
        state += jnp.einsum("bh,bhk,bhv->bhkv", beta, k, v - known)
        return state, jnp.einsum("bhk,bhkv->bhv", q, state)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, log_decay, beta))
    state, out = jax.lax.scan(step, state, tokens)
    return jnp.moveaxis(out, 0, 1), state


RULES = {"linear attention": (linear_attention, False), "delta rule": (delta_rule, True)}


def draw(length: int, *, gates=(0.5, 1.0), batch: int = 2) -> list[jax.Array]:
    """Queries, keys of length 1, values, log gates, strengths and a state, in float64."""
    rng = np.random.default_rng(length)
    shape = (batch, length, 3)
    q, k, v = (rng.normal(size=(*shape, size)) for size in (5, 5, 4))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    log_decay, beta = np.log(rng.uniform(*gates, shape)), rng.uniform(size=shape)
    return [jnp.asarray(x) for x in (q, k, v, log_decay, beta, rng.normal(size=(batch, 3, 5, 4)))]


def pulled(function, arrays):
    """Values and gradients for random cotangents."""
    values, pullback = jax.vjp(jax.jit(function), *arrays)
    rng = np.random.default_rng(0)
    return [*values, *pullback(jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), values))]


def assert_same(found, expected, tolerance=tolerances.RECURRENCE["float64"]):
    names = ["out", "state", "dq", "dk", "dv", "dlog_decay", "dbeta", "dstate"]
    for x, truth, name in zip(found, expected, names, strict=True):
        tolerances.assert_near(x, truth, tolerance, name)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("gates", [(0.5, 1.0), (0.999, 1.0), (0.001, 0.1)], ids=str)
def test_chunks_equal_the_definition_in_value_state_and_gradient(rule, length, gates):
    chunked, corrects = RULES[rule]
    with jax.enable_x64(True):
        arrays = draw(length, gates=gates)
        expected = pulled(lambda *xs: steps(*xs, corrects=corrects), arrays)
        assert_same(pulled(chunked, arrays), expected)


@pytest.mark.parametrize("rule", RULES)
def test_packed_documents_equal_separate_ones_and_padding_is_passed_through(rule):
    chunked, corrects = RULES[rule]
    cuts = (0, 3, 70, 71, 150)
    ids = np.repeat([0, 1, 2, 5], np.diff(cuts))
    padding = np.isin(np.arange(150), [1, 2, 75, 76, 149])

    def alone(*xs):
        *sequences, state = xs
        pieces = []
        for number, (start, end) in enumerate(itertools.pairwise(cuts)):
            kept = np.flatnonzero(~padding[start:end]) + start
            state = state if number == 0 else jnp.zeros_like(state)
            out, state = steps(*(x[:, kept] for x in sequences), state, corrects=corrects)
            pieces.append(out)
        whole = jnp.zeros((1, 150, 3, 4)).at[:, ~padding].set(jnp.concatenate(pieces, axis=1))
        return whole, state

    with jax.enable_x64(True):
        arrays = draw(150, batch=1)
        segment_ids = jnp.where(padding, -1, ids)[None]
        expected = pulled(alone, arrays)
        poisoned = [jnp.where(padding.reshape(1, -1, *[1] * (x.ndim - 2)), jnp.nan, x) for x in arrays[:5]]
        assert_same(pulled(lambda *xs: chunked(*xs, segment_ids), [*poisoned, arrays[5]]), expected)


@pytest.mark.parametrize("rule", RULES)
def test_float32_and_bfloat16_stay_near_float64(rule):
    chunked, corrects = RULES[rule]
    with jax.enable_x64(True):
        arrays = draw(2 * CHUNK + 5)
        expected, _ = steps(*arrays, corrects=corrects)
    for dtype in ("float32", "bfloat16"):
        q, k, v, *rest = (x.astype(jnp.float32) for x in arrays)
        out, state = chunked(*(x.astype(dtype) for x in (q, k, v)), *rest)
        assert (out.dtype, state.dtype) == (dtype, jnp.float32)
        tolerances.assert_near(out, expected, tolerances.RECURRENCE[dtype], dtype)


def test_a_gate_that_is_shut_forgets_all_and_leaves_no_nan():
    q, k, v, log_decay, beta, state = (jnp.float32(x) for x in draw(80))
    log_decay = log_decay.at[:, 7].set(-jnp.inf)
    for chunked, corrects in RULES.values():
        found = pulled(chunked, (q, k, v, log_decay, beta, state))
        assert all(jnp.isfinite(x).all() for x in found)
        later, _ = steps(*(x[:, 7:] for x in (q, k, v, log_decay, beta)), jnp.zeros_like(state), corrects=corrects)
        tolerances.assert_near(found[0][:, 7:], later, tolerances.RECURRENCE["float32"])


def test_channels_are_summed_as_defined_in_documents_and_across_calls():
    rng = np.random.default_rng(0)
    x, decay, state = rng.normal(size=(2, 90, 3)), rng.uniform(0.2, 1, size=(2, 90, 3)), rng.normal(size=(2, 3))
    ids = np.repeat([[0, -1, 0, 4, -1], [1, 2, -1, 2, 2]], [4, 3, 50, 30, 3], axis=1)
    expected, h = np.zeros_like(x), state.copy()
    for t in range(90):
        for row in range(2):
            before = ids[row, :t][ids[row, :t] >= 0]
            if ids[row, t] >= 0:
                kept = 0 if len(before) and before[-1] != ids[row, t] else h[row]
                h[row] = decay[row, t] * kept + x[row, t]
        expected[:, t] = h
    poisoned = np.where((ids < 0)[..., None], np.nan, x)
    with jax.enable_x64(True):
        found, last = gated_sum(*map(jnp.asarray, (poisoned, np.log(decay), state, ids)))
        first, middle = gated_sum(*map(jnp.asarray, (x[:, :40], np.log(decay[:, :40]), state)))
        second, end = gated_sum(jnp.asarray(x[:, 40:]), jnp.log(decay[:, 40:]), middle)
        whole, _ = gated_sum(*map(jnp.asarray, (x, np.log(decay), state)))
    tolerances.assert_near(found, expected, tolerances.LAW["float64"])
    tolerances.assert_near(last, h, tolerances.LAW["float64"])
    tolerances.assert_near(jnp.concatenate([first, second], axis=1), whole, tolerances.LAW["float64"])
    tolerances.assert_near(end, whole[:, -1], tolerances.LAW["float64"])


def test_no_row_by_row_solve_is_left_to_the_library():
    """Two batched ones at a time wait for each other for ever on two cores: a training run hung."""
    x = jnp.ones((1, 64, 1, 4))
    gates = jnp.zeros((1, 64, 1))
    traced = jax.make_jaxpr(jax.grad(lambda x: delta_rule(x, x, x, gates, gates, None)[0].sum()))(x)
    assert "dot_general" in str(traced) and "triangular_solve" not in str(traced)
