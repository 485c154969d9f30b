"""The operators on a GPU, by every back end that runs there, against flash-linear-attention's Triton kernels.

Sequences come in bfloat16 and gates in float32, as layers hand them over; both sides get the same numbers. How well
systems are solved is computed in float64, from solutions as the steps of either side leave them. What layers then make
of these, and round, is compared with systems solved to rounding.
"""

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import contract, solver
from experiments.bench.clock import Ratio, ratio, take_turns
from pallas_kernels import MesaState, SolverConfig, mesa_chunk, mesa_step
from pallas_kernels.mesa_chunk import algebra, pallas_gpu, xla
from pallas_kernels.mesa_chunk.cases import STUDY, Case, Inputs, sample
from pallas_kernels.mesa_chunk.chunks import to_columns, to_sequence
from pallas_kernels.mesa_chunk.contract import zero_state
from pallas_kernels.mesa_chunk.solver import relative_size

BACK_ENDS = {"xla": xla, "pallas_gpu": pallas_gpu}
OURS = {
    "xla": ("xla", SolverConfig()),
    "pallas_gpu": ("pallas_gpu", SolverConfig()),
    "pallas_gpu, mixed": ("pallas_gpu", SolverConfig(precision="mixed")),
}
KINDS = {  # easy, in between and hard
    name: dataclasses.replace(STUDY[name], num_heads=16)
    for name in ("silu, 0.8-0.99", "low_rank, 0.95-1", "low_rank, 1")
}
DECODED_HEADS = 4096  # 1 GiB of states read and written: no cache holds it
DIFFERENT = 4  # sequences of them, repeated
REMEMBERED, DECODED = 1024, 16  # tokens before, and in one round: what a host has to say of each hides behind the last
TARGET_SHARE = 0.7  # of copying
THEIR_STEPS = 30.0
TRAINED = "| inputs | length | | ms | times faster | residual forward | adjoint | outputs | gradients |"
DECODING = "| inputs | | ms | of a copy | steps | outputs |"


class TrainRow(NamedTuple):
    """Forward and backward of one contestant on one kind of input."""

    inputs: str
    length: int
    contestant: str
    milliseconds: float  # of the best round
    faster: Ratio | None  # than the yardstick, if there is one
    residuals: tuple[float, float]  # worst true relative residual of the forward and of the adjoint solves
    errors: tuple[float, float]  # of outputs and of the worst of six gradients, in parts of the largest entry

    def __str__(self) -> str:
        faster = "" if self.faster is None else str(self.faster)
        shares = " | ".join(f"{x:.1e}" for x in (*self.residuals, *self.errors))
        return (
            f"| {self.inputs} | {self.length:,} | {self.contestant} | {self.milliseconds:.2f} | {faster} | {shares} |"
        )


class DecodeRow(NamedTuple):
    """One token of many heads by one contestant."""

    inputs: str
    contestant: str
    milliseconds: float  # a token, of the best round
    share: float  # of the speed at which as many bytes are copied
    steps: float | None  # a token, on average
    error: float | None  # of the outputs, in parts of the largest

    def __str__(self) -> str:
        steps = "" if self.steps is None else f"{self.steps:.1f}"
        error = "" if self.error is None else f"{self.error:.1e}"
        return f"| {self.inputs} | {self.contestant} | {self.milliseconds:.3f} | {self.share:.0%} | {steps} | {error} |"


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
    kinds: Mapping[str, Case] = KINDS,
    contestants: Mapping[str, tuple[str, SolverConfig]] = OURS,
) -> list[TrainRow]:
    """Measures training by turns, kind by kind and length by length, and prints rows as they come.

    Args:
      lengths: of sequences, each a divisor of the longest; there are as many tokens of every length.
      rounds: turns.
      theirs: module `triton_mesa`, or None.
      kinds: inputs by name.
      contestants: back ends of ours and how they solve, by name.
    """
    rows = []
    for kind, case in kinds.items():
        tokens = _rounded(sample(dataclasses.replace(case, length=max(lengths))))
        for length in lengths:
            operands = [x.reshape(-1, length, *x.shape[2:]) if x.ndim > 2 else x for x in tokens]
            layers = {name: Layer(operands, *ours) for name, ours in contestants.items()}
            solved = {name: layer.solutions() for name, layer in layers.items()}
            if theirs is not None:
                layers[theirs.NAME] = theirs.Layer(operands)
                solved[theirs.NAME] = theirs.solutions(operands, adjoint_rhs(operands))
            exact = Layer(operands, "xla", contract.TO_ROUNDING).results()
            times = take_turns({name: layer.train for name, layer in layers.items()}, rounds)
            for name, layer in layers.items():
                faster = None if theirs is None else ratio(times[theirs.NAME], times[name])
                out, *grads = map(contract.error, layer.results(), exact)
                residuals = true_residuals(operands, *solved[name])
                rows.append(TrainRow(kind, length, name, 1e3 * times[name].best, faster, residuals, (out, max(grads))))
                print(rows[-1], flush=True)
    return rows


