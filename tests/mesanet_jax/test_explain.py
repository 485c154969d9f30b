"""The weights of an explanation are those that the values had: put together again they make the layer's output."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesanet_jax import MesaNet, MesaNetConfig, SolverConfig
from mesanet_jax.explain import explain, systems
from tests import oracles, tolerances

CONFIG = MesaNetConfig(
    vocab_size=23,
    num_layers=4,
    model_dim=16,
    num_heads=2,
    key_dim=6,
    value_dim=6,
    pattern=("sliding_window", "mesa"),
    window=5,
    solver=SolverConfig(max_steps=20, tolerance=0.0),
)
TOKENS = jax.random.randint(jax.random.key(1), (2, 70), 0, 23)


@pytest.fixture(scope="module")
def explained():
    model = MesaNet(CONFIG)
    params = nn.unbox(model.init(jax.random.key(0), TOKENS))
    _, watched = model.apply(params, TOKENS, mutable=["solves"], capture_intermediates=True)
    return model, params, explain(model, params, TOKENS), watched


def test_an_explanation_is_of_the_models_own_predictions(explained):
    model, params, found, _ = explained
    np.testing.assert_array_equal(found.logits, model.apply(params, TOKENS)[0])
    assert found.report.num_steps.shape == (2, 2, 70, 2)
    assert found.weights.shape == (2, 2, 2, 70, 70)


def test_weights_are_what_dense_solves_give_and_look_only_back(explained):
    _, _, found, watched = explained
    inputs = watched["solves"]["layers"]["mesa_1"]["mixer"]["inputs"][0]
    for layer in range(2):
        q, k, log_decay, beta, ridge = (np.asarray(x[layer], np.float64) for x in inputs)
        zeros = np.zeros((2, 2, 6, 6))
        truth = oracles.mesa(q, k, np.zeros_like(q), log_decay, beta, ridge, zeros, zeros)
        total = np.cumsum(log_decay, axis=1)
        decay = np.exp(total[:, :, None] - total[:, None])  # [b, t, s, h]
        expected = np.einsum("btsh,bsh,bshk,bthk->bhts", decay, beta, k, truth.solution) * np.tri(70)
        tolerances.assert_near(found.weights[layer], expected, tolerances.CHUNKWISE["float32"])
        assert (np.triu(np.asarray(found.weights[layer]), 1) == 0).all()


def test_values_times_weights_are_the_output_of_the_layer(explained):
    _, params, found, watched = explained
    mixer = jax.tree.map(lambda x: x[0], params["params"]["layers"]["mesa_1"]["mixer"])
    seen = watched["intermediates"]["layers"]["mesa_1"]
    x = seen["mixer_norm"]["__call__"][0][0]
    values = jnp.einsum("btd,dhv->bthv", x, mixer["value"]["kernel"])
    out = jnp.einsum("bhts,bshv->bthv", found.weights[0], values)
    out = out * jax.lax.rsqrt(jnp.mean(out**2, axis=-1, keepdims=True) + CONFIG.norm_eps) * mixer["out_norm"]["scale"]
    expected = seen["mixer"]["__call__"][0][0][0]
    tolerances.assert_near(
        jnp.einsum("bthv,hvd->btd", out, mixer["out"]["kernel"]), expected, tolerances.MODEL["float32"]
    )


def test_without_a_solve_weights_are_those_of_linear_attention(explained):
    model, params, found, _ = explained
    plain = MesaNet(dataclasses.replace(CONFIG, solver=SolverConfig(max_steps=0)))
    weights = explain(plain, params, TOKENS).weights[0]
    _, watched = model.apply(params, TOKENS, mutable=["solves"])
    q, k, log_decay, beta, _ = (x[0] for x in watched["solves"]["layers"]["mesa_1"]["mixer"]["inputs"][0])
    total = jnp.cumsum(log_decay, axis=1)
    expected = jnp.exp(total[:, :, None] - total[:, None]) * beta[:, None] * jnp.einsum("bthk,bshk->btsh", q, k)
    expected = jnp.moveaxis(expected, 3, 1) * np.tri(70)
    tolerances.assert_near(weights, expected, tolerances.CHUNKWISE["float32"])
    assert not np.allclose(weights, found.weights[0], atol=1e-3)


def test_a_model_without_mesa_layers_has_nothing_to_explain():
    model = MesaNet(dataclasses.replace(CONFIG, pattern=("gla",)))
    params = model.init(jax.random.key(0), TOKENS)
    with pytest.raises(ValueError, match=r"pattern=\('gla',\) has no mesa layer; take a model that has one"):
        explain(model, params, TOKENS)


def test_condition_numbers_are_those_of_the_systems_summed_one_by_one(explained):
    model, params, _, watched = explained
    places = (0, 9, 69)
    found = systems(model, params, TOKENS, places)
    inputs = watched["solves"]["layers"]["mesa_1"]["mixer"]["inputs"][0]
    np.testing.assert_allclose(found.log_decay, inputs.log_decay, rtol=1e-6)
    for layer, batch, head in np.ndindex(2, 2, 2):
        k, log_decay, beta = (
            np.asarray(x[layer, batch, :, head], np.float64) for x in (inputs.k, inputs.log_decay, inputs.beta)
        )
        gram = np.zeros((6, 6))
        for t in range(70):
            gram = np.exp(log_decay[t]) * gram + beta[t] * np.outer(k[t], k[t])
            if t in places:
                expected = np.linalg.cond(gram + np.diag(np.asarray(inputs.ridge[layer, head], np.float64)))
                actual = found.condition[layer, batch, places.index(t), head]
                np.testing.assert_allclose(actual, expected, rtol=tolerances.CONDITION)


@pytest.mark.parametrize(("pattern", "place", "words"), [(("mesa",), 70, "places"), (("gla",), 3, "no mesa layer")])
def test_systems_that_are_not_there_are_refused(pattern, place, words):
    model = MesaNet(dataclasses.replace(CONFIG, pattern=pattern))
    params = model.init(jax.random.key(0), TOKENS)
    with pytest.raises(ValueError, match=words):
        systems(model, nn.unbox(params), TOKENS, [place])
