"""Chunkwise Mesa in jax.numpy: runs on every platform, and is the yardstick of the kernels.

States are scanned over chunks; everything else is local to a tile (one chunk of one head). On a CPU the tiles are
mapped one after another, which keeps a tile in cache and lets each stop its solve by itself; on accelerators all tiles
are one batch.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.mesa_chunk import algebra, nested
from pallas_kernels.mesa_chunk.chunks import even_length, scan_states, to_chunks, to_columns, to_rows, to_sequence
from pallas_kernels.mesa_chunk.contract import MesaState, SolveReport
from pallas_kernels.mesa_chunk.nested import Factor
from pallas_kernels.mesa_chunk.solver import Solution, SolverConfig, relative_size


@dataclasses.dataclass(frozen=True)
class XlaConfig:
    """Changes the time, never the answer.

    Attributes:
      chunk_length: tokens a tile holds. On CPUs 64 is the fastest of 32, 64 and 128 for key size 128; for 64, where 32
        is as fast, it holds half the states.
    """

    chunk_length: int = 64


def forward(
    q,
    k,
    v,
    log_decay,
    beta,
    ridge,
    state,
    starts,
    *,
    solver: SolverConfig,
    config=XlaConfig(),
    solve_tile: Callable[..., Solution] = nested.solve_tile,
) -> tuple[jax.Array, MesaState, jax.Array, SolveReport, Factor | None]:
    """Returns outputs [b, t, h, v], the final state, the tiles' solutions, their report, the tiles' factors.

    Solutions and factors, [n, b, h, ...], are for `backward` alone. `solve_tile` takes and returns what that of
    nested.py does, on a CPU for one tile, elsewhere for all in one batch.
    """
    length, c = q.shape[1], even_length(q.shape[1], config.chunk_length)
    tiles, final = cut(k, v, log_decay, beta, ridge, state, starts, config)

    def solve_and_read(inputs):
        q, tile, expected = inputs
        if not solver.max_steps:
            report = jnp.zeros_like(tile.decays.into, jnp.int32), relative_size(q - algebra.matrix(tile)(q), q)
            return algebra.read_out(q, tile), q, report, None
        factor = factor_tile(tile, expected, solver)
        found = solve_tile(q, tile, factor, solver)
        report = found.num_steps, relative_size(found.residual, q)
        return algebra.read_out(found.solution, tile), found.solution, report, factor

    arrays = to_columns(q, c), tiles, nested.expected_decays(tiles.decays)
    out, x, report, factors = _map_tiles(solve_and_read, arrays)
    out, (num_steps, residual) = jax.tree.map(lambda y: to_sequence(y, length), (out, report))
    return out, final, x, SolveReport(num_steps[..., 0], residual[..., 0]), factors


def backward(
    inputs,
    x: jax.Array,
    factors: Factor | None,
    dout: jax.Array,
    dstate: MesaState,
    *,
    solver: SolverConfig,
    config=XlaConfig(),
    solve_tile: Callable[..., Solution] = nested.solve_tile,
) -> tuple:
    """Returns the cotangents of (q, k, v, log_decay, beta, ridge, state).

    Args:
      inputs: (k, v, log_decay, beta, ridge, state, starts) of the forward call.
      x: its solutions.
      factors: its factors, if it had any.
      dout, dstate: cotangents of the outputs [b, t, h, v] and of the final state.
      solver, config, solve_tile: as in `forward`.
    """
    length = dout.shape[1]
    tiles, _ = cut(*inputs, config=config)
    dout = to_columns(dout, even_length(length, config.chunk_length))

    def solve_adjoint(inputs):
        x, dout, tile, factor = inputs
        rhs = algebra.adjoint_rhs(dout, tile)
        adjoint = solve_tile(rhs, tile, factor, solver.adjoint)
        dq = adjoint.solution if solver.max_steps else rhs
        return dq, adjoint, algebra.added_cotangents(x, adjoint.solution, dout, tile.decays)

    dq, adjoint, added = _map_tiles(solve_adjoint, (x, dout, tiles, factors))
    after, dstate = scan_states(MesaState(*added), tiles.decays.through, dstate, reverse=True)
    arrays = (x, adjoint.solution, adjoint.residual, dout, tiles, *after)
    grads = _map_tiles(lambda inputs: algebra.cotangents(*inputs), arrays)
    sequences = dq, grads.k, grads.v, grads.log_decay, grads.beta
    dq, dk, dv, dlog_decay, dbeta = (to_sequence(g, length) for g in sequences)
    return dq, dk, dv, dlog_decay[..., 0], dbeta[..., 0], jnp.sum(grads.ridge, axis=(0, 1))[..., 0], dstate


def factor_tile(tile: algebra.Tile, expected: jax.Array, solver: SolverConfig) -> Factor | None:
    """Factors a tile of this expected log decay where that is worth it; None if the solver uses no factors at all."""
    if not nested.serves(solver, *tile.k.shape[-2:]):
        return None
    worth = jnp.any(nested.is_worth_it(expected))
    return jax.lax.cond(worth, nested.make_factor, nested.no_factor, tile, expected)


def cut(k, v, log_decay, beta, ridge, state: MesaState, starts, config: XlaConfig) -> tuple[algebra.Tile, MesaState]:
    """Cuts the sequences into tiles, [n, b, h, ...] each, and carries the state through; also returns the final one."""
    c = even_length(k.shape[1], config.chunk_length)
    starts = jnp.broadcast_to(starts[..., None], log_decay.shape)
    k, v = to_chunks(k, c), to_chunks(v, c)
    beta, *gates = (to_rows(x, c) for x in (beta, log_decay, starts))

    def accumulate(inputs):
        k, v, beta, gates = inputs
        decays = algebra.cumulative_decays(*gates)
        return decays, algebra.added_states(k, v, beta, decays)

    decays, added = _map_tiles(accumulate, (k, v, beta, gates))
    before, final = scan_states(MesaState(*added), decays.through, state)
    ridge = jnp.broadcast_to(ridge[..., None], (*k.shape[:3], ridge.shape[-1], 1))
    return algebra.Tile(k, v, beta, decays, before.kk, before.kv, ridge), final


def _map_tiles(function, tiles):
    """Applies `function` to arrays that start with the axes [n, b, h], each index of which is a tile."""
    lead = jax.tree.leaves(tiles)[0].shape[:3]

    def one_by_one(tiles):
        results = jax.lax.map(function, jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), tiles))
        return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), results)

    return dispatch.by_platform(tiles, cpu=one_by_one, accelerator=function)
