"""The factors of all tiles on a TPU: two kernels over tiles, and before each the roots of many matrices at once."""

import functools

from pallas_kernels.mesa_chunk import nested, pallas_tpu_kernel, pallas_tpu_roots, positive
from pallas_kernels.mesa_chunk.nested import Factor, HalfFactor
from pallas_kernels.mesa_chunk.pallas_tpu_kernel import FactorRows, TileArrays
from pallas_kernels.mesa_chunk.pallas_tpu_tiles import TpuConfig, call


def factors(system, expected, tiles: TileArrays, *, config: TpuConfig, interpret=False) -> Factor:
    """Returns the factors of tiles [n, b, h, ...]; marks are float32, for the kernels.

    The kernels pass over tiles that are not worth one, where those beside them are not either.

    Args:
      system: of each tile before its tokens, [n, b, h, k, k].
      expected: decay of each tile, [n, b, h, 1, 1].
      tiles: the tiles.
      config, interpret: how to run.
    """
    take_root = functools.partial(
        pallas_tpu_roots.inverse_root,
        wanted=nested.is_worth_it(expected),
        vmem_bytes=config.vmem_bytes,
        interpret=interpret,
    )
    leaf = positive.Leaf(config.root_size, take_root)
    root = positive.inverse_root(system, 0.0, leaf)
    half = first_half_tiles(root, expected, tiles, config=config, interpret=interpret)
    root = positive.inverse_root(half.gram, 1.0, leaf)
    found = second_half_tiles(root, half, tiles, config=config, interpret=interpret)
    return Factor(half.inverse, found.rows, nested.log_anchor(expected), found.usable)


def first_half_tiles(root, expected, tiles: TileArrays, *, config=TpuConfig(), interpret=False) -> HalfFactor:
    """Returns the first half of the factors, from inverse roots [n, b, h, k, k] of the systems before the tokens.

    `expected` are the tiles' expected decays [n, b, h, 1, 1].
    """
    c, k = tiles.k.shape[-2:]
    arguments = root, expected, tiles.k, tiles.beta, tiles.ridge, tiles.log_decay, tiles.starts
    shapes = HalfFactor((k, k), (k, c), (c, c), (1, c))
    flops = 2 * (k**3 + c * k * k + c * c * k)
    return call(pallas_tpu_kernel.first_halves, "mesa_chunk_tokens", arguments, shapes, flops, config, interpret)


def second_half_tiles(root, half: HalfFactor, tiles: TileArrays, *, config=TpuConfig(), interpret=False) -> FactorRows:
    """Returns the second half of the factors, from inverse roots [n, b, h, c, c] of the systems between tokens."""
    c, k = tiles.k.shape[-2:]
    arguments = root, half.solved, half.usable, tiles.log_decay, tiles.starts
    shapes = FactorRows((c, k), (1, c))
    return call(pallas_tpu_kernel.second_halves, "mesa_chunk_rows", arguments, shapes, 2 * c * c * k, config, interpret)
