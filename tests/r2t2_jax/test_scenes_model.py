"""The scenes models keep the contract: routing in, logits out, and what is cached says the same as what is computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2t2_jax.models.scenes import (
    ANSWERS,
    COLORS,
    NO_COLOR,
    NO_SHAPE,
    SHAPES,
    TEMPLATES,
    ScenesConfig,
    ScenesModel,
    frozen,
    picture_statistics,
    question_text,
)
from r2t2_jax.models.scenes.experts import EXPERTS, encode_question
from r2t2_jax.models.scenes.model import GROUPS, see
from tests import tolerances
from tests.tolerances import assert_near

BATCH = 4
KINDS = list(GROUPS)
each_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    image = rng.integers(256, size=(BATCH, 32, 32, 3)).astype(np.uint8)
    question = np.stack([rng.integers(n, size=BATCH) for n in (len(TEMPLATES), len(SHAPES) + 1, len(COLORS) + 1)], 1)
    return {"image": image, "question": question.astype(np.int32)}


@functools.cache
def params(kind):
    """Drawn by hand: compiling what Flax draws them with takes longer than all tests together."""
    shapes = jax.eval_shape(ScenesModel(ScenesConfig(readout=kind, width=16)).init, jax.random.key(0), inputs())
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * fan_in(x.shape) ** -0.5, jnp.float32), shapes)


def fan_in(shape):
    return max(np.prod(shape[:-1]), 4)


@functools.cache
def model(kind):
    return frozen(ScenesConfig(readout=kind, width=16))


@functools.cache
def compiled(kind):
    """All that the contract offers, and the module's own answers, as one program."""
    module, contract = ScenesModel(ScenesConfig(readout=kind, width=16)), model(kind)

    def see_all(params, inputs, routing):
        return {
            "forward": contract.forward(params, inputs, routing),
            "router": contract.router(params, inputs),
            "embed": contract.embed(params, inputs),
            "features": contract.features(params, inputs),
            "readout": contract.readout(params, inputs) if contract.readout else None,
            "own": module.apply(params, inputs),
            "as trained": module.apply(params, inputs, method=ungated) if kind == "deep" else None,
        }

    return jax.jit(see_all)


def ungated(module, inputs):
    """The deep model's answer while its gates learn: without a routing."""
    return module.deep(*see(inputs), module.consult(inputs)[0], None)


def run(kind, what, routing=None, given=None):
    routing = some_routing(kind) if routing is None else routing
    return compiled(kind)(given or params(kind), inputs(), routing)[what]


def some_routing(kind, seed=1):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.dirichlet(np.ones(n), BATCH) for n in GROUPS[kind]], 1).astype(np.float32)


@each_kind
def test_the_contract_names_everything(kind):
    contract = model(kind)
    assert contract.groups == GROUPS[kind] and sum(contract.groups) == len(contract.experts) == len(EXPERTS) == 6
    assert contract.answers == ANSWERS and len(ANSWERS) == 21
    assert (contract.readout is None) == (kind == "deep")
    assert run(kind, "forward", some_routing(kind)).shape == (BATCH, 21)
    embedding = run(kind, "embed")
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, rtol=1e-6)
    features = run(kind, "features")
    assert features.shape == (BATCH, embedding.shape[1] + 10 + 6 + 6 * 16) and np.isfinite(features).all()


@each_kind
def test_the_routers_routing_gives_the_models_own_answer(kind):
    routing = run(kind, "router")
    assert_near(run(kind, "forward", routing), run(kind, "own"), tolerances.LAW["float32"], kind)


@each_kind
def test_the_router_gives_each_group_weights_of_sum_one(kind):
    routing = run(kind, "router")
    assert routing.shape == (BATCH, 6) and (routing > 0).all()
    for part in np.split(routing, np.cumsum(GROUPS[kind])[:-1], axis=1):
        np.testing.assert_allclose(part.sum(1), 1, rtol=tolerances.LAW["float32"])
    assert np.ptp(routing, axis=0).max() > 0.01  # it looks at the input


def test_the_readout_holds_for_every_routing():
    readout = run("affine", "readout")
    for seed in range(2):
        routing = some_routing("affine", seed)
        assert_near(readout(routing), run("affine", "forward", routing), tolerances.OTHER_BATCH, "logits")


