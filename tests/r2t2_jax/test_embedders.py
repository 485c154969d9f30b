"""Questions and pictures side by side: unit vectors whose name tells by what constants they were made."""

import dataclasses
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from r2t2_jax import embedders
from r2t2_jax.embedders import Standardised, beside

RNG = np.random.default_rng(0)
INPUTS = {"words": RNG.normal(size=(400, 3)), "pixels": RNG.normal(size=(400, 2)) * [1, 5] + [7, -3]}


def words(params, inputs):
    x = jnp.asarray(inputs["words"], jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def pixels(params, inputs):
    return jnp.asarray(inputs["pixels"], jnp.float32)


PICTURE = Standardised.measured(pixels, None, INPUTS)


def test_columns_get_mean_zero_and_spread_one():
    scaled = np.asarray(PICTURE(None, INPUTS)) * 2**0.5
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std(0), 1, rtol=1e-5)


def test_a_picture_one_spread_off_everywhere_has_length_one():
    off = {"pixels": np.add(PICTURE.center, PICTURE.spread)[None]}
    assert np.linalg.norm(PICTURE(None, off)) == pytest.approx(1, rel=1e-5)


def test_columns_that_never_change_are_not_divided_by_nothing():
    still = Standardised.measured(pixels, None, {"pixels": np.ones((5, 2))})
    np.testing.assert_array_equal(still(None, {"pixels": np.ones((1, 2))}), [[0, 0]])


def test_constants_are_measured_once_and_not_on_what_is_embedded():
    one = {name: x[:1] for name, x in INPUTS.items()}
    np.testing.assert_allclose(PICTURE(None, one), PICTURE(None, INPUTS)[:1], rtol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.5, 3.0])
def test_both_sides_together_are_unit_vectors(share):
    vectors = beside(words, PICTURE, share).embed(None, INPUTS)
    assert vectors.shape == (400, 5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


def test_the_share_is_how_much_the_picture_counts():
    alone = beside(words, PICTURE, 0).embed(None, INPUTS)
    np.testing.assert_allclose(alone[:, :3], words(None, INPUTS), rtol=1e-6)
    np.testing.assert_array_equal(alone[:, 3:], 0)
    ratio = [np.linalg.norm(v[:, 3:], axis=1) / np.linalg.norm(v[:, :3], axis=1) for v in shares(0.5, 1.0)]
    np.testing.assert_allclose(ratio[1], 2 * ratio[0], rtol=1e-5)
    np.testing.assert_allclose(ratio[1], np.linalg.norm(PICTURE(None, INPUTS), axis=1), rtol=1e-5)


def shares(*sizes):
    return [np.asarray(beside(words, PICTURE, share).embed(None, INPUTS)) for share in sizes]


def test_the_name_follows_share_and_constants_and_survives_a_file():
    name = beside(words, PICTURE, 0.5).name
    assert name.startswith("question + 0.5 picture ") and name != beside(words, PICTURE, 0.25).name
    moved = dataclasses.replace(PICTURE, center=(PICTURE.center[0] + 1e-9, *PICTURE.center[1:]))
    assert beside(words, moved, 0.5).name != name
    center, spread = json.loads(json.dumps([PICTURE.center, PICTURE.spread]))
    assert beside(words, Standardised(view=pixels, center=tuple(center), spread=tuple(spread)), 0.5).name == name


@pytest.mark.parametrize("share", [-1.0, np.nan, np.inf])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="must be finite and not negative"):
        beside(words, PICTURE, share)


def test_sentences_come_from_the_pretrained_embedder_and_inputs_carry_them(monkeypatch):
    class Pretrained:
        def __init__(self, name):
            self.name = name

        def encode(self, texts, normalize_embeddings):
            assert normalize_embeddings
            return np.eye(len(texts)) * len(self.name) / 4

    fake = types.ModuleType("sentence_transformers")
    monkeypatch.setattr(fake, "SentenceTransformer", Pretrained, raising=False)
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    vectors = embedders.sentences(["what is red?", "how many?"], model="mini")
    np.testing.assert_array_equal(vectors, np.eye(2))
    assert embedders.given("mini").embed({}, {"embedding": vectors}) is vectors


def test_without_the_extra_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"is not installed; pip install 'mesanet-jax\[embed\]' brings it"):
        embedders.sentences(["what is red?"])
