"""The operators on a GPU, by every back end that runs there, against flash-linear-attention's Triton kernels.

Sequences come in bfloat16 and gates in float32, as layers hand them over; both sides get the same numbers. How well
systems are solved is computed in float64, from the solutions of either side. Those of theirs are of the same numbers in
float32: the gradient of a query would be rounded to bfloat16, which is not the solver's doing.
"""

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import contract, solver
from experiments.bench.clock import Ratio, ratio, take_turns
from pallas_kernels import MesaState, SolverConfig, mesa_step
from pallas_kernels.mesa_chunk import algebra, pallas_gpu, xla
from pallas_kernels.mesa_chunk.cases import STUDY, Case, Inputs, sample
from pallas_kernels.mesa_chunk.chunks import to_columns, to_sequence
from pallas_kernels.mesa_chunk.contract import zero_state
from pallas_kernels.mesa_chunk.solver import relative_size

BACK_ENDS = {"xla": xla, "pallas_gpu": pallas_gpu}
OURS = (("xla", None), ("pallas_gpu", None), ("pallas_gpu", "mixed"))  # back ends and precisions of steps
KINDS = ("silu, 0.8-0.99", "low_rank, 0.95-1", "low_rank, 1")  # easy, in between and hard
NUM_HEADS = 16
DECODED_HEADS = 4096  # 1 GiB of states read and written: no cache holds it
TARGET_SHARE = 0.7  # of copying


class TrainRow(NamedTuple):
    """Forward and backward of one contestant on one kind of input."""

    inputs: str
    length: int
    contestant: str
    milliseconds: float  # of the best round
    faster: Ratio | None  # than the yardstick, if there is one
    residuals: tuple[float, float]  # worst true relative residual of the forward and of the adjoint solves


class DecodeRow(NamedTuple):
    """One token of many heads by one contestant."""

    contestant: str
    milliseconds: float  # of the best round
    share: float  # of the speed at which as many bytes are copied


def check(names: tuple[str, ...] = contract.CHECKED) -> None:
    """Raises UserError if a back end is wrong on one of the named cases, forward, backward or for one token."""
    for implementation in BACK_ENDS:
        contract.check(names, implementation)
        contract.check_step(names, implementation)


def yardstick() -> ModuleType | str:
    """Returns the module of flash-linear-attention's kernels, or why there is none here, as a sentence."""
    try:
        from experiments.bench import triton_mesa
    except ImportError as error:
        return f"flash-linear-attention's kernels are not here ({error}); the extra `bench` brings them."
    if triton_mesa.DEVICE == "cpu":
        return "flash-linear-attention's kernels are not here: PyTorch has found no GPU."
    return triton_mesa


def compare(
    lengths: tuple[int, ...],
    rounds: int,
    theirs=None,
    *,
    kinds: dict[str, Case] | None = None,
    contestants: tuple[tuple[str, str | None], ...] = OURS,
) -> list[TrainRow]:
    """Measures training by turns, kind by kind and length by length.

    Args:
      lengths: of sequences, each a divisor of the longest; there are as many tokens of every length.
      rounds: turns.
      theirs: module `triton_mesa`, or None.
      kinds: inputs by name; None takes KINDS of the study, in NUM_HEADS heads.
      contestants: back ends of ours, and how precise their steps are.
    """
    if kinds is None:
        kinds = {name: dataclasses.replace(STUDY[name], num_heads=NUM_HEADS) for name in KINDS}
    rows = []
    for name, kind in kinds.items():
        tokens = _rounded(sample(dataclasses.replace(kind, length=max(lengths))))
        for length in lengths:
            operands = [x.reshape(-1, length, *x.shape[2:]) if x.ndim > 2 else x for x in tokens]
            layers = {_label(*ours): Layer(operands, *ours) for ours in contestants}
            if theirs is not None:
                layers[theirs.NAME] = theirs.Layer(operands)
            times = take_turns({who: layer.train for who, layer in layers.items()}, rounds)
            for who, layer in layers.items():
                faster = None if theirs is None else ratio(times[theirs.NAME], times[who])
                best = 1e3 * times[who].best
                rows.append(TrainRow(name, length, who, best, faster, true_residuals(operands, *layer.solutions())))
            print(f"{name}, {length:,} tokens: done", flush=True)
    return rows


