"""Re-routing decides each input by itself, falls back bit for bit to the frozen model, and changes no parameter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2t2_jax import decision
from r2t2_jax.calibrate import prepare
from r2t2_jax.embedders import Embedder
from r2t2_jax.fingerprint import fingerprint
from r2t2_jax.linearise import linearised
from r2t2_jax.neighbors import NeighborConfig
from r2t2_jax.reroute import TILE, RerouteConfig, lead, reroute, verdict
from r2t2_jax.strategies import STRATEGIES, StrategyConfig, Thresholds, divergence
from tests import tolerances
from tests.r2t2_jax.made_up_model import AFFINE, DEEP, GROUPS, PARAMS, WIDTH, inputs, references, right_answers
from tests.tolerances import assert_near

NEIGHBORS = NeighborConfig(k=8)
CONFIG = RerouteConfig(neighbors=NEIGHBORS)
BOLD = RerouteConfig(neighbors=NEIGHBORS, guarded=False)
GIVEN = inputs(TILE + 44, seed=5)


@functools.cache
def memory(config: RerouteConfig = CONFIG):
    return prepare(references(), config)[0]


@functools.cache
def decided():
    return answer(GIVEN)


def answer(given, config=CONFIG, **choices):
    return reroute(AFFINE, PARAMS, choices.pop("memory", memory()), given, config, **choices)


def rows(tree, chosen):
    return jax.tree.map(lambda x: x[chosen], tree)


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_frozen_answer(decisions, where=slice(None)):
    """These are the frozen model's own, bit for bit."""
    np.testing.assert_array_equal(decisions.routing[where], decisions.base_routing[where])
    np.testing.assert_array_equal(decisions.logits[where], decisions.base_logits[where])


def test_answers_get_better_and_the_base_is_the_models_own():
    decisions, right = decided(), right_answers(GIVEN)
    routing = AFFINE.router(PARAMS, GIVEN)
    assert_near(decisions.base_routing, routing, tolerances.LAW["float32"], "routing")
    expected = AFFINE.forward(PARAMS, GIVEN, routing)
    assert_near(decisions.base_logits, expected, tolerances.LAW["float32"], "logits")
    before, after = (decisions.base_answers == right).mean(), (decisions.answers == right).mean()
    assert after > before + 0.05
    assert (decisions.loss_after < decisions.loss_before)[decisions.rerouted].mean() > 0.9


def test_the_answer_given_is_the_frozen_model_under_the_routing_given():
    decisions = decided()
    expected = AFFINE.forward(PARAMS, GIVEN, jnp.asarray(decisions.routing))
    assert_near(decisions.logits, expected, tolerances.LAW["float32"], "logits")


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_inputs_changes_no_bit(seed):
    order = np.random.default_rng(seed).permutation(len(GIVEN["x"]))
    assert_same_bits(answer(rows(GIVEN, order)), rows(decided(), order))


@pytest.mark.parametrize("size", [1, 100, TILE, TILE + 1])
def test_the_size_of_batches_changes_no_bit(size):
    num = len(GIVEN["x"]) if size > 1 else 5
    parts = [answer(rows(GIVEN, slice(start, min(start + size, num)))) for start in range(0, num, size)]
    assert_same_bits(jax.tree.map(lambda *x: np.concatenate(x), *parts), rows(decided(), slice(num)))


# --- statuses ---


def test_every_status_but_rerouted_is_the_frozen_answer_bit_for_bit():
    decisions = decided()
    assert {decision.REROUTED, decision.UNSURE} <= set(decisions.status.tolist())
    assert_frozen_answer(decisions, ~decisions.rerouted)
    assert (decisions.proposed != decisions.base_routing).any(1).all()
    assert (decisions.routing == decisions.proposed)[decisions.rerouted].all()


def tuned(**thresholds):
    """A memory that lets everything pass, but for these."""
    everything = {"farthest": np.inf, "least_gain": -np.inf, "least_lead": -np.inf}
    return memory()._replace(thresholds=Thresholds(**{k: jnp.float32(v) for k, v in (everything | thresholds).items()}))


@pytest.mark.parametrize(
    ("status", "thresholds"),
    [
        (decision.REROUTED, {}),
        (decision.FAR, {"farthest": 0.0}),
        (decision.FLAT, {"least_gain": np.inf}),
        (decision.FAR, {"farthest": 0.0, "least_gain": np.inf, "least_lead": np.inf}),
        (decision.FLAT, {"least_gain": np.inf, "least_lead": np.inf}),
    ],
)
def test_each_threshold_has_its_status_and_the_first_reason_is_named(status, thresholds):
    decisions = answer(rows(GIVEN, slice(20)), memory=tuned(**thresholds))
    assert (decisions.status == status).all()
    assert status == decision.REROUTED or assert_frozen_answer(decisions) is None


