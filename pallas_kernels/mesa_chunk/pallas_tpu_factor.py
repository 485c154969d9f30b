"""The factors of all tiles on a TPU: two kernels over tiles, and before each the roots of many matrices at once."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.mesa_chunk import nested, pallas_tpu_kernel, pallas_tpu_roots, positive
from pallas_kernels.mesa_chunk.nested import Factor, HalfFactor
from pallas_kernels.mesa_chunk.pallas_tpu_kernel import FactorRows, TileArrays
from pallas_kernels.mesa_chunk.pallas_tpu_tiles import TpuConfig, call


def factors(system, expected, tiles: TileArrays, *, config: TpuConfig, interpret=False) -> Factor:
    """Returns the factors of tiles [n, b, h, ...], made if any is worth it; marks are float32, for the kernels.

    `system` is that of each tile before its tokens, [n, b, h, k, k], `expected` its expected decay [n, b, h, 1, 1].
    """

    def make():
        root = _inverse_root(system, 0.0, config, interpret)
        half = first_half_tiles(root, expected, tiles, config=config, interpret=interpret)
        root = _inverse_root(half.gram, 1.0, config, interpret)
        found = second_half_tiles(root, half, tiles, config=config, interpret=interpret)
        return Factor(half.inverse, found.rows, nested.log_anchor(expected), found.usable)

    def make_none():
        return Factor(*map(jnp.zeros_like, (tiles.kk, tiles.k, expected, tiles.beta)))

    return jax.lax.cond(jnp.any(nested.is_worth_it(expected)), make, make_none)


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


def _inverse_root(a: jax.Array, least: float, config: TpuConfig, interpret) -> jax.Array:
    """Returns positive.inverse_root, by the kernel as soon as matrices are small enough."""
    take_root = functools.partial(pallas_tpu_roots.inverse_root, vmem_bytes=config.vmem_bytes, interpret=interpret)
    return positive.inverse_root(a, least, positive.Leaf(config.root_size, take_root))
