"""Every mixer computes what other people's code computes (experiments.bench.public_mixers), forward and backward."""

import flax
import jax
import numpy as np
import pytest

from mesanet_jax.mixers import MIXERS
from tests import tolerances
from tests.mesanet_jax.parity.cases import CONFIG, EXPECTED, draw


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_mixer_agrees_with_an_independent_implementation_in_value_and_gradient(mixer):
    case, expected = draw(mixer), np.load(EXPECTED / f"{mixer}.npz")

    def layer(params, x):
        return MIXERS[mixer](CONFIG).apply({"params": params}, x, None, None)[0]

    y, pullback = jax.vjp(jax.jit(layer), case.params, case.x)
    dparams, dx = pullback(case.dy)
    found = {f"d {name}": value for name, value in flax.traverse_util.flatten_dict(dparams, sep="/").items()}
    found = by_module(found | {"y": y, "dx": dx})
    expected = by_module(expected)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        tolerances.assert_near(values, expected[name], tolerances.PARITY, name)


def by_module(arrays) -> dict[str, np.ndarray]:
    """All of a module's as one: a bias's gradient, a sum that nearly cancels, is as good as that of its kernel."""
    modules = {}
    for name in sorted(arrays):
        modules.setdefault(name.split("/")[0], []).append(np.ravel(arrays[name]))
    return {name: np.concatenate(values) for name, values in modules.items()}
