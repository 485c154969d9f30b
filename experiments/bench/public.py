"""Every mixer against the code that others publish for it, as one layer of the 145m model with the same parameters."""

import dataclasses
from functools import cached_property, partial
from typing import NamedTuple

import flax
import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from experiments.bench import mixers, public_mixers
from experiments.bench.clock import Ratio, ratio, take_turns
from experiments.cli import UserError
from mesanet_jax import SIZES, MesaNetConfig
from mesanet_jax.mixers import MIXERS

ALIKE = (2e-5, 2e-5, 2e-5)  # outputs, decoded outputs and gradients of x, relative; float32
SOLVED_ALIKE = (5e-3, 5e-3, 0.2)  # 30 steps with an absolute epsilon in them are not ours, least of all their gradient

torch.set_flush_denormal(True)  # as XLA does, or else decayed states slow it down


class Row(NamedTuple):
    """Tokens per second over those of public code."""

    mixer: str
    training: Ratio
    decoding: Ratio
    chunk: int  # tokens that the public code reads at once
    differences: tuple[float, ...]  # in outputs, decoded outputs and gradients of x


def compare(length: int, rounds: int, shape: MesaNetConfig | None = None) -> list[Row]:
    """Measures mixers and public code by turns, mixer by mixer; see `mixers.compare`.

    Raises:
      UserError: they do not compute the same; that mixer is not timed.
    """
    shape = dataclasses.replace(mixers.shape_for(length, shape or SIZES["145m"]), gate_bound=1.0)  # theirs have none
    return [_row(name, shape, length, rounds) for name in MIXERS]


def lines(rows: list[Row], length: int) -> list[str]:
    """Returns a table."""
    found = [
        f"One layer of the 145m model against public code in PyTorch, times faster: training on {length:,} tokens, "
        f"forward and backward; decoding {mixers.ROWS} sequences after as many. Quartiles in brackets; differences are "
        f"relative to the largest output.",
        "",
        "| mixer | training | decoding | its chunk | differs by, decoding, gradient |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        apart = ", ".join(f"{x:.0e}" for x in row.differences)
        found.append(f"| {row.mixer} | {row.training} | {row.decoding} | {row.chunk} | {apart} |")
    return found


def _row(name: str, shape: MesaNetConfig, length: int, rounds: int) -> Row:
    ours = mixers.Layer(name, shape, length)
    ours.check()
    theirs = {str(chunk): _Public(name, shape, ours, chunk) for chunk in public_mixers.chunks(name)}
    expected = (ours.read(), ours.decoded(), ours.train()[1])
    differences = {chunk: layer.check(*expected) for chunk, layer in theirs.items()}
    times = take_turns({chunk: layer.train for chunk, layer in theirs.items()}, 1)
    chunk = min(times, key=lambda chunk: times[chunk].best)
    both = {"ours": ours, "theirs": theirs[chunk]}
    training = take_turns({who: layer.train for who, layer in both.items()}, rounds)
    decoding = take_turns({who: layer.decode for who, layer in both.items()}, 4 * rounds)
    print(f"{name} against public code: done", flush=True)
    faster = [ratio(times["theirs"], times["ours"]) for times in (training, decoding)]
    return Row(name, faster[0], faster[1], int(chunk), differences[chunk])


class _Public:
    """What others publish for a mixer, with the parameters and inputs of ours."""

    def __init__(self, name: str, shape: MesaNetConfig, ours: mixers.Layer, chunk: int):
        self._name, self._compute = name, partial(public_mixers.compute, name, shape, chunk=chunk)
        flat = flax.traverse_util.flatten_dict(ours.params["params"], sep="/")
        self._params = {path: _tensor(value).requires_grad_() for path, value in flat.items()}
        self._x = _tensor(ours.x)

    @cached_property
    def _state(self):
        return self._compute(self._params, self._x[:, :-1])[1]

    def train(self):
        """One sequence forward and backward; returns its outputs and the gradient of x."""
        x = self._x[:1, :-1].clone().requires_grad_()
        for leaf in self._params.values():
            leaf.grad = None
        y, _ = self._compute(self._params, x)
        y.sum().backward()
        return y.detach(), x.grad

    def decode(self):
        """One token of every sequence, after all the others."""
        with torch.no_grad():
            return self._compute(self._params, self._x[:, -1:], self._state)[0]

    def check(self, read: jax.Array, decoded: jax.Array, dx: jax.Array) -> tuple[float, ...]:
        """Returns the differences from what ours reads and decodes, and from its gradient.

        Raises:
          UserError: they are more than rounding, or for a solver more than what it leaves.
        """
        y, gradient = self.train()
        pairs = ((y, read), (self.decode(), decoded), (gradient, dx))
        found = tuple(mixers.difference(theirs.numpy(), same) for theirs, same in pairs)
        most = SOLVED_ALIKE if self._name == "mesa" else ALIKE
        if not all(x < y for x, y in zip(found, most, strict=True)):
            raise UserError(f"{self._name} is {max(found):.1e} off public code; it is not timed before it agrees.")
        return found


def _tensor(x):
    return torch.from_numpy(np.array(x, np.float32))