def off_the_line(kind):
    """How far the logits between two routings lie from the line between theirs, relative to their size."""
    ends = [some_routing(kind, seed) for seed in (0, 1)]
    first, last, middle = (run(kind, "forward", r) for r in (*ends, (ends[0] + ends[1]) / 2))
    return np.abs(middle - (first + last) / 2).max() / np.abs(middle).max()


def test_the_affine_model_is_affine_in_the_routing_and_the_deep_one_is_not():
    assert off_the_line("affine") < 1e-5
    assert off_the_line("deep") > 1e-3


def test_the_deep_models_own_routing_leaves_its_gates_as_they_are():
    expected = run("deep", "as trained")
    assert_near(run("deep", "forward", run("deep", "router")), expected, tolerances.LAW["float32"], "logits")
    assert np.abs(run("deep", "forward", some_routing("deep")) - expected).max() > 1e-3


@each_kind
@pytest.mark.parametrize("expert", range(6))
def test_every_expert_matters(kind, expert):
    """Its place among the tokens is a parameter that all of them have."""
    before = run(kind, "forward", some_routing(kind))
    changed = jax.tree.map(lambda x: x, params(kind))
    place = changed["params"][f"experts_{expert}"]["place"]
    changed["params"][f"experts_{expert}"]["place"] = place + 1 * jnp.sin(jnp.arange(place.size)).reshape(place.shape)
    assert np.abs(run(kind, "forward", some_routing(kind), given=changed) - before).max(1).min() > 1e-4


@each_kind
def test_an_expert_without_weight_is_not_heard(kind):
    alone = np.tile(np.float32([1, 0, 0, 0, 0, 0] if kind == "affine" else [1, 0, 0, 1, 0, 0]), (BATCH, 1))
    changed = jax.tree.map(lambda x: x, params(kind))
    changed["params"]["experts_5"] = jax.tree.map(lambda x: x + 1, changed["params"]["experts_5"])
    before, after = run(kind, "forward", alone), run(kind, "forward", alone, given=changed)
    assert_near(after, before, 1e-3 if kind == "deep" else 0, kind)  # deep: 1e-6 of a weight stays


def test_questions_are_three_one_hot_vectors():
    code = encode_question(jnp.array([[0, NO_SHAPE, NO_COLOR], [6, 0, 2]]))
    assert code.shape == (2, len(TEMPLATES) + len(SHAPES) + 1 + len(COLORS) + 1)
    assert [np.flatnonzero(row).tolist() for row in np.asarray(code)] == [[0, 7 + 4, 12 + 5], [6, 7, 12 + 2]]


def test_the_embedding_sees_the_question_alone():
    dark = dict(inputs(), image=np.zeros_like(inputs()["image"]))
    np.testing.assert_array_equal(model("affine").embed(None, dark), model("affine").embed(None, inputs()))


def test_picture_statistics_of_a_plain_picture():
    image = jnp.broadcast_to(jnp.array([0.1, 0.2, 0.6]), (1, 32, 32, 3))
    grey = 0.3
    expected = [0.1, 0.2, 0.6, 0, 0, 0, 0, 0, 0, (abs(0.1 - grey) + abs(0.2 - grey) + abs(0.6 - grey)) / 3]
    np.testing.assert_allclose(picture_statistics(image)[0], expected, atol=1e-5)


def test_every_question_has_words():
    assert question_text((0, NO_SHAPE, NO_COLOR)) == "Which digit is written here?"
    assert question_text(np.array([4, SHAPES.index("cross"), NO_COLOR])) == "How many crosses are there?"
    assert question_text((4, 0, NO_COLOR)) == "How many circles are there?"
    assert question_text((6, NO_SHAPE, 2)) == "Is the digit left of what is blue?"
    texts = {question_text((template, 1, 1)) for template in range(len(TEMPLATES))}
    assert len(texts) == len(TEMPLATES) and not any("?" in text[:-1] for text in texts)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"readout": "shallow"}, "readout='shallow' is unknown; use one of"),
        ({"width": 0}, "width=0 must be a positive multiple of 4"),
        ({"width": 10}, "width=10 must be a positive multiple of 4"),
    ],
)
def test_a_bad_config_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        ScenesConfig(**fields)