def test_an_answer_that_changes_must_lead_and_one_that_stays_need_not():
    decisions = answer(GIVEN, memory=tuned(least_lead=1e9))
    after = np.asarray(AFFINE.forward(PARAMS, GIVEN, jnp.asarray(decisions.proposed))).argmax(-1)
    stays = after == decisions.base_answers
    assert 10 < stays.sum() < len(stays) - 10
    np.testing.assert_array_equal(decisions.status, np.where(stays, decision.REROUTED, decision.UNSURE))


def test_the_lead_is_that_over_the_answer_the_frozen_model_gave():
    base, changed = jnp.array([[1.0, 2, 0], [1, 2, 0]]), jnp.array([[3.0, 1, 2], [0, 3, 2]])
    np.testing.assert_array_equal(lead(base, changed), [2, np.inf])


@pytest.mark.parametrize("config", [CONFIG, BOLD], ids=["guarded", "bold"])
def test_nobody_within_reach_leaves_the_router_alone(config):
    away = {"x": -inputs(5, seed=1)["x"]}
    away["x"][:, 0] = 0
    tiny = RerouteConfig(neighbors=NeighborConfig(k=8, epsilon=1e-3), guarded=config.guarded)
    decisions = answer(away, tiny)
    assert (decisions.status == decision.FAR).all() and (decisions.neighbors.weights == 0).all()
    assert_frozen_answer(decisions)
    assert_near(decisions.proposed, decisions.base_routing, tolerances.LAW["float32"], "proposal")


def test_without_guard_whoever_has_neighbours_is_rerouted():
    assert answer(GIVEN, BOLD, memory=tuned(farthest=0.0, least_gain=np.inf)).rerouted.all()


@pytest.mark.parametrize("config", [CONFIG, BOLD], ids=["guarded", "bold"])
def test_an_input_that_is_no_number_falls_back_and_harms_nobody_else(config):
    poisoned = {"x": GIVEN["x"][:40].copy()}
    poisoned["x"][3], poisoned["x"][4, 0] = np.nan, np.inf
    decisions = answer(poisoned, config)
    well = np.delete(np.arange(40), [3, 4])
    assert (decisions.status[[3, 4]] == decision.NOT_FINITE).all()
    assert_frozen_answer(decisions, [3, 4])
    assert_same_bits(rows(decisions, well), rows(answer(rows(GIVEN, slice(40)), config), well))


def test_an_embedding_that_is_no_number_has_no_neighbours():
    lost = Embedder("lost", lambda params, given: jnp.full((len(given["x"]), WIDTH), jnp.nan))
    decisions = answer(rows(GIVEN, slice(5)), embedder=lost)
    assert (decisions.status == decision.FAR).all()
    assert_frozen_answer(decisions)


@pytest.mark.parametrize("config", [CONFIG, BOLD], ids=["guarded", "bold"])
def test_poisoned_references_are_never_followed(config):
    poisoned = memory()._replace(readout=jax.tree.map(lambda x: x * jnp.nan, memory().readout))
    decisions = answer(rows(GIVEN, slice(20)), config, memory=poisoned)
    assert (decisions.status == decision.NOT_FINITE).all()
    assert_frozen_answer(decisions)
    assert np.isfinite(decisions.logits).all()


def test_turned_off_is_the_frozen_router():
    decisions = answer(rows(GIVEN, slice(20)), active=False)
    assert (decisions.status == decision.TURNED_OFF).all()
    assert_frozen_answer(decisions)


def test_far_comes_before_flat_and_flat_before_unsure():
    """The last two have nobody: none within the ball, and none of any weight, as where a linear kernel is cut."""
    distance, weights = [0.1, 9.0, 0.1, 0.1, np.inf, 0.1], [1.0, 1, 1, 1, 0, 0]
    neighbors = decision.Neighbors(np.zeros((6, 1), int), np.array(distance)[:, None], np.array(weights)[:, None])
    gain, leads = np.array([1.0, -1, -1, 1, 1, 1]), np.array([1.0, -1, -1, -1, 1, 1])
    found = verdict(Thresholds(1.0, 0.0, 0.0), neighbors, gain, leads, True)
    expected = [decision.REROUTED, decision.FAR, decision.FLAT, decision.UNSURE, decision.FAR, decision.FAR]
    np.testing.assert_array_equal(found, expected)


# --- frozen means frozen ---


def test_no_steps_give_the_answers_of_the_frozen_model():
    idle = RerouteConfig(neighbors=NEIGHBORS, settings=StrategyConfig(steps=0), guarded=False)
    decisions = answer(GIVEN, idle)
    assert_near(decisions.proposed, decisions.base_routing, tolerances.LAW["float32"], "proposal")
    np.testing.assert_array_equal(decisions.answers, decisions.base_answers)


