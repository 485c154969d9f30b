"""The forecast is what leaving out each reference's source says, and the thresholds keep the promise about harm."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from r2t2_jax.amortised import AmortisedConfig
from r2t2_jax.calibrate import optimise, prepare
from r2t2_jax.neighbors import NeighborConfig
from r2t2_jax.reroute import RerouteConfig, reroute
from r2t2_jax.strategies import STRATEGIES
from tests import tolerances
from tests.r2t2_jax.made_up_model import AFFINE, PARAMS, inputs, references, right_answers
from tests.tolerances import assert_near

K = 8
GENTLE = RerouteConfig(strategy="optimised_regression", neighbors=NeighborConfig(k=K))
SMALL = references()


@functools.cache
def prepared(config=GENTLE):
    return prepare(SMALL, config)


def entropy(logits, label):
    return np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label]


def left_out(references, optimised):
    """What `optimised_regression` would do to each reference if its source were not there, one at a time."""
    found, vectors = [], references.embedding.astype(np.float64)
    near = []
    for i in range(len(references)):
        others = np.flatnonzero(references.sources != references.sources[i])
        cosine = vectors[others] @ vectors[i]
        order = np.argsort(-cosine)[:K]
        near.append((others[order], cosine[order], np.sqrt(2 - 2 * cosine[order])))
    bandwidth = np.median([distance[-1] for _, _, distance in near])
    for i, (who, cosine, distance) in enumerate(near):
        weights = np.exp(-(distance**2) / (2 * bandwidth**2))
        weights /= weights.sum()
        own = references.routing[i]
        proposed = own + (weights @ cosine) * (weights @ optimised[who] - own)
        weight, offset = references.readout.weight[i], references.readout.offset[i]
        base, changed, label = own @ weight + offset, proposed @ weight + offset, references.labels[i]
        gain = sum(
            w * (entropy(own @ weight + offset, y) - entropy(proposed @ weight + offset, y))
            for w, weight, offset, y in zip(
                weights,
                references.readout.weight[who],
                references.readout.offset[who],
                references.labels[who],
                strict=True,
            )
        )
        same = base.argmax() == changed.argmax()
        found.append(
            {
                "who": who,
                "weights": weights,
                "distance": distance[0],
                "gain": gain,
                "lead": np.inf if same else changed.max() - changed[base.argmax()],
                "improvement": entropy(base, label) - entropy(changed, label),
                "before": base.argmax() == label,
                "after": changed.argmax() == label,
            }
        )
    return found


@functools.cache
def trials():
    return left_out(SMALL, optimise(SMALL))


def column(name):
    return np.array([trial[name] for trial in trials()])


def taken(thresholds):
    slack = 1e-5  # thresholds are float32 numbers of a reference
    far, gain, lead = (float(x) for x in thresholds)
    return (column("distance") <= far + slack) & (column("gain") >= gain - slack) & (column("lead") >= lead - slack)


def test_the_forecast_is_what_leaving_each_source_out_says():
    memory, forecast = prepared()
    chosen, before, after = taken(memory.thresholds), column("before"), column("after")
    assert 0.2 < chosen.mean() < 1 and forecast.mended > 0
    np.testing.assert_allclose(forecast.accuracy, before.mean())
    np.testing.assert_allclose(forecast.rerouted, chosen.mean())
    np.testing.assert_allclose(forecast.mended, (chosen & ~before & after).mean())
    np.testing.assert_allclose(forecast.broken, (chosen & before & ~after).mean())
    assert forecast.gain == forecast.mended - forecast.broken
    np.testing.assert_allclose(forecast.distances, column("distance"), atol=1e-4)
    values = np.zeros(len(SMALL))
    for trial, counts in zip(trials(), chosen, strict=True):
        np.add.at(values, trial["who"], counts * trial["weights"] * trial["improvement"])
    np.testing.assert_allclose(forecast.values, values, atol=1e-4 * abs(values).max())


def test_values_add_up_to_all_that_was_won():
    memory, forecast = prepared()
    total = column("improvement")[taken(memory.thresholds)].sum()
    assert forecast.values.sum() == pytest.approx(total, rel=1e-4)


def test_no_other_threshold_wins_more_without_more_harm_than_allowed():
    thresholds, forecast = prepared()[0].thresholds, prepared()[1]
    mends, breaks = ~column("before") & column("after"), column("before") & ~column("after")
    best = 0
    for gain in (-np.inf, 0):
        for lead in column("lead")[np.isfinite(column("lead"))]:
            chosen = taken((float(thresholds.farthest), gain, lead))
            if (chosen & breaks).sum() <= GENTLE.harm * (chosen & mends).sum():
                best = max(best, (chosen & mends).sum() - (chosen & breaks).sum())
    assert best > 0
    assert forecast.gain * len(SMALL) == pytest.approx(best)


@pytest.mark.parametrize("harm", [0.0, 0.1])
def test_no_more_is_broken_than_allowed(harm):
    rng = np.random.default_rng(0)
    unreliable = np.where(rng.random(len(SMALL)) < 0.3, rng.integers(4, size=len(SMALL)), SMALL.labels)
    noisy = dataclasses.replace(SMALL, labels=unreliable)
    bold = prepare(noisy, dataclasses.replace(GENTLE, guarded=False))[1]
    assert bold.broken > harm * bold.mended
    forecast = prepare(noisy, dataclasses.replace(GENTLE, harm=harm))[1]
    assert forecast.broken <= harm * forecast.mended + 1e-9
    assert forecast.mended > 0 or harm == 0


def test_equal_leads_are_taken_together_or_not_at_all(monkeypatch):
    """The same input over and over: three in ten mended, seven broken, by one and the same lead."""
    first = np.float32([1, 0, 1, 0, 0])
    monkeypatch.setitem(STRATEGIES, "first", lambda problem, *_: jnp.broadcast_to(first, problem.routing.shape))
    same = inputs(1, seed=3)
    old = int(AFFINE.forward(PARAMS, same, AFFINE.router(PARAMS, same)).argmax())
    new = int(AFFINE.forward(PARAMS, same, first[None]).argmax())
    assert old != new
    repeated = references_like(SMALL, same, [new] * 60 + [old] * 140)
    config = RerouteConfig(strategy="first", neighbors=NeighborConfig(k=K))
    assert prepare(repeated, dataclasses.replace(config, guarded=False))[1].broken == pytest.approx(0.7)
    assert prepare(repeated, config)[1].rerouted == 0


def references_like(references, given, labels):
    """One input for all, with other labels."""
    count = len(references)
    readout = AFFINE.readout(PARAMS, given)
    return dataclasses.replace(
        references,
        labels=np.array(labels),
        routing=np.repeat(AFFINE.router(PARAMS, given), count, 0),
        embedding=np.repeat(AFFINE.embed(PARAMS, given), count, 0),
        readout=type(readout)(*(np.repeat(x, count, 0) for x in readout)),
    )


def test_neighbourless_references_set_no_threshold(monkeypatch):
    """Nobody within reach is re-routed, so that what they would have won does not count."""

    def cheat(problem, memory, config, groups):
        return STRATEGIES["oracle"](problem, memory, config, groups)

    monkeypatch.setitem(STRATEGIES, "cheat", cheat)
    config = RerouteConfig(strategy="cheat", neighbors=NeighborConfig(k=K, epsilon=1e-3))
    memory, forecast = prepare(SMALL, config)
    assert forecast.rerouted == 0 and np.isposinf(memory.thresholds.least_lead)


@pytest.mark.parametrize("strategy", ["router", "optimised_regression"])
def test_where_nothing_can_be_won_nothing_is_ever_rerouted(strategy):
    content = dataclasses.replace(
        SMALL, labels=SMALL.readout(SMALL.routing).argmax(-1), correct=np.ones(len(SMALL), bool)
    )
    config = dataclasses.replace(GENTLE, strategy=strategy)
    memory, forecast = prepare(content, config)
    assert forecast.accuracy == 1 and forecast.rerouted == 0 and (forecast.values == 0).all()
    assert not reroute(AFFINE, PARAMS, memory, inputs(300, seed=4), config).rerouted.any()


def test_a_single_source_is_refused():
    with pytest.raises(ValueError, match="all references come from one source"):
        prepare(dataclasses.replace(SMALL, sources=["a"] * len(SMALL)), GENTLE)


@pytest.mark.parametrize("strategy", ["descent", "amortised"])
def test_the_forecast_is_close_to_what_is_measured_on_inputs_never_seen(strategy):
    config = RerouteConfig(
        strategy=strategy, neighbors=NeighborConfig(k=K), amortised=AmortisedConfig(hidden=16, epochs=60, batch_size=50)
    )
    memory, forecast = prepare(SMALL, config)
    given = inputs(1500, seed=9)
    right = right_answers(given)
    decisions = reroute(AFFINE, PARAMS, memory, given, config)
    before, after = decisions.base_answers == right, decisions.answers == right
    assert forecast.accuracy == pytest.approx(before.mean(), abs=0.05)
    assert after.mean() - before.mean() > 0.05
    assert forecast.gain == pytest.approx(after.mean() - before.mean(), abs=0.05)
    assert forecast.rerouted == pytest.approx(decisions.rerouted.mean(), abs=0.05)
    assert forecast.broken == pytest.approx((before & ~after).mean(), abs=0.03)


def test_trying_fold_by_fold_mixes_no_references_up(monkeypatch):
    """A strategy that learns, but makes nothing of it, has the forecast of one that does not learn."""
    monkeypatch.setitem(STRATEGIES, "amortised in vain", STRATEGIES["optimised_regression"])
    brief = AmortisedConfig(hidden=1, epochs=1)
    forecast = prepare(SMALL, dataclasses.replace(GENTLE, strategy="amortised in vain", amortised=brief))[1]
    for found, expected in zip(forecast, prepared()[1], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_references_without_features_will_do():
    bare = dataclasses.replace(SMALL, features=np.zeros((len(SMALL), 0), np.float32))
    assert prepare(bare, GENTLE)[1].gain == prepared()[1].gain


def test_a_bandwidth_that_is_given_is_kept():
    config = dataclasses.replace(GENTLE, neighbors=NeighborConfig(k=K, bandwidth=0.25))
    assert prepare(SMALL, config)[0].bandwidth == 0.25
    assert prepared()[0].bandwidth == pytest.approx(np.median([t["distance"] for t in trials()]), rel=1)


def test_optimised_routings_lower_the_own_loss_and_stay_near():
    found = optimise(SMALL)
    losses = [
        [entropy(r @ w + b, y) for r, w, b, y in zip(routing, *SMALL.readout, SMALL.labels, strict=True)]
        for routing in (SMALL.routing, found)
    ]
    fell = np.array(losses[1]) < losses[0]
    assert fell.mean() > 0.9
    np.testing.assert_allclose(found[:, :2].sum(1), 1, rtol=tolerances.LAW["float32"])
    assert_near(optimise(SMALL, steps=0), SMALL.routing, tolerances.LAW["float32"], "no steps")
