"""The TPU kernels' adapter: when they fit, how the arrays are laid out, what they cost.

The outline is that of xla.py. Forward solve and read-out and the adjoint solve are kernels over tiles in any order.
States go through a kernel over chunks one after another, their cotangents through that of the gradients, last chunk
first. The kernels that make the factors are in pallas_tpu_factor.py.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.mesa_chunk import algebra, nested, pallas_tpu_factor, pallas_tpu_kernel, work
from pallas_kernels.mesa_chunk.chunks import to_chunks, to_columns, to_rows, to_sequence
from pallas_kernels.mesa_chunk.contract import MesaState, SolveReport
from pallas_kernels.mesa_chunk.nested import Factor
from pallas_kernels.mesa_chunk.pallas_tpu_kernel import (
    AdjointResults,
    ForwardResults,
    StatesAndForecast,
    StatesAndSystems,
    TileArrays,
)
from pallas_kernels.mesa_chunk.pallas_tpu_tiles import LANES, TpuConfig, call, fold
from pallas_kernels.mesa_chunk.solver import SolverConfig
from pallas_kernels.tiling import pad_axis, round_up

__all__ = [
    "TpuConfig",
    "adjoint_tiles",
    "backward",
    "cotangent_tiles",
    "forward",
    "forward_tiles",
    "state_and_system_tiles",
    "state_tiles",
    "why_not",
]

LARGEST = 256
Sequences = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]  # the first five of TileArrays


def why_not(dtype: jnp.dtype, key_dim: int, value_dim: int) -> str | None:
    """Returns why the kernels cannot run in this type at these sizes, as part of a sentence, or None if they can."""
    if dtype != jnp.float32:
        return f"the kernels compute in float32, not in {jnp.dtype(dtype)}"
    if jnp.result_type(float) == jnp.float64:  # the setting, also where a context manager made it
        return "kernels do not compile while jax_enable_x64 is on"
    if max(key_dim, value_dim) > LARGEST:
        return f"keys have size {key_dim} and values {value_dim}, and the kernels take {LARGEST} at most"
    return None


def forward(
    q, k, v, log_decay, beta, ridge, state, starts, *, solver: SolverConfig, config=TpuConfig(), interpret=False
) -> tuple[jax.Array, MesaState, jax.Array, SolveReport, Factor | None]:
    """Returns what xla.forward does; the factors are those of this file's chunks."""
    length, key_dim, value_dim = q.shape[1], q.shape[-1], v.shape[-1]
    sequences, rows = _cut(k, v, log_decay, beta, ridge, starts, config)
    state = _pad_state(state)
    if nested.serves(solver, min(length, config.chunk_length), key_dim):
        before, final = state_and_system_tiles(*sequences, rows, state, config=config, interpret=interpret)
        tiles = TileArrays(*sequences, before.kk, before.kv, rows)
        begun = before.system, before.expected
        factors = pallas_tpu_factor.factors(*begun, tiles, config=config, interpret=interpret)
    else:
        before, final = state_tiles(*sequences, state, config=config, interpret=interpret)
        tiles, factors = TileArrays(*sequences, *before, rows), None
    columns = to_columns(_pad(q), config.chunk_length)
    found = forward_tiles(columns, tiles, factors, solver=solver, config=config, interpret=interpret)
    out, num_steps, residual = (to_sequence(y, length) for y in (found.out, found.num_steps, found.residual))
    report = SolveReport(num_steps[..., 0].astype(jnp.int32), residual[..., 0])
    state = _cut_state(final, key_dim, value_dim)
    return out[..., :value_dim], state, found.solution, report, factors


def backward(
    inputs,
    x: jax.Array,
    factors: Factor | None,
    dout: jax.Array,
    dstate: MesaState,
    *,
    solver: SolverConfig,
    config=TpuConfig(),
    interpret=False,
) -> tuple:
    """Returns what xla.backward does; the factors are those of this file's chunks."""
    length, value_dim = dout.shape[1], dout.shape[-1]
    k, v, log_decay, beta, ridge, state, starts = inputs
    sequences, rows = _cut(k, v, log_decay, beta, ridge, starts, config)
    before, _ = state_tiles(*sequences, _pad_state(state), config=config, interpret=interpret)
    tiles = TileArrays(*sequences, *before, rows)
    key_dim, dout = k.shape[-1], to_columns(_pad(dout), config.chunk_length)
    y, residual = adjoint_tiles(dout, tiles, factors, solver=solver.adjoint, config=config, interpret=interpret)
    found = x, y, residual, dout, tiles, _pad_state(dstate)
    grads, dstate = cotangent_tiles(*found, config=config, interpret=interpret)
    sequences = y if solver.max_steps else residual, grads.k, grads.v, grads.log_decay, grads.beta
    dq, dk, dv, dlog_decay, dbeta = (to_sequence(g, length) for g in sequences)
    dridge = jnp.sum(grads.ridge, axis=(0, 1))[..., 0, :key_dim]
    dstate = _cut_state(dstate, key_dim, value_dim)
    gates = dlog_decay[..., 0], dbeta[..., 0]
    return dq[..., :key_dim], dk[..., :key_dim], dv[..., :value_dim], *gates, dridge, dstate