def decode(
    rounds: int,
    theirs=None,
    *,
    num_heads: int = DECODED_HEADS,
    kinds: Mapping[str, Case] = KINDS,
    implementations: tuple[str, ...] = tuple(BACK_ENDS),
) -> list[DecodeRow]:
    """Measures single tokens of many heads with something to remember, beside copies of their states."""
    rows = []
    for kind, case in kinds.items():
        tokens, state = _remembered(case, num_heads)
        calls = {name: _decoder(tokens, state, name) for name in implementations}
        steps = {name: _num_steps(tokens[0], state, name) for name in implementations}
        if theirs is not None:
            calls[theirs.NAME] = theirs.decoder([tuple(map(np.asarray, x)) for x in tokens], *map(np.asarray, state))
            steps[theirs.NAME] = THEIR_STEPS
        exact = _decoder(tokens, state, "xla", contract.TO_ROUNDING)()
        errors = {name: contract.error(jnp.from_dlpack(call()), exact) for name, call in calls.items()}
        times = take_turns({"copy": _copier(state), **calls}, rounds)
        for name, x in times.items():
            share, milliseconds = times["copy"].best / x.best, 1e3 * x.best / DECODED
            rows.append(DecodeRow(kind, name, milliseconds, share, steps.get(name), errors.get(name)))
            print(rows[-1], flush=True)
    return rows


class Layer:
    """One contestant of ours on operands (q, k, v, log_decay, beta, ridge, dout), in numpy."""

    def __init__(self, operands: list[np.ndarray], implementation: str, config: SolverConfig):
        self._program = _program(implementation, config)
        self._operands = [jnp.asarray(x, jnp.bfloat16 if x.ndim == 4 else jnp.float32) for x in operands]

    def train(self):
        """Outputs, the solutions of the forward systems as tiles, and the gradients of the six inputs and the state."""
        return jax.block_until_ready(self._program(*self._operands))

    def results(self) -> list[np.ndarray]:
        """Outputs and the gradients of the six inputs, in float32."""
        out, _, (*grads, _) = self.train()
        return [np.asarray(x, np.float32) for x in (out, *grads)]

    def solutions(self) -> tuple[np.ndarray, np.ndarray]:
        """Solutions of the forward and of the adjoint systems, [b, t, h, k] each."""
        _, x, (y, *_) = self.train()  # the gradient of q is the adjoint solution
        return np.asarray(to_sequence(x, y.shape[1])[..., : y.shape[-1]]), np.asarray(y)


@functools.cache  # compiled once for kinds of the same shape
def _program(implementation: str, config: SolverConfig) -> Callable:
    """Returns what `mesa_chunk` computes in training, with what it knows of the solves."""
    back_end = BACK_ENDS[implementation]

    @jax.jit
    def train(*operands):
        q, *inputs, dout = (x.astype(jnp.float32) for x in operands)
        inputs = *inputs, zero_state(q, inputs[1]), jnp.zeros(q.shape[:2], jnp.int32)
        out, final, x, _, factors = back_end.forward(q, *inputs, solver=config)
        dstate = jax.tree.map(jnp.zeros_like, final)
        return out, x, back_end.backward(inputs, x, factors, dout, dstate, solver=config)

    return train


def adjoint_rhs(operands: list[np.ndarray]) -> np.ndarray:
    """Returns the right-hand sides [b, t, h, k] of the adjoint systems, computed in float64."""
    with jax.enable_x64(True):
        _, rhs = _right_hand_sides(*(jnp.asarray(a, jnp.float64) for a in operands))
        return np.asarray(to_sequence(rhs, operands[0].shape[1]))