def decode(
    rounds: int, theirs=None, *, num_heads: int = DECODED_HEADS, dim: int = 128, implementations=tuple(BACK_ENDS)
) -> list[DecodeRow]:
    """Measures one token of many heads, beside a copy of their states."""
    kind = dataclasses.replace(STUDY["one token"], batch=num_heads // NUM_HEADS, num_heads=NUM_HEADS)
    inputs = sample(dataclasses.replace(kind, key_dim=dim, value_dim=dim))
    token = [jnp.float32(x[:, 0]) for x in inputs[:5]] + [jnp.float32(inputs.ridge)]
    state = MesaState(jnp.float32(inputs.kk), jnp.float32(inputs.kv))
    calls = {"copy": _copier(state)} | {name: _decoder(token, state, name) for name in implementations}
    if theirs is not None:
        calls[theirs.NAME] = theirs.decoder(*map(np.asarray, (*token, *state)))
    times = take_turns(calls, rounds)
    return [DecodeRow(name, 1e3 * x.best, times["copy"].best / x.best) for name, x in times.items()]


class Layer:
    """One contestant of ours on operands (q, k, v, log_decay, beta, ridge, dout), in numpy."""

    def __init__(self, operands: list[np.ndarray], implementation: str, precision: str | None):
        self._program = _program(implementation, precision)
        self._operands = [jnp.asarray(x, jnp.bfloat16 if x.ndim == 4 else jnp.float32) for x in operands]

    def train(self):
        """Outputs, the solutions of the forward systems as tiles, and the gradients of the six inputs and the state."""
        return jax.block_until_ready(self._program(*self._operands))

    def solutions(self) -> tuple[np.ndarray, np.ndarray]:
        """Solutions of the forward and of the adjoint systems, [b, t, h, k] each."""
        _, x, (y, *_) = self.train()  # the gradient of q is the adjoint solution
        return np.asarray(to_sequence(x, y.shape[1])[..., : y.shape[-1]]), np.asarray(y)


@functools.cache  # GPUs' compilers take minutes for these
def _program(implementation: str, precision: str | None) -> Callable:
    """Returns what `mesa_chunk` computes in training, with what it knows of the solves."""
    back_end, config = BACK_ENDS[implementation], SolverConfig(precision=precision)

    @jax.jit
    def train(*operands):
        q, *inputs, dout = (x.astype(jnp.float32) for x in operands)
        inputs = *inputs, zero_state(q, inputs[1]), jnp.zeros(q.shape[:2], jnp.int32)
        out, final, x, _, factors = back_end.forward(q, *inputs, solver=config)
        dstate = jax.tree.map(jnp.zeros_like, final)
        return out, x, back_end.backward(inputs, x, factors, dout, dstate, solver=config)

    return train


def true_residuals(operands: list[np.ndarray], x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Returns the worst relative residuals of forward and adjoint solutions [b, t, h, k], in float64."""
    with jax.enable_x64(True):
        found = _residuals(*(jnp.asarray(a, jnp.float64) for a in (x, y, *operands)))
        return float(found[0]), float(found[1])


@jax.jit
def _residuals(x, y, *operands):
    q, dout, tiles = solver.cut(operands)
    apply_matrix, c = algebra.matrix(tiles), tiles.k.shape[-2]
    pairs = (q, x), (algebra.adjoint_rhs(dout, tiles), y)
    return [jnp.max(relative_size(rhs - apply_matrix(to_columns(found, c)), rhs)) for rhs, found in pairs]


def _rounded(inputs: Inputs) -> list[np.ndarray]:
    """Returns operands in float32; those that a layer has in bfloat16 are rounded to it."""
    dout = np.random.default_rng(1).normal(size=inputs.v.shape)
    arrays = (np.asarray(x, np.float32) for x in (*inputs[:6], dout))
    return [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) if x.ndim == 4 else x for x in arrays]


def _decoder(token: list[jax.Array], state: MesaState, implementation: str) -> Callable[[], object]:
    """Returns a function that decodes a token, in the place of its state."""
    step = jax.jit(functools.partial(mesa_step, implementation=implementation), donate_argnums=6)
    held = [jax.tree.map(jnp.copy, state)]

    def run():
        _, held[0] = jax.block_until_ready(step(*token, held[0]))

    return run


def _copier(state: MesaState) -> Callable[[], object]:
    """Returns a function that reads and writes as many bytes as a token has to."""
    negate = jax.jit(lambda state: jax.tree.map(jnp.negative, state), donate_argnums=0)
    held = [jax.tree.map(jnp.copy, state)]

    def run():
        held[0] = jax.block_until_ready(negate(held[0]))

    return run


def _label(implementation: str, precision: str | None) -> str:
    return f"{implementation}, {precision}" if precision else implementation


def lines(training: list[TrainRow], decoding: list[DecodeRow], theirs) -> list[str]:
    """Returns tables; times are absolute, and of the device that is named."""
    titles = ["inputs", "length", "", "ms", "times faster", "worst residual, forward", "adjoint"]
    found = [
        f"{jax.devices()[0].device_kind}, {NUM_HEADS} heads of size 128, as many tokens in sequences of each length, "
        f"forward and backward. {_versus(theirs)}",
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
    ]
    for row in training:
        faster = "" if row.faster is None else str(row.faster)
        residuals = " | ".join(f"{x:.1e}" for x in row.residuals)
        found.append(
            f"| {row.inputs} | {row.length:,} | {row.contestant} | {row.milliseconds:.2f} | {faster} | {residuals} |"
        )
    found += [
        "",
        f"One token of {DECODED_HEADS:,} heads beside a copy of their states; at least {TARGET_SHARE:.0%} is the aim.",
        "",
        "| | ms | of the copy's bandwidth |",
        "|---|---|---|",
        *(f"| {row.contestant} | {row.milliseconds:.3f} | {row.share:.0%} |" for row in decoding),
    ]
    return found


def _versus(theirs) -> str:
    if isinstance(theirs, str):
        return theirs
    return f"Quartiles in brackets; {theirs.NAME} is flash-linear-attention {importlib.metadata.version('fla-core')}."
