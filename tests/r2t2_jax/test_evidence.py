"""The promises of the tests, by simulation: how seldom they are wrong at any time, and how soon they are right."""

import math

import numpy as np
import pytest

from r2t2_jax.evidence import ODDS, Evidence, bet, interval, largest_share, last_rise, observe, worth
from tests import tolerances
from tests.tolerances import assert_near


def first_alarms(tolerated, shares, level, num_streams, seed=0):
    """Returns [num_streams] the trial at which the evidence first reached 1 / level; inf where it never did."""
    hits = np.random.default_rng(seed).random((len(shares), num_streams)) < np.asarray(shares)[:, None]
    value = worth(bet(np.zeros((num_streams, len(ODDS))), 1, hits, tolerated), 1 + np.arange(len(shares)))
    over = value >= 1 / level
    return np.where(over.any(0), over.argmax(0) + 1, np.inf)


@pytest.mark.parametrize("tolerated", [0.01, 0.1, 0.5, 0.9])
def test_a_stream_at_the_tolerated_share_alarms_with_less_than_the_level(tolerated):
    """Looked at after every one of 2,000 trials, at a level of 5 % that 1,000 streams can tell from more."""
    alarms = np.isfinite(first_alarms(tolerated, [tolerated] * 2000, 0.05, 1000)).mean()
    assert alarms <= 0.05
    assert alarms >= 0.005  # and the promise is not kept by never alarming


def test_the_fortune_is_a_martingale():
    """One more trial, hit or miss, leaves the expected fortune what it was."""
    sums = np.random.default_rng(0).gamma(1, 1, (1, len(ODDS)))
    for trial in (1, 7, 1000):
        before = worth(sums, np.array([trial - 1]))[0]
        hit, miss = (worth(bet(sums[0], trial, np.array([x]), 0.2), np.array([trial]))[0] for x in (True, False))
        assert_near(0.2 * hit + 0.8 * miss, before, tolerances.MARTINGALE)


@pytest.mark.parametrize(("share", "most"), [(0.2, 700), (0.3, 220), (0.5, 70), (1.0, 15)])
def test_a_rise_after_a_long_calm_is_seen_soon(share, most):
    """A tenth is tolerated, 2,000 trials have half of that, and the level is a quarter of 1e-3."""
    alarms = first_alarms(0.1, [0.05] * 2000 + [share] * 1000, 2.5e-4, 200)
    assert (alarms > 2000).all()
    assert np.median(alarms) - 2000 <= most


def test_more_streams_than_one_are_computed_as_each_alone():
    hits = np.random.default_rng(1).random((50, 3)) < 0.3
    together = bet(np.zeros((3, len(ODDS))), 1, hits, 0.2)
    alone = [bet(np.zeros(len(ODDS)), 1, hits[:, i], 0.2) for i in range(3)]
    np.testing.assert_array_equal(together, np.stack(alone, 1))


@pytest.mark.parametrize("batch", [1, 7, 300])
def test_batches_of_any_size_give_the_same_evidence_and_the_same_alarm(batch):
    hits = np.random.default_rng(2).random(300) < np.where(np.arange(300) < 100, 0.1, 0.4)
    expected, crossed = observe(Evidence(0.1), hits, 1000)
    assert crossed is not None and crossed > 100
    evidence, alarms = Evidence(0.1), []
    for start in range(0, 300, batch):
        evidence, first = observe(evidence, hits[start : start + batch], 1000)
        alarms += [] if first is None else [start + first]
    assert evidence == expected
    assert alarms[0] == crossed


def test_no_trials_change_nothing():
    evidence, _ = observe(Evidence(0.3), np.array([True, False]), 100)
    assert observe(evidence, np.zeros(0, bool), 1) == (evidence, None)


def test_overwhelming_evidence_stays_finite():
    evidence, _ = observe(Evidence(0.01), np.ones(5000, bool), 100)
    assert 1e90 < evidence.value < math.inf


@pytest.mark.parametrize(
    ("hits", "since"),
    [
        ("00000011", 2),
        ("0" * 100 + "11", 2),  # what came before is even less likely, but no rise
        ("0100000101111", 4),
        ("010000011101111", 8),
        ("11111111", 8),
        ("0000000000000000000000000000001", 1),
        ("10101010", 8),
    ],
)
def test_the_rise_began_where_a_bet_on_it_would_have_won_most(hits, since):
    assert last_rise(np.array(list(hits)) == "1", 0.1) == since


@pytest.mark.parametrize("share", [0.02, 0.4])
def test_the_interval_covers_the_share_at_all_times_at_once(share):
    hits = np.cumsum(np.random.default_rng(3).random((300, 800)) < share, 1)
    missed = 0
    for stream in hits:
        intervals = [interval(int(stream[n - 1]), n, 0.05) for n in (1, 2, 5, *range(10, 801, 30))]
        missed += any(not low <= share <= high for low, high in intervals)
    assert missed / 300 <= 0.05


def test_the_interval_ends_where_the_fortune_against_a_share_is_the_bar():
    """The mixture of all bets is the likelihood averaged over Beta(1/2, 1/2), here by quadrature."""
    hits, trials, level = 7, 40, 0.05
    angle = (np.arange(20_000) + 0.5) / 20_000 * math.pi / 2  # share = sin^2(angle) makes the prior uniform in angle
    mixture = np.mean(np.sin(angle) ** (2 * hits) * np.cos(angle) ** (2 * (trials - hits)))
    for share in interval(hits, trials, level):
        likelihood = share**hits * (1 - share) ** (trials - hits)
        assert_near(mixture / likelihood, 1 / level, tolerances.EDGE_OF_INTERVAL)


def test_intervals_of_extremes_end_at_0_and_1():
    assert interval(0, 0, 0.05) == (0.0, 1.0)
    low, high = interval(0, 50, 0.05)
    assert low == 0 and 0.05 < high < 0.2
    mirrored, top = interval(50, 50, 0.05)
    assert_near(mirrored, 1 - high, tolerances.EDGE_OF_INTERVAL)
    assert top == 1


def test_a_quantile_of_few_distances_may_leave_more_beyond_it():
    """As often as promised at most, the share beyond the sample's 95 % quantile is larger than the bound."""
    rng = np.random.default_rng(4)
    for size in (20, 100, 1000):
        beyond = 1 - np.quantile(rng.random((2000, size)), 0.95, axis=1, method="higher")
        assert 0 < (beyond > largest_share(0.05, size, 0.2)).mean() <= 0.2
    assert largest_share(0.05, 1, 1e-3) > 0.99
    assert largest_share(0.05, 10**6, 1e-3) < 0.052