def test_thousands_of_reroutings_change_no_parameter_and_no_memory():
    before = fingerprint(PARAMS), fingerprint(memory())
    given = inputs(4000, seed=8)
    decisions = answer(given, BOLD)
    assert decisions.rerouted.sum() > 3000
    assert (fingerprint(PARAMS), fingerprint(memory())) == before
    shapes = {np.shape(x)[1:] for x in jax.tree.leaves(decisions)}
    assert shapes.isdisjoint(np.shape(x) for x in jax.tree.leaves(PARAMS) if np.ndim(x) > 1)


# --- other models, strategies, embedders ---


def test_a_new_strategy_is_one_function_and_one_row(monkeypatch):
    def third(problem, memory, config, groups):
        return jnp.broadcast_to(jnp.array([0.5, 0.5, 1 / 3, 1 / 3, 1 / 3]), problem.routing.shape)

    monkeypatch.setitem(STRATEGIES, "evenly", third)
    config = RerouteConfig(strategy="evenly", neighbors=NEIGHBORS, guarded=False)
    decisions = answer(rows(GIVEN, slice(5)), config)
    assert decisions.rerouted.all() and (decisions.routing == np.float32([0.5, 0.5, 1 / 3, 1 / 3, 1 / 3])).all()


def test_a_deep_model_goes_through_linearised_references_within_its_trust_region():
    config = RerouteConfig(neighbors=NEIGHBORS, settings=StrategyConfig(trust=0.1), guarded=False)
    made = references(model=DEEP, readout=linearised(DEEP))
    decisions = reroute(DEEP, PARAMS, prepare(made, config)[0], GIVEN, config)
    far = np.asarray(divergence(decisions.base_routing, decisions.proposed))
    assert (far <= 0.1 + 1e-6).all() and far.max() > 0.09
    expected = DEEP.forward(PARAMS, GIVEN, jnp.asarray(decisions.routing))
    assert_near(decisions.logits, expected, tolerances.LAW["float32"], "logits")
    right = right_answers(GIVEN, DEEP)
    assert (decisions.answers == right).mean() > (decisions.base_answers == right).mean() + 0.02


def test_the_oracle_needs_labels_and_uses_them():
    config = RerouteConfig(strategy="oracle", neighbors=NEIGHBORS, guarded=False)
    right = right_answers(GIVEN)
    decisions = answer(GIVEN, config, labels=right)
    assert (decisions.answers == right).mean() > (answer(GIVEN, BOLD).answers == right).mean()
    with pytest.raises(ValueError, match="needs the labels of the inputs"):
        answer(GIVEN, config)


def test_what_cannot_be_answered_is_refused():
    with pytest.raises(ValueError, match="inputs are empty; pass at least one"):
        answer(rows(GIVEN, slice(0)))
    with pytest.raises(ValueError, match=r"have \[4, 300\] rows"):
        answer(GIVEN, labels=np.zeros(4, int))
    narrow = Embedder("narrow", lambda params, given: given["x"][:, :2])
    with pytest.raises(ValueError, match="embedded in 2 dimensions, the references in 6; use the embedder"):
        answer(GIVEN, embedder=narrow)


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        ([0] * len(GIVEN["x"]), TypeError, "reroute: labels is a list; pass an array."),
        (np.zeros(len(GIVEN["x"])), TypeError, "reroute: labels has dtype float64; pass integers."),
        (np.zeros(GIVEN["x"].shape, int), ValueError, "reroute: labels has shape (300, 6); give one label per input."),
        (np.full(len(GIVEN["x"]), 4), ValueError, "reroute: labels has 4; with 4 answers it must be 0 to 3."),
        (np.full(len(GIVEN["x"]), -1), ValueError, "reroute: labels has -1; with 4 answers it must be 0 to 3."),
    ],
)
def test_labels_that_are_none_are_refused(labels, error, words):
    with pytest.raises(error) as caught:
        answer(GIVEN, RerouteConfig(strategy="oracle", neighbors=NEIGHBORS), labels=labels)
    assert str(caught.value) == words


@pytest.mark.parametrize(("x", "kind"), [([[0.0] * 6] * 3, "float"), (np.float32(0), "float32")])
def test_inputs_without_rows_are_refused(x, kind):
    with pytest.raises(TypeError, match=f"reroute: inputs hold a {kind} without rows; pass a tree of arrays"):
        answer({"x": x})


def test_groups_are_kept_apart():
    for routing in (decided().routing, decided().proposed):
        np.testing.assert_allclose(routing[:, : GROUPS[0]].sum(1), 1, rtol=tolerances.LAW["float32"])
        np.testing.assert_allclose(routing[:, GROUPS[0] :].sum(1), 1, rtol=tolerances.LAW["float32"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strategy": "prayer"}, "strategy='prayer' is unknown; use one of"),
        ({"harm": -1.0}, "harm=-1.0 must be finite and not negative"),
        ({"harm": np.nan}, "harm=nan must be finite"),
    ],
)
def test_a_bad_config_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        RerouteConfig(**fields)
