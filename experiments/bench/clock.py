"""Times of several functions that take turns, so that whatever else the machine does falls on all of them alike."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np


class Timing(NamedTuple):
    """Seconds of one function, one entry per round."""

    seconds: np.ndarray

    @property
    def best(self) -> float:
        """The least disturbed round."""
        return float(self.seconds.min())


def take_turns(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Calls every function once to warm up, then once per round; each must return when its work is done."""
    for function in functions.values():
        function()
    seconds = {name: np.empty(rounds) for name in functions}
    for turn in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name][turn] = time.perf_counter() - start
    return {name: Timing(x) for name, x in seconds.items()}


class Ratio(NamedTuple):
    """How many times faster something is: by its best round, and quartiles over rounds taken together."""

    best: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.best:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(slower: Timing, faster: Timing) -> Ratio:
    """Returns how many times faster the second is."""
    low, high = np.quantile(slower.seconds / faster.seconds, [0.25, 0.75])
    return Ratio(slower.best / faster.best, float(low), float(high))
