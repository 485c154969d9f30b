"""The TPU kernels' adapter: when they fit, how the arrays are laid out, what they cost.

The outline is that of xla.py: states are scanned over chunks, and everything else is local to a tile. Each of the
three functions of a tile is a kernel over tiles: forward solve and read-out, adjoint solve, gradients. Those that make
the factors are in pallas_tpu_factor.py.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.mesa_chunk import algebra, nested, pallas_tpu_factor, pallas_tpu_kernel, work
from pallas_kernels.mesa_chunk.chunks import scan_states, to_chunks, to_columns, to_rows, to_sequence
from pallas_kernels.mesa_chunk.contract import MesaState, SolveReport
from pallas_kernels.mesa_chunk.nested import Factor
from pallas_kernels.mesa_chunk.pallas_tpu_kernel import AdjointResults, ForwardResults, TileArrays
from pallas_kernels.mesa_chunk.pallas_tpu_tiles import LANES, TpuConfig, call
from pallas_kernels.mesa_chunk.solver import SolverConfig
from pallas_kernels.tiling import pad_axis, round_up

__all__ = ["TpuConfig", "adjoint_tiles", "backward", "cotangent_tiles", "forward", "forward_tiles", "why_not"]

LARGEST = 256


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
    tiles, final, _ = _tiles(k, v, log_decay, beta, ridge, state, starts, config)
    served = nested.serves(solver, min(length, config.chunk_length), key_dim)
    factors = pallas_tpu_factor.factors(tiles, config=config, interpret=interpret) if served else None
    columns = to_columns(_pad(q), config.chunk_length)
    found = forward_tiles(columns, tiles, factors, solver=solver, config=config, interpret=interpret)
    out, x, num_steps, residual = (to_sequence(y, length) for y in found)
    report = SolveReport(num_steps[..., 0].astype(jnp.int32), residual[..., 0])
    state = MesaState(final.kk[..., :key_dim, :key_dim], final.kv[..., :key_dim, :value_dim])
    return out[..., :value_dim], state, x[..., :key_dim], report, factors


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
    length, key_dim, value_dim, c = x.shape[1], x.shape[-1], dout.shape[-1], config.chunk_length
    tiles, _, through = _tiles(*inputs, config=config)
    x, dout = to_columns(_pad(x), c), to_columns(_pad(dout), c)
    y, residual, *added = adjoint_tiles(
        x, dout, tiles, factors, solver=solver.adjoint, config=config, interpret=interpret
    )
    k_pad = tiles.k.shape[-1]
    dstate = MesaState(_pad_square(dstate.kk), pad_axis(_pad(dstate.kv), 2, k_pad))
    after, dstate = scan_states(MesaState(*added), through, dstate, reverse=True)
    grads = cotangent_tiles(x, y, residual, dout, tiles, after, config=config, interpret=interpret)
    sequences = y if solver.max_steps else residual, grads.k, grads.v, grads.log_decay, grads.beta
    dq, dk, dv, dlog_decay, dbeta = (to_sequence(g, length) for g in sequences)
    dridge = jnp.sum(grads.ridge, axis=(0, 1))[..., :key_dim, 0]
    dstate = MesaState(dstate.kk[..., :key_dim, :key_dim], dstate.kv[..., :key_dim, :value_dim])
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
    x: jax.Array,
    dout: jax.Array,
    tiles: TileArrays,
    factors: Factor | None,
    *,
    solver: SolverConfig,
    config=TpuConfig(),
    interpret=False,
) -> AdjointResults:
    """Solves tiles [n, b, h, ...] backward for solutions x [n, b, h, k, c] and cotangents dout [n, b, h, v, c]."""
    (c, k), v = tiles.k.shape[-2:], tiles.v.shape[-1]
    body = functools.partial(pallas_tpu_kernel.adjoint, config=solver)
    shapes = AdjointResults((k, c), (k, c), (k, k), (k, v))
    flops = 2 * c * work.steps(solver.max_steps, 3, k, c)
    return call(body, "mesa_chunk_adjoint", (x, dout, tiles, factors), shapes, flops, config, interpret, memory=(k, c))


def cotangent_tiles(
    x, y, residual, dout, tiles: TileArrays, after: MesaState, *, config=TpuConfig(), interpret=False
) -> algebra.Cotangents:
    """Returns the gradients of tiles [n, b, h, ...]; `after` holds the cotangents of the states after each chunk."""
    (c, k), v = tiles.k.shape[-2:], tiles.v.shape[-1]
    shapes = algebra.Cotangents((k, c), (v, c), (1, c), (1, c), (k, 1))
    arguments = (x, y, residual, dout, tiles, *after)
    flops = 2 * c * work.cotangents(k, c)
    return call(pallas_tpu_kernel.cotangents, "mesa_chunk_cotangents", arguments, shapes, flops, config, interpret)


def _tiles(
    k, v, log_decay, beta, ridge, state: MesaState, starts, config: TpuConfig
) -> tuple[TileArrays, MesaState, jax.Array]:
    """Cuts padded sequences into tiles [n, b, h, ...]; also returns the final state and each chunk's decay [1, 1]."""
    c, (k, v) = config.chunk_length, (_pad(k), _pad(v))
    k_pad = k.shape[-1]
    starts = jnp.broadcast_to(starts[..., None], log_decay.shape)
    k, v = to_chunks(k, c), to_chunks(v, c)
    beta, log_decay, starts = (to_rows(x, c) for x in (beta, log_decay, starts))
    decays = algebra.cumulative_decays(log_decay, starts)  # all but a few rows of it falls away under jit
    state = MesaState(_pad_square(state.kk), pad_axis(_pad(state.kv), 2, k_pad))
    before, final = scan_states(MesaState(*algebra.added_states(k, v, beta, decays)), decays.through, state)
    # channels that are not there have no keys; any ridge will do
    ridge = jnp.pad(ridge, ((0, 0), (0, k_pad - ridge.shape[-1])), constant_values=1)
    ridge = jnp.broadcast_to(ridge[..., None], (*k.shape[:3], k_pad, 1))
    return TileArrays(k, v, beta, log_decay, starts, before.kk, before.kv, ridge), final, decays.through


def _pad(x: jax.Array) -> jax.Array:
    """Pads the last axis to whole registers."""
    return pad_axis(x, x.ndim - 1, round_up(x.shape[-1], LANES))


def _pad_square(x: jax.Array) -> jax.Array:
    return pad_axis(_pad(x), x.ndim - 2, round_up(x.shape[-2], LANES))
