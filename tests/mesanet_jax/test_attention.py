"""Attention cut into stripes is attention, and computes little in vain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesanet_jax import MesaNetConfig
from mesanet_jax.mixers import MIXERS, attention
from tests import tolerances

STRIPES = [(37, 64), (37, 9), (64, 64), (33, 4), (5, 2), (3, 3)]
BLOCKS = [(70, 1), (70, 2), (97, 8), (128, 4), (131, 5), (203, 9)]  # windows far shorter than a stripe
LAYOUTS = STRIPES + BLOCKS


@pytest.fixture
def small_stripes(monkeypatch):
    monkeypatch.setattr(attention, "SMALLEST_STRIPE", 4)


def arrays(length: int):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 2, length, 8))
    places = jnp.arange(length, dtype=jnp.int32)
    documents = jnp.cumsum(jax.random.bernoulli(jax.random.key(1), 0.1, (2, length)), axis=1, dtype=jnp.int32)
    return q, k, v, places, documents.at[1, -2:].set(-1)


@pytest.mark.parametrize(("length", "span"), LAYOUTS)
def test_stripes_change_neither_value_nor_gradient(small_stripes, length, span):
    *qkv, places, documents = arrays(length)

    def summed(function, q, k, v):
        seen = attention._Seen(k, v, jnp.broadcast_to(places, (2, length)), documents)
        out = function(q, places, documents, seen, span)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

    found, expected = (
        jax.jit(jax.value_and_grad(lambda *x, f=f: summed(f, *x), argnums=(0, 1, 2), has_aux=True))(*qkv)
        for f in (attention.attend_in_stripes, attention.attend)
    )
    tolerances.assert_near(found[0][1], expected[0][1], tolerances.LAW["float32"], "value")
    for name, ours, theirs in zip("qkv", found[1], expected[1], strict=True):
        tolerances.assert_near(ours, theirs, tolerances.LAW["float32"], name)


@pytest.mark.parametrize(("mixer", "share"), [("attention", 0.6), ("sliding_window", 0.2)])
def test_most_of_what_is_masked_away_is_not_computed(mixer, share, monkeypatch):
    found = flops(mixer, 2048)
    monkeypatch.setattr(attention, "SMALLEST_STRIPE", 2048)
    assert found < share * flops(mixer, 2048)


def test_work_of_a_window_grows_with_the_tokens_and_not_with_their_square():
    assert flops("sliding_window", 16384) < 2.1 * flops("sliding_window", 8192)


def flops(mixer: str, length: int) -> float:
    config = MesaNetConfig(model_dim=16, num_heads=1, key_dim=16, value_dim=16, window=128, max_context=length)
    layer, x = MIXERS[mixer](config), np.zeros((1, length, 16), np.float32)
    params = layer.init(jax.random.key(0), x[:, :1], None, None)
    cost = jax.jit(lambda x: layer.apply(params, x, None, None)[0]).lower(x).compile().cost_analysis()
    assert cost is not None
    return cost["flops"]
