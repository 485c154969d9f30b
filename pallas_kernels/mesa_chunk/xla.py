"""Chunkwise Mesa in jax.numpy: runs on every platform, and is the yardstick of the kernels.

States are scanned over chunks; everything else is local to a tile (one chunk of one head). On a CPU the tiles are
mapped one after another, which keeps a tile in cache and lets each stop its solve by itself; on accelerators all tiles
are one batch.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.mesa_chunk import algebra
from pallas_kernels.mesa_chunk.contract import MesaState, SolveReport
from pallas_kernels.mesa_chunk.solver import SolverConfig
from pallas_kernels.tiling import pad_axis, round_up


@dataclasses.dataclass(frozen=True)
class XlaConfig:
    """Changes the time, never the answer.

    Attributes:
      chunk_length: tokens a tile holds. On CPUs 64 is the fastest of 32, 64 and 128 for key size 128; for 64, where 32
        is as fast, it holds half the states.
    """

    chunk_length: int = 64


def forward(
    q, k, v, log_decay, beta, ridge, state, starts, *, solver: SolverConfig, with_report: bool, config=XlaConfig()
) -> tuple[jax.Array, MesaState, jax.Array, SolveReport | None]:
    """Returns outputs [b, t, h, v], the final state, the solutions [b, t, h, k] and, if asked for, their report."""
    length = q.shape[1]
    tiles, final = _tiles(k, v, log_decay, beta, ridge, state, starts, config)

    def solve_and_read(inputs):
        q, tile = inputs
        found = algebra.solve(q, tile, solver)
        x = found.solution if solver.max_steps else q
        checked = SolveReport(found.num_steps, algebra.true_residual(q, x, tile)) if with_report else None
        return algebra.read_out(x, tile), x, checked

    results = _map_tiles(solve_and_read, (_to_chunks(q, config), tiles))
    out, x, checked = jax.tree.map(lambda y: _to_sequence(y, length), results)
    return out, final, x, checked


def backward(
    inputs, x: jax.Array, dout: jax.Array, dstate: MesaState, *, solver: SolverConfig, config=XlaConfig()
) -> tuple:
    """Returns the cotangents of (q, k, v, log_decay, beta, ridge, state).

    Args:
      inputs: (k, v, log_decay, beta, ridge, state, starts) of the forward call.
      x: its solutions [b, t, h, k].
      dout, dstate: cotangents of the outputs [b, t, h, v] and of the final state.
    """
    length = x.shape[1]
    tiles, _ = _tiles(*inputs, config=config)
    x, dout = _to_chunks(x, config), _to_chunks(dout, config)

    def solve_adjoint(inputs):
        x, dout, tile = inputs
        rhs = algebra.adjoint_rhs(dout, tile)
        adjoint = algebra.solve(rhs, tile, solver)
        dq = adjoint.solution if solver.max_steps else rhs
        return dq, adjoint, algebra.added_cotangents(x, adjoint, dout, tile.decays)

    dq, adjoint, added = _map_tiles(solve_adjoint, (x, dout, tiles))
    after, dstate = _scan_states(MesaState(*added), tiles.decays.through, dstate, reverse=True)
    grads = _map_tiles(lambda inputs: algebra.cotangents(*inputs), (x, adjoint, dout, tiles, *after))
    sequences = (_to_sequence(g, length) for g in (dq, grads.k, grads.v, grads.log_decay, grads.beta))
    return (*sequences, jnp.sum(grads.ridge, axis=(0, 1)), dstate)


def _tiles(k, v, log_decay, beta, ridge, state: MesaState, starts, config: XlaConfig) -> tuple[algebra.Tile, MesaState]:
    """Cuts the sequences into tiles, [n, b, h, ...] each, and carries the state through; also returns the final one."""
    starts = jnp.broadcast_to(starts[..., None], log_decay.shape)
    k, v, beta, *gates = (_to_chunks(x, config) for x in (k, v, beta, log_decay, starts))

    def accumulate(inputs):
        k, v, beta, gates = inputs
        decays = algebra.cumulative_decays(*gates)
        return decays, algebra.added_states(k, v, beta, decays)

    decays, added = _map_tiles(accumulate, (k, v, beta, gates))
    before, final = _scan_states(MesaState(*added), decays.through, state)
    ridge = jnp.broadcast_to(ridge, (*k.shape[:3], ridge.shape[-1]))
    return algebra.Tile(k, v, beta, decays, before.kk, before.kv, ridge), final


def _scan_states(
    added: MesaState, through: jax.Array, state: MesaState, reverse: bool = False
) -> tuple[MesaState, MesaState]:
    """Runs state <- through * state + added over chunks; returns the states each chunk starts from, and the last."""

    def chunk(state, inputs):
        through, added = inputs
        return jax.tree.map(lambda s, a: through[..., None, None] * s + a, state, added), state

    final, before = jax.lax.scan(chunk, state, (through, added), reverse=reverse)
    return before, final


def _map_tiles(function, tiles):
    """Applies `function` to arrays that start with the axes [n, b, h], each index of which is a tile."""
    lead = jax.tree.leaves(tiles)[0].shape[:3]

    def one_by_one(tiles):
        results = jax.lax.map(function, jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), tiles))
        return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), results)

    return dispatch.by_platform(tiles, cpu=one_by_one, accelerator=function)


def _to_chunks(x: jax.Array, config: XlaConfig) -> jax.Array:
    """[b, t, h, ...] -> [n, b, h, c, ...]; chunks share the tokens evenly, so that padding stays below n tokens."""
    length = x.shape[1]
    num_chunks = -(-length // config.chunk_length)
    x = pad_axis(x, 1, round_up(length, num_chunks))
    x = x.reshape(x.shape[0], num_chunks, -1, *x.shape[2:])
    return jnp.moveaxis(x, (1, 3), (0, 2))


def _to_sequence(x: jax.Array, length: int) -> jax.Array:
    """[n, b, h, c, ...] -> [b, t, h, ...], dropping the padding."""
    x = jnp.moveaxis(x, (0, 2), (1, 3))
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
