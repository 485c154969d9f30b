"""The monitor is quiet on known ground, speaks up soon off it, and depends on the decisions and their order alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2t2_jax.decision import FAR, FLAT, NOT_FINITE, REROUTED, TURNED_OFF, Neighbors
from r2t2_jax.monitor import (
    LEVELS,
    MonitorConfig,
    MonitorState,
    alarm,
    baseline,
    feedback,
    from_json,
    reset,
    start,
    summary,
    to_json,
    update,
)
from tests.r2t2_jax.made_up import decisions

UNIFORM = baseline(np.linspace(0, 1, 5001))
CALM = MonitorConfig()


def at(distance, status=REROUTED, changed=False):
    """Decisions with these distances to the nearest reference; the rest is one value for all, or one for each."""
    distance = np.asarray(distance, np.float32)
    count = len(distance)
    neighbors = Neighbors(np.zeros((count, 2), int), np.stack([distance, distance + 1], 1), np.full((count, 2), 0.5))
    logits = np.eye(2, dtype=np.float32)[np.zeros(count, int)]
    moved = np.where(np.broadcast_to(changed, count)[:, None], logits[:, ::-1], logits)
    return decisions(count)._replace(
        status=np.broadcast_to(status, count), neighbors=neighbors, base_logits=logits, logits=moved
    )


def nearest(queries, references, own=None):
    """Distances to the nearest of the references that is not one's own."""
    square = 2 - 2 * queries @ references.T
    if own is not None:
        square[np.arange(len(own)), own] = np.inf
    return np.sqrt(np.maximum(square, 0)).min(1)


def unit(rng, count, around):
    """Unit vectors about a direction, the closer the larger `around`."""
    x = rng.normal(size=(count, 8)) + around * np.eye(8)[0]
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_inputs_like_the_references_raise_no_alarm_and_others_do():
    rng = np.random.default_rng(0)
    references = unit(rng, 1000, around=4)
    state = start(CALM, baseline(nearest(references, references, np.arange(1000))))
    state = update(state, at(nearest(unit(rng, 10_000, around=4), references)))
    assert alarm(state) is None
    assert summary(state).far.low < 0.05 < summary(state).far.high
    assert all(0.02 < share < 0.08 for share in summary(state).histogram[1:-1])
    shifted = update(state, at(nearest(unit(rng, 1000, around=2), references)))
    assert alarm(state) is None
    assert shifted.alarm.cause == "far" and 10_000 < shifted.alarm.after < 10_150
    assert abs(shifted.alarm.after - shifted.alarm.lately - 10_000) < 20  # it knows when that began
    assert 0.3 < shifted.alarm.share < 0.7


def test_a_share_just_within_what_is_tolerated_raises_no_alarm():
    distances = np.where(np.random.default_rng(1).random(20_000) < 0.1, 2.0, 0.5)
    assert alarm(update(start(CALM, UNIFORM), at(distances))) is None


@pytest.mark.parametrize("size", [30, 100])
def test_few_references_raise_what_is_tolerated(size):
    few = start(CALM, baseline(np.linspace(0, 1, size)))
    many = start(CALM, UNIFORM)
    assert few.tests["far"].tolerated > many.tests["far"].tolerated == 0.1


def test_distances_that_differ_by_rounding_are_not_far():
    """All questions are known, and so all distances are 0 but for rounding."""
    state = update(start(CALM, baseline(np.zeros(50))), at([0, 3e-4, 9e-4, 2e-3]))
    assert summary(state).far.share == 0.25


def test_an_input_without_a_neighbour_or_with_nan_is_far():
    assert summary(update(start(CALM, UNIFORM), at([np.inf, np.nan]))).far.share == 1


@pytest.mark.parametrize(
    ("status", "cause", "text"),
    [
        (NOT_FINITE, "fell_back", "not finite"),
        (FAR, "abstained", "kept their routing"),
        (FLAT, "abstained", "(90% are"),
    ],
)
def test_too_many_of_one_status_raise_an_alarm(status, cause, text):
    state = update(start(CALM, UNIFORM), at(np.full(100, 0.5)))
    assert alarm(state) is None
    state = update(state, at(np.full(600, 0.5), status=status))
    assert state.alarm.cause == cause
    assert text in alarm(state) and "then reset the monitor" in alarm(state)


