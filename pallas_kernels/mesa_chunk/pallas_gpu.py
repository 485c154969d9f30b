"""The GPU kernel's adapter, for Ampere and Hopper by Pallas' Triton path: when it fits and how the arrays are laid out.

All is that of xla.py but the solve, which is most of the work and asks its tokens after every step whether to go on:
that is a kernel, one for both directions. What comes before and after it are batched products, left to the compiler.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.manual import result_like
from pallas_kernels.mesa_chunk import algebra, pallas_gpu_kernel, work, xla
from pallas_kernels.mesa_chunk.contract import MesaState, SolveReport
from pallas_kernels.mesa_chunk.nested import Factor
from pallas_kernels.mesa_chunk.solver import Solution, SolverConfig
from pallas_kernels.tiling import pad_axis, round_up

SMALLEST = 16  # side of a matrix product
LARGEST = 128  # key size; a program's vectors have to stay in registers


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """Changes the time, never the answer. Both numbers are powers of two, and at least 16.

    Attributes:
      chunk_length: tokens that share a state; a sequence of fewer has a chunk of its own length, rounded up.
      tokens: of those, how many a program solves.
      num_warps: that a program has.
    """

    chunk_length: int = 64
    tokens: int = 32
    num_warps: int = 8


def why_not(dtype: jnp.dtype, key_dim: int, value_dim: int) -> str | None:
    """Returns why the kernel cannot run in this type at these sizes, as part of a sentence, or None if it can.

    It never sees values, so they may have any size.
    """
    del value_dim
    if dtype != jnp.float32:
        return f"the kernel computes in float32, not in {jnp.dtype(dtype)}"
    if key_dim > LARGEST:
        return f"keys have size {key_dim}, and the kernel takes {LARGEST} at most"
    return None


def forward(
    q, k, v, log_decay, beta, ridge, state, starts, *, solver: SolverConfig, config=GpuConfig(), interpret=False
) -> tuple[jax.Array, MesaState, jax.Array, SolveReport, Factor | None]:
    """Returns what xla.forward does; the factors are those of this file's chunks."""
    length, key_dim = q.shape[1], q.shape[-1]
    cut = _cut(length, config)
    q, inputs = _pad(q, cut), _pad_inputs(k, v, log_decay, beta, ridge, state, starts, cut)
    solve = functools.partial(solve_tiles, gpu=config, interpret=interpret)
    out, final, x, report, factors = xla.forward(q, *inputs, solver=solver, config=cut, solve_tile=solve)
    report = SolveReport(*(y[:, :length] for y in report))
    return out[:, :length], _trim(final, key_dim), x, report, factors


def backward(
    inputs,
    x: jax.Array,
    factors: Factor | None,
    dout: jax.Array,
    dstate: MesaState,
    *,
    solver: SolverConfig,
    config=GpuConfig(),
    interpret=False,
) -> tuple:
    """Returns what xla.backward does; the factors are those of this file's chunks."""
    length, key_dim = dout.shape[1], inputs[0].shape[-1]
    cut = _cut(length, config)
    dout, dstate = _pad_time(dout, cut), _pad_state(dstate)
    solve = functools.partial(solve_tiles, gpu=config, interpret=interpret)
    dq, dk, *dtokens, dridge, dstate = xla.backward(
        _pad_inputs(*inputs, cut=cut), x, factors, dout, dstate, solver=solver, config=cut, solve_tile=solve
    )
    dq, dk = (y[:, :length, :, :key_dim] for y in (dq, dk))
    return dq, dk, *(y[:, :length] for y in dtokens), dridge[:, :key_dim], _trim(dstate, key_dim)


