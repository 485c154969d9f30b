"""How long a call of a compiled program takes at least: the longest of computing, memory and sending, each at its peak.

Computing is what the model asks for, memory what cannot but pass between a device and its own memory, sending what the
program's collectives hand around rings. Nothing is measured: products that fill no matrix unit, what memory holds twice
and links that are shared make a call longer.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from experiments.aot.chips import Chip
from experiments.aot.collectives import Collective
from experiments.aot.config import AotConfig
from mesanet_jax.flops import forward_flops, training_flops
from pallas_kernels import SolverConfig
from pallas_kernels.mesa_chunk.methods import MIXED

PASSES = {"float32": 6, "bfloat16_3x": 3, "bfloat16": 1}  # of a matrix unit


class Compiled(NamedTuple):
    """One program, in bytes per device and seconds."""

    name: str
    seconds: float
    arguments: int
    results: int
    temporary: int
    code: int
    peak: int
    collectives: list[Collective]


class Roofline(NamedTuple):
    """Seconds of one call at the peak of a device's arithmetic, of its memory and of its links."""

    computing: float
    memory: float
    sending: float

    @property
    def least(self) -> float:
        """Everything hidden behind what takes longest."""
        return max(self.computing, self.memory, self.sending)

    @property
    def unhidden(self) -> float:
        """Nothing sent while anything is computed."""
        return max(self.computing, self.memory) + self.sending

    @property
    def bound(self) -> str:
        """The name of what takes longest."""
        return self._fields[self.index(self.least)]


def roofline(
    config: AotConfig, program: Compiled, chip: Chip, mesh_shape: Mapping[str, int], num_parameters: int
) -> Roofline:
    """Returns the three times of one call of the program; parameters are those of the whole model."""
    share = num_tokens(config, program.name) / math.prod(mesh_shape.values())
    return Roofline(
        computing=share * _charged_flops(config, program.name) / chip.flops,
        memory=memory_bytes(config, program, mesh_shape, num_parameters) / chip.memory_bandwidth,
        sending=sum(c.times * c.sent_bytes for c in program.collectives) / chip.ring_bytes,
    )


def num_tokens(config: AotConfig, name: str) -> int:
    """Tokens of one call on all devices together."""
    if name == "train":
        return config.data.batch_size * config.data.length
    return config.prompts * (config.data.length if name == "prefill" else 1)


def flops(config: AotConfig, name: str, solver_steps: float) -> float:
    """FLOPs per token that the model asks for; the token that is decoded comes after a whole sequence."""
    length = config.data.length
    if name == "train":
        return training_flops(config.model, length, solver_steps)
    if name == "prefill":
        return forward_flops(config.model, length, solver_steps)
    return forward_flops(config.model, 1, solver_steps, context=length)


def memory_bytes(config: AotConfig, program: Compiled, mesh_shape: Mapping[str, int], num_parameters: int) -> float:
    """Bytes that a device reads from its memory and writes to it in one call, at least.

    Arguments are read, among them parameters in float32 and the state of what is decoded; results are written;
    temporary memory is written and read. Every product reads its matrix, in the type of the activations: forward, and
    in training for the gradient of its input and where it is computed again. Matrices that were gathered are written
    first, forward and backward; others are arguments, which their first product reads.
    """
    model, training = config.model, program.name == "train"
    matrices = num_parameters / mesh_shape["tensor"] * jnp.dtype(model.dtype).itemsize
    reads = 2 + (model.remat != "nothing") if training else 1
    writes = (2 if training else 1) if mesh_shape["fsdp"] > 1 else -1
    rounds = config.micro_batches if training else 1
    return program.arguments + program.results + 2 * program.temporary + rounds * (reads + writes) * matrices


def step_precision(solver: SolverConfig) -> str:
    """Returns the precision of most steps in the kernels for TPUs."""
    return solver.precisions(otherwise=MIXED)[-1]


def _charged_flops(config: AotConfig, name: str) -> float:
    """FLOPs per token, solves at the price of their precision, recomputation included."""
    dense = flops(config, name, 0)
    precision = "float32" if name == "decode" else step_precision(config.model.solver)
    solves = PASSES[precision] * (flops(config, name, config.solver_steps) - dense)
    if name == "train" and config.model.remat != "nothing":
        dense *= 4 / 3  # forward once more; with "all_but_solutions" the solves are kept
        solves *= 3 / 2 if config.model.remat == "everything" else 1
    return dense + solves