def feed(state, gain, harm, neither=0, seed=0):
    """Feedback about so many answers that were mended, broken, or neither, in random order."""
    before = np.array([False] * gain + [True] * harm + [True] * neither)
    after = np.array([True] * gain + [False] * harm + [True] * neither)
    order = np.random.default_rng(seed).permutation(len(before))
    return feedback(state, before[order], after[order])


def test_more_harm_than_gain_raises_an_alarm_and_less_does_not():
    state = start(CALM, UNIFORM)
    good, even, bad = feed(state, 300, 60, 2000), feed(state, 200, 200, 2000), feed(state, 60, 300, 2000)
    assert alarm(good) is None and alarm(even) is None
    assert bad.alarm.cause == "broken" and bad.alarm.after < 100
    assert "answers that re-routing mended or broke" in alarm(bad)
    report = summary(good)
    assert (report.labelled, report.gain.share, report.harm.share) == (2360, 300 / 2360, 60 / 2360)
    assert report.gain.low > report.harm.high


def test_an_alarm_stays_until_reset_and_the_first_one_counts():
    state = update(start(CALM, UNIFORM), at(np.append(np.full(500, 0.5), np.full(100, 2.0))))
    first = alarm(state)
    assert first == (
        "After 511 inputs, 100% of the last 11 are farther from their nearest reference than 95% of the references are "
        "from theirs (10% are tolerated): add references like these inputs, then reset the monitor."
    )
    later = feed(update(update(state, at(np.full(5000, 0.5))), at(np.full(500, 0.5), status=NOT_FINITE)), 0, 100)
    assert later.tests["fell_back"].value > 1 / CALM.level and later.tests["broken"].value > 1 / CALM.level
    assert alarm(later) == first
    assert reset(later) == start(CALM, UNIFORM)
    assert alarm(reset(later)) is None


def stream(count=900):
    """Decisions of every kind, with an alarm on the way."""
    rng = np.random.default_rng(3)
    late = np.arange(count) > count // 2
    distance = rng.random(count) + late * (rng.random(count) < 0.4)
    status = rng.choice([REROUTED, FAR, FLAT, NOT_FINITE, TURNED_OFF], count, p=[0.5, 0.2, 0.2, 0.05, 0.05])
    return at(distance, status, rng.random(count) < 0.3)


@pytest.mark.parametrize("batch", [1, 13, 450])
def test_the_state_does_not_depend_on_how_decisions_were_batched(batch):
    made = stream()
    whole = update(start(CALM, UNIFORM), made)
    split = start(CALM, UNIFORM)
    for first in range(0, 900, batch):
        split = update(split, jax.tree.map(lambda x, first=first: x[first : first + batch], made))
    assert whole.alarm is not None
    assert split == whole


def test_shares_do_not_depend_on_the_order_of_decisions():
    made = stream()
    state = update(start(MonitorConfig(window=5000), UNIFORM), made)
    turned = update(start(MonitorConfig(window=5000), UNIFORM), jax.tree.map(lambda x: x[::-1], made))
    for name in ("inputs", "turned_off", "far", "rerouted", "abstained", "fell_back", "changed", "histogram"):
        assert getattr(summary(state), name) == getattr(summary(turned), name)


def test_a_state_is_not_changed_by_what_follows():
    state = update(start(CALM, UNIFORM), at([0.5, 2.0]))
    text = to_json(state)
    feed(update(state, stream()), 3, 3)
    assert to_json(state) == text


def test_what_was_turned_off_is_counted_and_not_judged():
    state = update(start(CALM, UNIFORM), at(np.full(500, np.inf), status=TURNED_OFF))
    assert alarm(state) is None
    report = summary(state)
    assert (report.inputs, report.turned_off) == (0, 500)
    assert np.isnan(report.far.share) and (report.far.low, report.far.high) == (0, 1)


