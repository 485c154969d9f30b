"""The benchmark of the router refuses to time what is wrong, and scales the loop to the batch it is about."""

import dataclasses

import numpy as np
import pytest

from experiments.bench import router
from experiments.bench.clock import Timing
from experiments.cli import UserError
from pallas_kernels.router_descent.cases import BENCHMARK


def test_a_wrong_operator_is_not_timed(monkeypatch):
    right = router.router_descent

    def slightly_wrong(*inputs, implementation=None, **choices):
        routing, loss = right(*inputs, implementation=implementation, **choices)
        return routing, loss * (1 + 1e-4 * (implementation is None))

    monkeypatch.setattr(router, "router_descent", slightly_wrong)
    with pytest.raises(
        UserError, match=r"router_descent with sgd on ball is off by 1.0e-04 .* nothing is timed before"
    ):
        router.check((("ball", "sgd"),))


@pytest.mark.parametrize("yardstick", ["_loop", "_mapped"])
def test_a_yardstick_that_computes_something_else_is_not_timed(yardstick, monkeypatch):
    router.check(())
    right = getattr(router, yardstick)
    shifted = {
        "_loop": lambda inputs: right(inputs._replace(log_routing=0.9 * inputs.log_routing)),
        "_mapped": lambda log_routing, *rest: right(0.9 * log_routing, *rest),
    }
    monkeypatch.setattr(router, yardstick, shifted[yardstick])
    with pytest.raises(UserError, match="nothing is timed before"):
        router.check(())


def test_the_loop_is_timed_on_some_inputs_and_scaled_to_all(monkeypatch):
    def two_rounds(functions, rounds):
        assert set(functions) == {"ours", "vmap", "loop"} and rounds == 2
        return {
            name: Timing(np.array(x)) for name, x in dict(ours=[1.0, 2.0], vmap=[3.0, 4.0], loop=[5.0, 7.0]).items()
        }

    monkeypatch.setattr(router, "take_turns", two_rounds)
    row = router.compare(dataclasses.replace(BENCHMARK, batch=40), rounds=2, loop_inputs=4)
    assert (row.ratio_loop, row.ratio_vmap) == (50.0, 3.0)
    assert row.ratio_loop_quartiles == (38.75, 46.25)


def test_peak_memory_grows_with_the_batch_and_no_faster():
    memory = router.peak_memory(BENCHMARK, (3072, 12288))
    assert memory.forward_exponent == pytest.approx(1, abs=0.1)
    assert memory.gradient_exponent == pytest.approx(1, abs=0.1)
    assert memory.forward[1] < 1.5 and memory.gradient[1] < 2.5
    page = router.lines([], memory)
    assert page[-1].endswith(f"{memory.gradient[1]:.2f} at 12288.")
