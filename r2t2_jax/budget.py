"""A latency budget becomes a strategy and a number of steps, from times measured on the device at hand."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from r2t2_jax.embedders import Embedder
from r2t2_jax.models.contract import FrozenModel, Inputs, Params
from r2t2_jax.reroute import TILE, RerouteConfig, reroute
from r2t2_jax.strategies import Memory

CHEAPER = ("optimised_regression", "router")  # without gradients at test time, in this order
PROBE_STEPS = 40


class Plan(NamedTuple):
    """What fits, and the times behind it in seconds per tile of TILE inputs."""

    config: RerouteConfig
    fixed: float  # everything but the steps
    step: float  # one more step
    expected: float  # 95th percentile measured with `config`


def fit_budget(
    model: FrozenModel,
    params: Params,
    memory: Memory,
    inputs: Inputs,
    config: RerouteConfig,
    milliseconds: float,
    *,
    embedder: Embedder | None = None,
    rounds: int = 20,
) -> Plan:
    """Returns the configuration with as many of its steps as fit, or a cheaper strategy where not even one does.

    Args:
      model, params, memory, embedder: as of reroute.
      inputs: examples; a tile is filled with them.
      config: what would run without a budget.
      milliseconds: for a tile of TILE inputs, at the 95th percentile of the measured times.
      rounds: times each candidate runs.

    Raises:
      ValueError: the budget is no positive number, or there are no inputs or rounds to measure.
    """
    if not 0 < milliseconds < math.inf:
        raise ValueError(f"fit_budget: milliseconds={milliseconds} must be a positive number.")
    if rounds < 1 or not all(len(x) for x in jax.tree.leaves(inputs)):
        raise ValueError("fit_budget: give at least one input and one round to measure.")
    budget = milliseconds / 1000
    tile = jax.tree.map(lambda x: x[np.arange(TILE) % len(x)], inputs)

    def measure(candidate: RerouteConfig) -> float:
        return _seconds(lambda: reroute(model, params, memory, tile, candidate, embedder=embedder), rounds)

    none, many = measure(_with_steps(config, 0)), measure(_with_steps(config, PROBE_STEPS))
    step = max(many - none, 0) / PROBE_STEPS
    steps = config.settings.steps if step == 0 else min(config.settings.steps, int((budget - none) / step))
    while steps >= 1:
        candidate = _with_steps(config, steps)
        if (expected := measure(candidate)) <= budget:
            return Plan(candidate, none, step, expected)
        steps //= 2
    for strategy in CHEAPER:
        candidate = dataclasses.replace(config, strategy=strategy)
        if (expected := measure(candidate)) <= budget:
            break
    return Plan(candidate, none, step, expected)


def _seconds(run: Callable[[], object], rounds: int) -> float:
    """Returns the 95th percentile of what it takes once it is compiled."""

    def once():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    once()
    return float(np.quantile([once() for _ in range(rounds)], 0.95))


def _with_steps(config: RerouteConfig, steps: int) -> RerouteConfig:
    return dataclasses.replace(config, settings=dataclasses.replace(config.settings, steps=steps))
