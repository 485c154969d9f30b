"""Padding may stand anywhere, also where a sequence is cut and its state carried over."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesanet_jax import MesaNetConfig, SolverConfig
from mesanet_jax.documents import first_document, last_document
from mesanet_jax.mixers import MIXERS
from tests import tolerances

CONFIG = MesaNetConfig(
    model_dim=16, num_heads=2, key_dim=8, value_dim=8, window=5, max_context=16, solver=SolverConfig(tolerance=0.0)
)
CALLS = {
    "begins with padding": [(0, 0, 0), (-1, 0)],
    "ends with padding": [(0, 0, -1), (0, 0)],
    "is padding alone": [(0, 0, 0), (-1, -2), (0, 0, 1)],
    "is a token of padding": [(0, 0, 0), (-1,), (0,), (0, 1)],
    "has another document after padding": [(2, 2, 3), (-1, 3, 4), (-1, -1, 4)],
}


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_call_that_begins_or_ends_with_padding_carries_on(mixer):
    layer = MIXERS[mixer](CONFIG)
    x = jax.random.normal(jax.random.key(0), (1, 9, CONFIG.model_dim))
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(1), x[:, :1], None, None))
    apply = jax.jit(layer.apply)
    for name, calls in CALLS.items():
        whole, state, done, found = jnp.array([sum(calls, ())]), None, 0, []
        for ids in calls:
            y, state = apply(params, x[:, done : done + len(ids)], state, jnp.array([ids]))
            found.append(y)
            done += len(ids)
        expected, _ = apply(params, x[:, :done], None, whole)
        real = np.asarray(whole[0]) >= 0
        joined = jnp.concatenate(found, axis=1)[:, real]
        tolerances.assert_near(joined, expected[:, real], tolerances.MODEL["float32"], name)


def test_a_call_begins_and_ends_with_the_documents_of_tokens_that_are_no_padding():
    ids = jnp.array([[-1, 3, 3, 4], [2, -1, 2, -1], [-1, -1, -2, -1]])
    np.testing.assert_array_equal(first_document(ids), [[3], [2], [0]])
    np.testing.assert_array_equal(last_document(ids), [[4], [2], [-1]])
