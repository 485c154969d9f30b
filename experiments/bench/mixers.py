"""Every mixer as one layer of the 145m model: tokens per second in training and decoding, beside attention's."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.bench.clock import Ratio, ratio, take_turns
from experiments.cli import UserError
from mesanet_jax import SIZES, MesaNetConfig
from mesanet_jax.mixers import MIXERS

YARDSTICK = "attention"
ROWS = 8  # sequences that are decoded together
ALIKE = 1e-3  # decoding against the sequence read at once, relative; float32


class Row(NamedTuple):
    """Tokens per second over those of attention."""

    mixer: str
    training: Ratio
    decoding: Ratio


def compare(length: int, rounds: int, shape: MesaNetConfig | None = None) -> list[Row]:
    """Measures all mixers on the same inputs, by turns.

    Args:
      length: tokens of a sequence that is trained on, and of the context that decoding goes on with.
      rounds: turns.
      shape: sizes; None takes those of 145m, in float32.

    Raises:
      UserError: a mixer does not decode what it computes in one go; nothing is timed then.
    """
    shape = shape_for(length, shape or SIZES["145m"])
    layers = {name: Layer(name, shape, length) for name in MIXERS}
    for layer in layers.values():
        layer.check()
    training = take_turns({name: layer.train for name, layer in layers.items()}, rounds)
    decoding = take_turns({name: layer.decode for name, layer in layers.items()}, 4 * rounds)
    return [Row(name, *(ratio(times[YARDSTICK], times[name]) for times in (training, decoding))) for name in layers]


def shape_for(length: int, shape: MesaNetConfig) -> MesaNetConfig:
    """Returns sizes in float32 for sequences of so many tokens, of which a sliding window sees half."""
    return dataclasses.replace(shape, dtype="float32", max_context=length + 1, window=length // 2)


def lines(rows: list[Row], length: int) -> list[str]:
    """Returns a table."""
    return [
        f"One layer of the 145m model, tokens per second over those of attention: training on {length:,} tokens, "
        f"forward and backward; decoding {ROWS} sequences after as many. Quartiles in brackets.",
        "",
        "| mixer | training | decoding |",
        "|---|---|---|",
        *(f"| {row.mixer} | {row.training} | {row.decoding} |" for row in rows),
    ]


class Layer:
    """A mixer, its parameters and what it is applied to: rows [b, t + 1, d], the last token of which is decoded."""

    def __init__(self, name: str, shape: MesaNetConfig, length: int):
        layer, self._name = MIXERS[name](shape), name
        self.x = jax.random.normal(jax.random.key(0), (ROWS, length + 1, shape.model_dim))
        self.params = nn.unbox(layer.init(jax.random.key(1), self.x[:1, :1], None, None))
        self._apply = jax.jit(lambda params, x, state: layer.apply(params, x, state, None))
        self._go_on = jax.jit(lambda params, x, state: layer.apply(params, x, state, None), donate_argnums=2)
        self._pull = jax.jit(jax.grad(lambda params, x: layer.apply(params, x, None, None)[0].sum(), argnums=(0, 1)))
        _, self._before = self._apply(self.params, self.x[:, :-1], None)
        self._state = jax.tree.map(jnp.copy, self._before)

    def read(self) -> jax.Array:
        """The outputs of the sequence that is trained on."""
        return self._apply(self.params, self.x[:1, :-1], None)[0]

    def train(self) -> tuple[dict, jax.Array]:
        """One sequence forward and backward."""
        return jax.block_until_ready(self._pull(self.params, self.x[:1, :-1]))

    def decode(self) -> None:
        """The last token of every sequence, after all that were decoded before, the state being overwritten."""
        _, self._state = jax.block_until_ready(self._go_on(self.params, self.x[:, -1:], self._state))

    def decoded(self) -> jax.Array:
        """What decoding gives first."""
        return self._apply(self.params, self.x[:, -1:], self._before)[0]

    def check(self) -> None:
        """Raises UserError if decoding is not what reading the sequence in one go gives."""
        whole, _ = self._apply(self.params, self.x, None)
        error = difference(self.decoded(), whole[:, -1:])
        if not error < ALIKE:
            raise UserError(
                f"{self._name} decodes what is {error:.1e} off its sequence; nothing is timed before it agrees."
            )


def difference(found, expected) -> float:
    """Returns the largest one, relative to the largest of what is expected."""
    return float(jnp.max(jnp.abs(jnp.asarray(found) - expected)) / jnp.max(jnp.abs(expected)))
