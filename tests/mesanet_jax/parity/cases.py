"""The layers that are compared with other people's code: their config, and parameters and inputs drawn from a seed."""

from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np

from mesanet_jax import MesaNetConfig, SolverConfig
from mesanet_jax.mixers import MIXERS

EXPECTED = Path(__file__).parent / "expected"  # what record.py wrote
LENGTH = 70  # a chunk and a bit
MODEL = EXPECTED / "fla_model"  # a checkpoint in flash-linear-attention's layout; config.json is written by hand
TOKENS = np.random.default_rng(1).integers(0, 31, (2, LENGTH))
CONFIG = MesaNetConfig(
    model_dim=12,
    num_heads=2,
    key_dim=8,
    value_dim=8,
    recurrent_dim=10,
    window=9,
    max_context=LENGTH,
    gate_bound=1.0,  # theirs has none
    solver=SolverConfig(max_steps=16, tolerance=0.0),
)


class Case(NamedTuple):
    """A layer's parameters, by name, and what it is applied to and pulled back with."""

    params: dict
    x: np.ndarray  # [b, t, d]
    dy: np.ndarray  # [b, t, d]


def draw(mixer: str) -> Case:
    """Returns the same float32 arrays whenever and wherever it is called."""
    rng = np.random.default_rng(sum(mixer.encode()))
    x, dy = (rng.normal(size=(2, LENGTH, CONFIG.model_dim)).astype(np.float32) for _ in range(2))
    shapes = nn.unbox(jax.eval_shape(MIXERS[mixer](CONFIG).init, jax.random.key(0), x, None, None))["params"]
    paths, tree = jax.tree_util.tree_flatten_with_path(shapes)
    params = [_parameter(rng, path[-1].key, leaf.shape) for path, leaf in paths]
    return Case(jax.tree.unflatten(tree, params), x, dy)


def _parameter(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Scales and biases about what they start at, the others of a size that keeps the layer's inputs at 1."""
    values = rng.normal(size=shape).astype(np.float32)
    return 1 + 0.2 * values if name == "scale" else 0.3 * values
