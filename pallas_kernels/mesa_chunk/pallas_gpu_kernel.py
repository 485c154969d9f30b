"""The kernel body for GPUs: references are loaded, the pure functions of the other files do the arithmetic, and stored.

A program solves some tokens of a tile and ends when the last of them has stopped. What changes from step to step stays
in registers; matrices do not.
"""

import jax

from pallas_kernels.mesa_chunk import nested
from pallas_kernels.mesa_chunk.algebra import Tile
from pallas_kernels.mesa_chunk.nested import Factor
from pallas_kernels.mesa_chunk.products import Stored
from pallas_kernels.mesa_chunk.solver import Solution, SolverConfig


def solve(rhs, tile: Tile, factor: Factor | None, results: Solution, *, config: SolverConfig) -> None:
    """Solves some tokens of a tile; all arguments are references to blocks.

    Args:
      rhs: right-hand sides [k, m] of m tokens.
      tile: what they see of the chunk, without values; its decays are those to these tokens.
      factor: of the tile, if the solver uses factors.
      results: where to store what is found.
      config: of the solve.
    """
    tile = _load(tile._replace(k=None, kk=None))._replace(k=Stored(tile.k), kk=Stored(tile.kk))
    if factor is not None:
        matrices = {"inverse": Stored(factor.inverse), "rows": Stored(factor.rows)}
        factor = _load(factor._replace(inverse=None, rows=None))._replace(**matrices)
    for ref, value in zip(results, nested.solve_tile(rhs[...], tile, factor, config), strict=True):
        ref[...] = value


def _load(refs):
    return jax.tree.map(lambda ref: ref[...], refs)
