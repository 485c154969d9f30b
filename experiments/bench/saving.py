"""What saving costs a training: steps of the 145m model, a checkpoint a minute against none."""

import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments.checkpoints import Checkpoints
from experiments.data import DataConfig
from experiments.mesh import MeshConfig, make_mesh
from experiments.programs import Programs
from experiments.runs import RunConfig
from mesanet_jax import SIZES
from mesanet_jax.loss import Batch

SECONDS = 60.0  # from one checkpoint to the next


class Stall(NamedTuple):
    """1 + what a checkpoint adds to the steps it begins, over the time between two checkpoints: a ratio each round."""

    size: str
    gigabytes: float
    steps: int  # between two checkpoints
    ratios: tuple[float, ...]


def measure(rounds: int, size: str = "145m", length: int = 128, seconds: float = SECONDS) -> Stall:
    """Lets steps with and without a checkpoint take turns, on all CPU devices."""
    config = RunConfig(model=SIZES[size], data=DataConfig(length=length, batch_size=len(jax.devices())))
    mesh = make_mesh(MeshConfig())
    programs = Programs.make(config, mesh)
    shape = programs.batch_shapes(config).tokens.shape
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    batch = programs.place(Batch(tokens, np.zeros_like(tokens)))
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder), keep=1) as checkpoints:
        state, _ = programs.train(programs.init(jax.random.key(0)), batch)

        def steps(state, number: int):
            begin = time.perf_counter()
            for _ in range(number):
                state, _ = programs.train(state, batch)
            jax.block_until_ready(state)
            return state, time.perf_counter() - begin

        state, _ = steps(state, 3)  # what comes first takes longer, saving too
        checkpoints.save(0, state)
        checkpoints.wait()
        state, several = steps(state, 3)
        number = max(1, round(seconds / (several / 3)))
        ratios = []
        for turn in range(1, rounds + 1):
            state, without = steps(state, number)
            begin = time.perf_counter()
            checkpoints.save(turn, state)
            blocked = time.perf_counter() - begin
            state, after = steps(state, number)
            checkpoints.wait()
            ratios.append(1 + (blocked + after - without) / seconds)
        size_on_disk = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return Stall(size, size_on_disk / 1e9, number, tuple(ratios))


def lines(stall: Stall) -> list[str]:
    """One sentence."""
    low, middle, high = np.quantile(stall.ratios, [0.25, 0.5, 0.75])
    return [
        f"A checkpoint a minute of the {stall.size} model ({stall.gigabytes:.2f} GB, {stall.steps} steps in it) makes "
        f"training take {middle:.3f} times as long (quartiles of {len(stall.ratios)} rounds {low:.3f} to {high:.3f})."
    ]