def solve_tiles(
    rhs: jax.Array,
    tiles: algebra.Tile,
    factors: Factor | None,
    solver: SolverConfig,
    *,
    gpu=GpuConfig(),
    interpret=False,
) -> Solution:
    """Solves what nested.solve_tile does, for tiles of whole blocks and any number of them."""
    *lead, k, c = rhs.shape
    num_tiles = math.prod(lead)
    programs = max(1, c // gpu.tokens)  # of a tile; they follow each other, so that its matrices are still in a cache
    # values, and decays between other tokens, are not read
    decays = tiles.decays._replace(out=None, together=None)
    usable, rest = (None, None) if factors is None else (factors.usable, factors._replace(usable=None))
    per_token, per_tile = (rhs, decays, usable), (tiles._replace(v=None, kv=None, decays=None), rest)
    leaves, structure = jax.tree.flatten((per_token, per_tile))
    num_split = len(jax.tree.leaves(per_token))
    arrays = [x.reshape(num_tiles, *x.shape[-2:]) for x in leaves]

    def mesa_chunk_solve(*refs):  # the Triton path calls a kernel by the name of its function
        (rhs, decays, usable), (tile, factor) = jax.tree.unflatten(structure, refs[: len(arrays)])
        factor = None if factor is None else factor._replace(usable=usable)
        results = Solution(*refs[len(arrays) :])
        pallas_gpu_kernel.solve(rhs, tile._replace(decays=decays), factor, results, config=solver)

    shape = functools.partial(result_like, arrays[0])
    results = Solution(
        solution=shape((num_tiles, k, c)),
        residual=shape((num_tiles, k, c)),
        num_steps=shape((num_tiles, 1, c), jnp.int32),
    )
    found = pl.pallas_call(
        mesa_chunk_solve,
        grid=(num_tiles * programs,),
        in_specs=[(_split if i < num_split else _whole)(x, programs) for i, x in enumerate(arrays)],
        out_specs=[_split(x, programs) for x in results],
        out_shape=list(results),
        compiler_params=triton.CompilerParams(num_warps=gpu.num_warps),
        cost_estimate=_cost(solver, k, num_tiles, c, [*arrays, *results]),
        interpret=interpret,
        name="mesa_chunk_solve",
    )(*arrays)
    return Solution(*(x.reshape(*lead, *x.shape[1:]) for x in found))


def _cut(length: int, config: GpuConfig) -> xla.XlaConfig:
    """Returns how sequences are cut, once they are padded to whole chunks."""
    return xla.XlaConfig(chunk_length=min(config.chunk_length, _block(length)))


def _pad_inputs(k, v, log_decay, beta, ridge, state, starts, cut: xla.XlaConfig) -> tuple:
    v, log_decay, beta, starts = (_pad_time(x, cut) for x in (v, log_decay, beta, starts))
    # channels that are not there have no keys; any ridge will do
    ridge = jnp.pad(ridge, ((0, 0), (0, _block(ridge.shape[-1]) - ridge.shape[-1])), constant_values=1)
    return _pad(k, cut), v, log_decay, beta, ridge, _pad_state(state), starts


def _pad_time(x: jax.Array, cut: xla.XlaConfig) -> jax.Array:
    """Pads [b, t, ...] to whole chunks."""
    return pad_axis(x, 1, round_up(x.shape[1], cut.chunk_length))


def _pad(x: jax.Array, cut: xla.XlaConfig) -> jax.Array:
    """Pads [b, t, h, k] to whole chunks of whole blocks."""
    return pad_axis(_pad_time(x, cut), 3, _block(x.shape[3]))


def _pad_state(state: MesaState) -> MesaState:
    """Pads the keys of a state to a whole block."""
    block = _block(state.kk.shape[-1])
    return MesaState(pad_axis(pad_axis(state.kk, 2, block), 3, block), pad_axis(state.kv, 2, block))


def _trim(state: MesaState, key_dim: int) -> MesaState:
    return MesaState(state.kk[..., :key_dim, :key_dim], state.kv[..., :key_dim, :])


def _block(size: int) -> int:
    """Returns the size of the smallest block that holds `size` entries."""
    return max(SMALLEST, pl.next_power_of_2(size))


def _whole(array, programs: int) -> pl.BlockSpec:
    """Block of all that an array [num_tiles, ...] has for a tile, the same for each of its programs."""
    return pl.BlockSpec((None, *array.shape[1:]), lambda i: (i // programs, 0, 0))


def _split(array, programs: int) -> pl.BlockSpec:
    """Block of the columns of an array [num_tiles, n, c] that one of the programs of a tile works on."""
    _, n, c = array.shape
    return pl.BlockSpec((None, n, c // programs), lambda i: (i // programs, 0, i % programs))


def _cost(solver: SolverConfig, k: int, num_tiles: int, c: int, arrays) -> pl.CostEstimate:
    """What a solve costs that takes all its steps, as most do not."""
    return pl.CostEstimate(
        flops=int(2 * num_tiles * c * work.steps(solver.max_steps, 1, k, c)),
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        transcendentals=0,
    )
