"""How a frozen model fills a reference set, and which sets it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2t2_jax import reference_build
from r2t2_jax.models.contract import FrozenModel
from r2t2_jax.reference_build import build
from r2t2_jax.shapes import Readout
from tests import tolerances
from tests.r2t2_jax.made_up import ANSWERS, EXPERTS, GROUPS, reference_set
from tests.tolerances import assert_near

GOOD = reference_set()


@functools.cache
def model_and_params():
    """Five linear experts on a vector, and a router of two groups."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "router": jax.random.normal(keys[0], (6, 5)),
        "experts": jax.random.normal(keys[1], (5, 6, 4)),
        "offset": jax.random.normal(keys[2], (4,)),
    }

    def router(params, inputs):
        logits = inputs["x"] @ params["router"]
        return jnp.concatenate([jax.nn.softmax(logits[:, :2]), jax.nn.softmax(logits[:, 2:])], 1)

    def readout(params, inputs):
        weight = jnp.einsum("bx,exy->bey", inputs["x"], params["experts"])
        return Readout(weight, jnp.broadcast_to(params["offset"], (len(weight), 4)))

    model = FrozenModel(
        forward=lambda params, inputs, routing: readout(params, inputs)(routing),
        router=router,
        embed=lambda params, inputs: inputs["x"] / jnp.linalg.norm(inputs["x"], axis=1, keepdims=True),
        features=lambda params, inputs: inputs["x"][:, :2],
        readout=readout,
        groups=GROUPS,
        experts=EXPERTS,
        answers=ANSWERS,
    )
    return model, params


def examples(count=11):
    rng = np.random.default_rng(3)
    inputs = {"x": rng.normal(size=(count, 6)).astype(np.float32)}
    ids, sources = [f"e{i}" for i in range(count)], [f"image{i // 2}" for i in range(count)]
    return inputs, rng.integers(0, 4, count), ids, sources


def test_build_records_what_the_frozen_model_does_with_each_example():
    model, params = model_and_params()
    inputs, labels, ids, sources = examples()
    references = build(model, params, inputs, labels, ids, sources, time=3, batch_size=4)
    routing = model.router(params, inputs)
    answers = model.forward(params, inputs, routing).argmax(-1)
    assert_near(references.routing, routing, tolerances.OTHER_BATCH)
    assert_near(references.embedding, model.embed(params, inputs), tolerances.OTHER_BATCH)
    np.testing.assert_array_equal(references.features, inputs["x"][:, :2])
    np.testing.assert_array_equal(references.correct, answers == labels)
    np.testing.assert_array_equal(references.readout(references.routing).argmax(-1), answers)
    assert references.ids.tolist() == ids and references.time.tolist() == [3] * 11 and not references.inputs
    references.check_model(model, references.model)


def test_build_compiles_one_program_whatever_the_number_of_examples():
    model, params = model_and_params()
    calls = []
    counted = dataclasses.replace(model, features=lambda p, x: calls.append(x["x"].shape) or model.features(p, x))
    build(counted, params, *examples(), batch_size=4)
    assert calls == [(4, 6)]


def test_build_keeps_only_right_answers_and_the_examples_if_asked_to():
    model, params = model_and_params()
    inputs, *names = examples()
    references = build(model, params, inputs, *names, keep="correct", store_inputs=True)
    everything = build(model, params, inputs, *names)
    assert references.fingerprint == everything.correct_only().fingerprint
    np.testing.assert_array_equal(references.inputs["x"], inputs["x"][everything.correct])


def test_build_takes_a_linearisation_and_another_embedding():
    model, params = model_and_params()
    no_readout = dataclasses.replace(model, readout=None)
    references = build(
        no_readout,
        params,
        *examples(),
        readout=lambda p, x, routing: Readout(*model.readout(p, x)._replace(offset=routing[:, :4])),
        embed=lambda p, x: jnp.eye(3)[jnp.zeros(len(x["x"]), int)],
        embedder="always the same",
    )
    np.testing.assert_array_equal(references.readout.offset, references.routing[:, :4])
    assert references.embedding.shape == (11, 3) and references.embedder == "always the same"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [4] * 11}, "labels of .* is not an index"),
        ({"ids": ["a"] * 11}, "occurs more than once"),
        ({"time": [1, 2]}, r"time has shape \(2,\); pass one number, or 11"),
        ({"inputs": {"x": np.zeros((10, 6))}}, r"inputs have an array of shape \(10, 6\); with 11 ids"),
        ({"keep": "wrong"}, "keep='wrong'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"embed": lambda p, x: x["x"]}, "embedder must name"),
        ({"model": dataclasses.replace(model_and_params()[0], readout=None)}, "readout is needed"),
    ],
    ids=lambda x: x if isinstance(x, str) else ",".join(x),
)
def test_build_refuses_bad_input_before_the_model_runs(change, message, monkeypatch):
    monkeypatch.setattr(reference_build, "_look", None)
    model, params = model_and_params()
    inputs, labels, ids, sources = examples()
    given = {"model": model, "inputs": inputs, "labels": labels, "ids": ids, "sources": sources} | change
    with pytest.raises(ValueError, match=message):
        build(given.pop("model"), params, **given)


def test_build_stores_inputs_only_from_a_dict_of_arrays():
    model, params = model_and_params()
    inputs, *names = examples()
    with pytest.raises(TypeError, match="store_inputs needs inputs that are a dict"):
        build(model, params, [inputs["x"]], *names, store_inputs=True)


def test_a_model_that_gives_nan_is_named_by_the_example():
    model, params = model_and_params()
    inputs, *names = examples()
    inputs["x"][4] = np.nan
    with pytest.raises(ValueError, match="'e4' is not finite"):
        build(model, params, inputs, *names)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"experts": tuple("abcde")}, "experts"), ({"groups": (5,)}, "groups"), ({"answers": tuple("abcd")}, "answers")],
)
def test_the_set_of_another_model_is_refused(change, field):
    model, _ = model_and_params()
    with pytest.raises(ValueError, match=f"{field} is .* this is the reference set of another model"):
        GOOD.check_model(dataclasses.replace(model, **change), GOOD.model)
    with pytest.raises(ValueError, match=r"model is 'mmm.*, but 'other' for the frozen model"):
        GOOD.check_model(model, "other")