def true_residuals(operands: list[np.ndarray], x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Returns the worst relative residuals of forward and adjoint solutions [b, t, h, k], in float64."""
    with jax.enable_x64(True):
        found = _residuals(*(jnp.asarray(a, jnp.float64) for a in (x, y, *operands)))
        return float(found[0]), float(found[1])


@jax.jit
def _residuals(x, y, *operands):
    _, _, tiles = solver.cut(operands)
    apply_matrix, c = algebra.matrix(tiles), tiles.k.shape[-2]
    pairs = zip((x, y), _right_hand_sides(*operands), strict=True)
    return [jnp.max(relative_size(rhs - apply_matrix(to_columns(found, c)), rhs)) for found, rhs in pairs]


@jax.jit
def _right_hand_sides(*operands):
    q, dout, tiles = solver.cut(operands)
    return q, algebra.adjoint_rhs(dout, tiles)


def _rounded(inputs: Inputs) -> list[np.ndarray]:
    """Returns operands in float32; those that a layer has in bfloat16 are rounded to it."""
    dout = np.random.default_rng(1).normal(size=inputs.v.shape)
    arrays = (np.asarray(x, np.float32) for x in (*inputs[:6], dout))
    return [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) if x.ndim == 4 else x for x in arrays]


def _remembered(case: Case, num_heads: int) -> tuple[list[tuple[jax.Array, ...]], MesaState]:
    """Returns tokens [b, h, ...] to decode, in float32, and the states that the tokens before them left."""
    inputs = sample(dataclasses.replace(case, batch=DIFFERENT, length=REMEMBERED + DECODED))
    *tokens, ridge = (jnp.float32(x) for x in inputs[:6])
    _, state = mesa_chunk(*(x[:, :REMEMBERED] for x in tokens), ridge=ridge, implementation="xla")
    times = num_heads // (DIFFERENT * case.num_heads)
    tokens, state = jax.tree.map(
        lambda x: jnp.tile(x, (times,) + (1,) * (x.ndim - 1)), ([x[:, REMEMBERED:] for x in tokens], state)
    )
    return [(*(x[:, t] for x in tokens), ridge) for t in range(DECODED)], state


def _decoder(tokens, state: MesaState, implementation: str, config: SolverConfig = SolverConfig()):
    """Returns a function that decodes tokens in the place of their state, and goes on from there."""
    step = jax.jit(functools.partial(mesa_step, implementation=implementation, solver=config), donate_argnums=6)
    held = [jax.tree.map(jnp.copy, state)]

    def run():
        out = None
        for token in tokens:
            out, held[0] = step(*token, held[0])
        return jax.block_until_ready((out, held[0]))[0]

    return run


def _copier(state: MesaState) -> Callable[[], object]:
    """Returns a function that reads and writes as many bytes as those tokens have to."""
    negate = jax.jit(lambda state: jax.tree.map(jnp.negative, state), donate_argnums=0)
    held = [jax.tree.map(jnp.copy, state)]

    def run():
        for _ in range(DECODED):
            held[0] = negate(held[0])
        jax.block_until_ready(held[0])

    return run


def _num_steps(token, state: MesaState, implementation: str) -> float:
    _, _, report = mesa_step(*token, state=state, with_report=True, implementation=implementation)
    return float(jnp.mean(report.num_steps))


def lines(training: list[TrainRow], decoding: list[DecodeRow], theirs) -> list[str]:
    """Returns tables; times are absolute, and of the device that is named."""
    heads = next(iter(KINDS.values())).num_heads
    return [
        f"{jax.devices()[0].device_kind}, {heads} heads of size 128, as many tokens in sequences of each length, "
        f"forward and backward: worst true residuals, and errors in parts of the largest entry. {versus(theirs)}",
        "",
        *_titles(TRAINED),
        *map(str, training),
        "",
        f"One token of {DECODED_HEADS:,} heads that remember {REMEMBERED:,}, beside a copy of their states; at least "
        f"{TARGET_SHARE:.0%} of its bandwidth is the aim.",
        "",
        *_titles(DECODING),
        *map(str, decoding),
    ]


def _titles(titles: str) -> list[str]:
    return [titles, "|---" * (titles.count("|") - 1) + "|"]


def versus(theirs) -> str:
    """Returns what ours are compared with, as a sentence, or why with nothing."""
    if isinstance(theirs, str):
        return theirs
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("fla-core", "torch", "triton"))
    return f"Quartiles in brackets; {theirs.NAME} is flash-linear-attention with {THEIR_STEPS:.0f} steps ({versions})."