def forward_tiles(
    q: jax.Array,
    tiles: TileArrays,
    factors: Factor | None,
    *,
    solver: SolverConfig,
    config=TpuConfig(),
    interpret=False,
) -> ForwardResults:
    """Solves tiles [n, b, h, ...] for q [n, b, h, k, c] and reads them out."""
    (c, k), v = tiles.k.shape[-2:], tiles.v.shape[-1]
    body = functools.partial(pallas_tpu_kernel.forward, config=solver)
    shapes = ForwardResults((v, c), (k, c), (1, c), (1, c))
    flops = 2 * c * work.steps(solver.max_steps, 2, k, c)
    return call(body, "mesa_chunk_forward", (q, tiles, factors), shapes, flops, config, interpret, memory=(k, c))


def adjoint_tiles(
    dout: jax.Array,
    tiles: TileArrays,
    factors: Factor | None,
    *,
    solver: SolverConfig,
    config=TpuConfig(),
    interpret=False,
) -> AdjointResults:
    """Solves tiles [n, b, h, ...] backward for cotangents dout [n, b, h, v, c]."""
    c, k = tiles.k.shape[-2:]
    body = functools.partial(pallas_tpu_kernel.adjoint, config=solver)
    shapes = AdjointResults((k, c), (k, c))
    flops = 2 * c * work.steps(solver.max_steps, 2, k, c)
    return call(body, "mesa_chunk_adjoint", (dout, tiles, factors), shapes, flops, config, interpret, memory=(k, c))


def cotangent_tiles(
    x, y, residual, dout, tiles: TileArrays, dstate: MesaState, *, config=TpuConfig(), interpret=False
) -> tuple[algebra.Cotangents, MesaState]:
    """Returns the gradients of tiles [n, b, h, ...] and of the initial state, for those `dstate` of the final one."""
    (c, k), v = tiles.k.shape[-2:], tiles.v.shape[-1]
    body, name = pallas_tpu_kernel.cotangents, "mesa_chunk_cotangents"
    shapes = algebra.Cotangents((k, c), (v, c), (1, c), (1, c), (1, k))
    flops = 2 * c * work.cotangents(k, c)
    return fold(body, name, (x, y, residual, dout, tiles), dstate, shapes, flops, config, interpret, reverse=True)


def state_tiles(
    k, v, beta, log_decay, starts, state: MesaState, *, config=TpuConfig(), interpret=False
) -> tuple[MesaState, MesaState]:
    """Returns the states before tiles [n, b, h, ...], and the final one."""
    (c, key_dim), value_dim = k.shape[-2:], v.shape[-1]
    arguments, shapes = (k, v, beta, log_decay, starts), MesaState((key_dim, key_dim), (key_dim, value_dim))
    flops = 2 * c * key_dim * (key_dim + value_dim)
    return fold(pallas_tpu_kernel.states, "mesa_chunk_states", arguments, state, shapes, flops, config, interpret)


def state_and_system_tiles(
    k, v, beta, log_decay, starts, ridge, state: MesaState, *, config=TpuConfig(), interpret=False
) -> tuple[StatesAndSystems, MesaState]:
    """Returns what `state_tiles` does, and with the states the systems that factors begin with."""
    (c, key_dim), value_dim = k.shape[-2:], v.shape[-1]
    body, arguments = pallas_tpu_kernel.states_and_systems, (k, v, beta, log_decay, starts, ridge)
    begun = StatesAndForecast(*state, jnp.full((*k.shape[1:3], 1, 1), nested.NO_FORECAST, jnp.float32))
    shapes = StatesAndSystems((key_dim, key_dim), (key_dim, value_dim), (key_dim, key_dim), (1, 1))
    flops = 2 * c * key_dim * (key_dim + value_dim)
    before, final = fold(body, "mesa_chunk_states", arguments, begun, shapes, flops, config, interpret)
    return before, MesaState(final.kk, final.kv)


def _cut(k, v, log_decay, beta, ridge, starts, config: TpuConfig) -> tuple[Sequences, jax.Array]:
    """Cuts padded sequences into tiles [n, b, h, ...]; also returns their ridge."""
    c = config.chunk_length
    starts = jnp.broadcast_to(starts[..., None], log_decay.shape)
    k, v = to_chunks(_pad(k), c), to_chunks(_pad(v), c)
    beta, log_decay, starts = (to_rows(x, c) for x in (beta, log_decay, starts))
    # channels that are not there have no keys; any ridge will do
    ridge = jnp.pad(ridge, ((0, 0), (0, k.shape[-1] - ridge.shape[-1])), constant_values=1)
    ridge = jnp.broadcast_to(ridge[:, None, :], (*k.shape[:3], 1, k.shape[-1]))
    return (k, v, beta, log_decay, starts), ridge


def _pad(x: jax.Array) -> jax.Array:
    """Pads the last axis to whole registers."""
    return pad_axis(x, x.ndim - 1, round_up(x.shape[-1], LANES))


def _pad_state(state: MesaState) -> MesaState:
    kk, kv = map(_pad, state)
    return MesaState(pad_axis(kk, 2, kk.shape[-1]), pad_axis(kv, 2, kk.shape[-1]))


def _cut_state(state: MesaState, key_dim: int, value_dim: int) -> MesaState:
    return MesaState(state.kk[..., :key_dim, :key_dim], state.kv[..., :key_dim, :value_dim])
