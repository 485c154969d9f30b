"""How memory grows with the length of the sequence, and the time of a decoded token with its context."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.clock import take_turns
from pallas_kernels import MesaState, SolverConfig, mesa_chunk, mesa_step
from pallas_kernels.mesa_chunk.cases import Case, sample

TOKENS_PER_TURN = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak bytes of forward + backward per token and head, and the power of t they grow with."""

    lengths: tuple[int, ...]
    vectors_per_token: tuple[float, ...]  # in units of one float32 vector of the head's size
    exponent: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """Time of a token relative to the mean over contexts, and what one doubling of the context adds to it."""

    contexts: tuple[int, ...]
    relative_time: tuple[float, ...]
    slope_per_doubling: float
    standard_error: float


def peak_memory(case: Case, lengths: tuple[int, ...]) -> Memory:
    """Asks the compiler what each length needs beside inputs and outputs; nothing is run."""
    shapes = sample(dataclasses.replace(case, length=1))[:6]

    def loss(*arrays):
        return jnp.sum(mesa_chunk(*arrays)[0] ** 2)

    peaks = []
    for length in lengths:
        arrays = [jax.ShapeDtypeStruct((1, length, *x.shape[2:]), jnp.float32) for x in shapes[:5]]
        ridge = jax.ShapeDtypeStruct(shapes[5].shape, jnp.float32)
        compiled = jax.jit(jax.grad(loss, argnums=tuple(range(6)))).lower(*arrays, ridge).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None  # CPUs have one
        peaks.append(analysis.temp_size_in_bytes)
    exponent = np.polyfit(np.log(lengths), np.log(peaks), 1)[0]
    per_token = (peak / (4 * n * case.num_heads * case.key_dim) for n, peak in zip(lengths, peaks, strict=True))
    return Memory(lengths=lengths, vectors_per_token=tuple(per_token), exponent=float(exponent))


def decoding_time(case: Case, contexts: tuple[int, ...], rounds: int) -> Decoding:
    """Times `mesa_step` after contexts of different length; the slope's error comes from the spread over rounds."""
    step = jax.jit(functools.partial(mesa_step, solver=SolverConfig(tolerance=0.0)), donate_argnums=6)
    runs = {str(context): _decoder(step, case, context) for context in contexts}
    times = take_turns(runs, rounds)
    seconds = np.stack([times[str(context)].seconds for context in contexts])
    relative = seconds / seconds.mean(axis=0)
    slopes = np.polyfit(np.log2(contexts), relative, 1)[0]
    return Decoding(
        contexts=contexts,
        relative_time=tuple(float(x) for x in np.median(relative, axis=1)),
        slope_per_doubling=float(slopes.mean()),
        standard_error=float(slopes.std(ddof=1) / np.sqrt(rounds)),
    )


def _decoder(step, case: Case, context: int):
    """Returns a function that decodes some tokens after a context of the given length."""
    q, k, v, log_decay, beta, ridge = (
        jnp.asarray(x, jnp.float32) for x in sample(dataclasses.replace(case, length=context))[:6]
    )
    _, state = mesa_chunk(q, k, v, log_decay, beta, ridge, solver=SolverConfig(max_steps=0))
    token = [x[:, -1] for x in (q, k, v, log_decay, beta)]
    state = jax.tree.map(np.asarray, state)

    def decode():
        current = MesaState(*map(jnp.array, state))
        for _ in range(TOKENS_PER_TURN):
            _, current = step(*token, ridge, current)
        jax.block_until_ready(current)

    return decode