def test_shares_are_reported_of_all_and_of_the_latest_inputs():
    state = start(MonitorConfig(window=10), UNIFORM)
    state = update(state, at(np.full(30, 0.5), status=FAR))
    state = update(state, at(np.full(10, 0.5), changed=[True] * 4 + [False] * 6))
    report = summary(state)
    assert (report.rerouted.share, report.rerouted.recent) == (0.25, 1.0)
    assert (report.abstained.share, report.abstained.recent) == (0.75, 0.0)
    assert (report.changed.share, report.changed.recent) == (0.1, 0.4)
    assert report.abstained.low < 0.75 < report.abstained.high
    assert sum(report.histogram) == 1 and report.histogram[10] == 1  # between the quantiles at 45 % and 50 %


def test_evidence_is_reported_as_a_share_of_what_an_alarm_takes():
    state = start(CALM, UNIFORM)
    while alarm(state) is None:
        assert max(summary(state).evidence.values()) < 1
        state = update(state, at([2.0]))
    assert summary(state).evidence["far"] >= 1


def test_decisions_may_lie_on_the_device():
    made = stream(50)
    assert update(start(CALM, UNIFORM), jax.tree.map(jnp.asarray, made)) == update(start(CALM, UNIFORM), made)


def test_a_state_comes_back_from_json_and_goes_on_as_if_nothing_had_been():
    state = feed(update(start(MonitorConfig(window=50, max_far=0.2), UNIFORM), stream()), 5, 3, 9)
    again = from_json(to_json(state))
    assert again == state and isinstance(again, MonitorState)
    assert update(again, stream(40)) == update(state, stream(40))
    fresh = start(CALM, UNIFORM)
    assert from_json(to_json(fresh)) == fresh


def without(field):
    fields = json.loads(to_json(start(CALM, UNIFORM)))
    del fields[field]
    return json.dumps(fields)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        to_json(start(CALM, UNIFORM)).replace('"format": 1', '"format": 2'),
        to_json(start(CALM, UNIFORM)).replace('"window": 1000', '"window": 0'),
        to_json(start(CALM, UNIFORM)).replace('"broken"', '"harmful"'),
        to_json(start(CALM, UNIFORM)).replace('"turned_off"', '"switched_off"'),
        *(without(field) for field in ("config", "baseline", "streams", "tests", "histogram", "alarm")),
    ],
)
def test_text_that_is_no_state_is_refused(text):
    with pytest.raises(ValueError, match="this is no state that to_json wrote"):
        from_json(text)


@pytest.mark.parametrize("field", ["false_alarm", "max_far", "max_abstained", "max_fell_back"])
@pytest.mark.parametrize("value", [0, 1, -0.1, float("nan")])
def test_shares_of_a_config_lie_between_0_and_1(field, value):
    with pytest.raises(ValueError, match=f"MonitorConfig: {field}={value} must lie between 0 and 1"):
        MonitorConfig(**{field: value})


def test_a_window_holds_something():
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        MonitorConfig(window=0)


def test_quantiles_of_a_baseline_are_distances_with_no_more_than_their_share_beyond():
    distances = np.arange(33.0) ** 2
    quantiles = baseline(distances).quantiles
    assert set(quantiles) <= set(distances) and len(quantiles) == len(LEVELS)
    beyond = (distances > np.array(quantiles)[:, None]).sum(1)
    assert (beyond <= np.round(33 * (1 - LEVELS), 6)).all()


@pytest.mark.parametrize(
    ("distances", "message"),
    [
        (np.ones(19), "at least 20"),
        (np.ones((20, 2)), "a row of at least 20"),
        (np.append(np.ones(20), np.nan), "finite and not negative"),
        (np.append(np.ones(20), np.inf), "finite and not negative"),
        (np.append(np.ones(20), -1), "finite and not negative"),
    ],
)
def test_a_baseline_needs_enough_finite_distances(distances, message):
    with pytest.raises(ValueError, match=message):
        baseline(distances)


@pytest.mark.parametrize(
    ("before", "after"),
    [([True], [True, False]), ([1, 0], [True, False]), ([True], [0.5]), ([[True]], [[True]])],
)
def test_feedback_is_bools_of_one_length(before, after):
    with pytest.raises(ValueError, match="pass bools of one length"):
        feedback(start(CALM, UNIFORM), np.array(before), np.array(after))
