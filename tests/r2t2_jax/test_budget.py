"""A latency budget is kept by taking fewer steps, then by a cheaper strategy; times come from a clock we turn."""

import functools
import time

import pytest

from r2t2_jax import budget
from r2t2_jax.calibrate import prepare
from r2t2_jax.neighbors import NeighborConfig
from r2t2_jax.reroute import RerouteConfig
from tests.r2t2_jax.made_up_model import AFFINE, PARAMS, inputs, references

CONFIG = RerouteConfig(neighbors=NeighborConfig(k=8))
FIXED, STEP = 0.010, 0.002  # seconds


@pytest.fixture
def planned(monkeypatch):
    """Plans with a clock on which re-routing takes 10 ms, and 2 ms more per step of descent."""
    now = [0.0]

    def reroute(model, params, memory, tile, config, *, embedder=None):
        steps = config.settings.steps if config.strategy == "descent" else 0
        now[0] += FIXED / (2 if config.strategy == "router" else 1) + STEP * steps

    monkeypatch.setattr(budget, "reroute", reroute)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    memory = prepare(references(), CONFIG)[0]
    return functools.partial(budget.fit_budget, AFFINE, PARAMS, memory, inputs(5, seed=1), CONFIG)


def test_a_wide_budget_leaves_everything_as_it_was(planned):
    plan = planned(100.0)
    assert plan.config == CONFIG
    assert (plan.fixed, plan.step, plan.expected) == pytest.approx((FIXED, STEP, FIXED + 10 * STEP))


def test_a_narrow_budget_takes_the_steps_that_fit(planned):
    plan = planned(17.0)
    assert (plan.config.strategy, plan.config.settings.steps) == ("descent", 3)
    assert plan.expected <= 0.017


def test_where_no_step_fits_a_strategy_without_gradients_does(planned):
    assert planned(11.0).config.strategy == "optimised_regression"


def test_where_nothing_fits_the_frozen_router_answers(planned):
    plan = planned(1.0)
    assert plan.config.strategy == "router"
    assert plan.expected > 0.001


def test_nothing_to_measure_is_refused(planned):
    with pytest.raises(ValueError, match="give at least one input and one round to measure"):
        planned(1.0, rounds=0)


@pytest.mark.parametrize("milliseconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_that_makes_no_sense_is_refused(planned, milliseconds):
    with pytest.raises(ValueError, match=r"milliseconds=.* must be a positive number"):
        planned(milliseconds)
