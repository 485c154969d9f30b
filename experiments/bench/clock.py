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


def ratio(slower: Timing, faster: Timing) -> tuple[float, float, float]:
    """Returns how many times faster the second is by its best round, and the quartiles over rounds taken together."""
    quartiles = np.quantile(slower.seconds / faster.seconds, [0.25, 0.75])
    return slower.best / faster.best, float(quartiles[0]), float(quartiles[1])
