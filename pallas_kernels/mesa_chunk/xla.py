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
      chunk_length: tokens a tile holds. 64 is the fastest of 32, 64, 128, 256 for key sizes 32 to 128 (`make bench`).
    """

    chunk_length: int = 64


def forward(
    q, k, v, log_decay, beta, ridge, state, starts, *, solver: SolverConfig, with_report: bool, config=XlaConfig()
) -> tuple[jax.Array, MesaState, jax.Array, SolveReport | None]:
    """Returns outputs [b, t, h, v], the final state, the solutions [b, t, h, k] and, if asked for, their report."""
    length = q.shape[1]
    queries = _to_chunks(q, config)
    chunks = algebra.Chunk(*(_to_chunks(x, config) for x in (k, v, log_decay, beta, _per_head(starts, k))))
    before, state, _ = _states(chunks, state)

    def solve_and_read(tiles):
        q, chunk, kk, kv, ridge = tiles
        tile = algebra.make_tile(chunk, kk, kv, ridge)
        found = algebra.solve(q, tile, solver)
        x = found.solution if solver.max_steps else q
        checked = SolveReport(found.num_steps, algebra.true_residual(q, x, tile)) if with_report else None
        return algebra.read_out(x, tile), x, checked

    results = _map_tiles(solve_and_read, (queries, chunks, *before, _per_chunk(ridge, queries)))
    out, x, checked = jax.tree.map(lambda y: _to_sequence(y, length), results)
    return out, state, x, checked


def backward(
    inputs, x: jax.Array, dout: jax.Array, dstate: MesaState, *, solver: SolverConfig, config=XlaConfig()
) -> tuple:
    """Returns the cotangents of (q, k, v, log_decay, beta, ridge, state).

    Args:
      inputs: (k, v, log_decay, beta, ridge, state, starts) of the forward call.
      x: its solutions [b, t, h, k].
      dout, dstate: cotangents of the outputs [b, t, h, v] and of the final state.
    """
    k, v, log_decay, beta, ridge, state, starts = inputs
    length = k.shape[1]
    chunks = algebra.Chunk(*(_to_chunks(x, config) for x in (k, v, log_decay, beta, _per_head(starts, k))))
    x, dout = _to_chunks(x, config), _to_chunks(dout, config)
    ridges = _per_chunk(ridge, x)
    before, _, through = _states(chunks, state)

    def solve_adjoint(tiles):
        x, dout, chunk, kk, kv, ridge = tiles
        tile = algebra.make_tile(chunk, kk, kv, ridge)
        rhs = algebra.adjoint_rhs(dout, tile)
        adjoint = algebra.solve(rhs, tile, solver)
        dq = adjoint.solution if solver.max_steps else rhs
        return dq, adjoint, algebra.added_cotangents(x, adjoint, dout, tile.decays)

    def differentiate(tiles):
        x, adjoint, dout, chunk, kk, kv, ridge, dkk, dkv = tiles
        return algebra.cotangents(x, adjoint, dout, algebra.make_tile(chunk, kk, kv, ridge), dkk, dkv)

    dq, adjoint, added = _map_tiles(solve_adjoint, (x, dout, chunks, *before, ridges))
    after, dstate = _scan_states(MesaState(*added), through, dstate, reverse=True)
    grads = _map_tiles(differentiate, (x, adjoint, dout, chunks, *before, ridges, *after))
    sequences = (_to_sequence(g, length) for g in (dq, grads.k, grads.v, grads.log_decay, grads.beta))
    return (*sequences, jnp.sum(grads.ridge, axis=(0, 1)), dstate)


def _states(chunks: algebra.Chunk, state: MesaState) -> tuple[MesaState, MesaState, jax.Array]:
    """Returns the states before every chunk [n, b, h, ...], the final ones, and the decay over each chunk [n, b, h]."""
    kk, kv, through = _map_tiles(algebra.added_states, chunks)
    before, final = _scan_states(MesaState(kk, kv), through, state)
    return before, final, through


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


def _per_head(starts: jax.Array, k: jax.Array) -> jax.Array:
    """[b, t] -> [b, t, h]."""
    return jnp.broadcast_to(starts[..., None], k.shape[:3])


def _per_chunk(ridge: jax.Array, chunks: jax.Array) -> jax.Array:
    """[h, k] -> [n, b, h, k]."""
    return jnp.broadcast_to(ridge, (*chunks.shape[:3], ridge.shape[-1]))
