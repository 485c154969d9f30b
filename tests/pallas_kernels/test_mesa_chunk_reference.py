"""Rung 1: the reference against float64 truths, and closed forms that every implementation must meet."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from pullbacks import differentiate, random_cotangents
from tolerances import HUGE_RIDGE, LAW, ORACLE, assert_near

from pallas_kernels import SolverConfig, mesa_chunk
from pallas_kernels.mesa_chunk.cases import CASES, sample

SMALL = dict(batch=2, length=24, key_dim=6, value_dim=4)
DOCUMENTS = np.repeat([[0, 1, 5, 6], [2, 2, 3, 3]], 6, axis=1)


def small(name: str):
    return sample(dataclasses.replace(CASES[name], **SMALL))


@pytest.mark.parametrize("segment_ids", [None, DOCUMENTS], ids=["one_document", "packed"])
@pytest.mark.parametrize("name", CASES)
def test_reference_equals_the_oracle_in_value_and_gradient(name, segment_ids):
    inputs = small(name)
    cotangents = random_cotangents(inputs)
    found = differentiate(inputs, cotangents, segment_ids, dtype="float64", implementation="reference")
    truth = oracles.mesa(*inputs, segment_ids)
    for key, expected in zip(found.values, truth[:3], strict=True):
        assert_near(found.values[key], expected, ORACLE["float64"], key)
    for key, expected in oracles.mesa_gradients(*inputs, *cotangents, segment_ids).items():
        assert_near(found.gradients[key], expected, ORACLE["float64"], f"gradient of {key}")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_first_token_is_answered_by_the_sherman_morrison_formula(implementation):
    inputs = small("below_a_chunk")
    empty = inputs._replace(kk=0 * inputs.kk, kv=0 * inputs.kv)
    choices = dict(dtype="float64", implementation=implementation, solver=SolverConfig(tolerance=0.0))
    out = differentiate(empty, random_cotangents(inputs), **choices).values["out"]
    q, k, v, _, beta, ridge = (x[:, 0] if x.ndim > 2 else x for x in empty[:6])
    loss = beta * np.sum(k * q / ridge, -1) / (1 + beta * np.sum(k * k / ridge, -1))
    assert_near(out[:, 0], loss[..., None] * v, ORACLE["float64"])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", ["keeps_all", "all_gates"])
def test_last_token_is_answered_by_ridge_regression_on_all_before(name, implementation):
    """The objective itself, arXiv 2506.05233, eq. 8: least squares weighted by decay and strength, plus the ridge."""
    inputs = small(name)
    empty = inputs._replace(kk=0 * inputs.kk, kv=0 * inputs.kv)
    choices = dict(dtype="float64", implementation=implementation, solver=SolverConfig(tolerance=0.0))
    out = differentiate(empty, random_cotangents(inputs), **choices).values["out"]
    for b, h in np.ndindex(out.shape[0], out.shape[2]):
        total = np.cumsum(inputs.log_decay[b, :, h])
        weight = np.sqrt(np.exp(total[-1] - total) * inputs.beta[b, :, h])[:, None]
        rows = np.concatenate([weight * inputs.k[b, :, h], np.diag(np.sqrt(inputs.ridge[h]))])
        targets = np.concatenate([weight * inputs.v[b, :, h], np.zeros((len(inputs.ridge[h]), inputs.v.shape[-1]))])
        fitted = np.linalg.lstsq(rows, targets)[0]
        assert_near(out[b, -1, h], inputs.q[b, -1, h] @ fitted, ORACLE["float64"])


def linear_attention(q, k, v, log_decay, beta):
    """Gated linear attention in quadratic form, from an empty state."""
    total = jnp.cumsum(log_decay, axis=1)
    lag = jnp.moveaxis(total[:, :, None] - total[:, None, :], 3, 1)
    kept = jnp.tril(jnp.exp(jnp.minimum(lag, 0)))
    scores = jnp.einsum("bthk,bshk,bhts,bsh->bhts", q, k, kept, beta, precision="highest")
    return jnp.einsum("bhts,bshv->bthv", scores, v, precision="highest")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_huge_ridge_leaves_linear_attention_divided_by_it(implementation):
    inputs = small("below_a_chunk")
    huge = inputs._replace(ridge=np.full_like(inputs.ridge, 1e9), kk=0 * inputs.kk, kv=0 * inputs.kv)
    out = differentiate(huge, random_cotangents(inputs), dtype="float64", implementation=implementation).values["out"]
    with jax.enable_x64(True):
        expected = linear_attention(*inputs[:5])
    assert_near(1e9 * out, expected, HUGE_RIDGE)


def test_no_solver_steps_is_linear_attention_with_its_exact_gradient():
    inputs = small("below_a_chunk")
    with jax.enable_x64(True):
        sequences = [jnp.asarray(x) for x in inputs[:5]]
        dout = jnp.asarray(random_cotangents(inputs).out)
        expected, pull_expected = jax.vjp(linear_attention, *sequences)

        def zero_steps(*sequences):
            return mesa_chunk(*sequences, inputs.ridge, solver=SolverConfig(max_steps=0), implementation="xla")[0]

        actual, pull = jax.vjp(zero_steps, *sequences)
        assert_near(actual, expected, LAW["float64"])
        for name, grad, truth in zip(inputs._fields, pull(dout), pull_expected(dout), strict=False):
            assert_near(grad, truth, LAW["float64"], f"gradient of {name}")
