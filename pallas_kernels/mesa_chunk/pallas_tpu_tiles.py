"""How kernels for TPUs run over tiles."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mesa_chunk.pallas_tpu_kernel import Memory

LANES = 128
MEBIBYTE = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuConfig:
    """Changes the time, never the answer.

    Attributes:
      chunk_length: tokens a tile holds, a multiple of 128 since tokens lie in lanes.
      side_by_side: most tiles that a program solves at once; a single one waits for itself.
      root_size: rows of the largest matrices whose roots are taken in one go, larger ones by halves; what that
        leaves has to be a multiple of 8.
      vmem_bytes: what the compiler may use; blocks are there twice, one being computed on and one being fetched.
    """

    chunk_length: int = LANES
    side_by_side: int = 4
    root_size: int = LANES
    vmem_bytes: int = 64 * MEBIBYTE


def call(
    body,
    name: str,
    arguments,
    shapes,
    flops: float,
    config: TpuConfig,
    interpret,
    memory: tuple[int, int] | None = None,
):
    """Runs a kernel body over trees of arrays [n, b, h, ...], a few tiles at a time.

    Args:
      body: takes references to blocks [g, ...] of the arguments, a tree of those to the results, and scratch memory.
      name: of the kernel.
      arguments: the trees.
      shapes: of the results of a tile, as a tree of the type to return.
      flops: of a tile that takes all its steps, as most do not; what the compiler schedules other work by.
      config, interpret: how to run.
      memory: shape of each array of Memory for a tile; None if the body takes none.
    """
    leaves, structure = jax.tree.flatten(arguments)
    lead = leaves[0].shape[:3]
    num_tiles = math.prod(lead)
    g = max(g for g in range(1, config.side_by_side + 1) if num_tiles % g == 0)
    arrays = [x.reshape(num_tiles, *x.shape[3:]) for x in leaves]

    def kernel(*refs):
        inputs, results = refs[: len(arrays)], refs[len(arrays) : len(arrays) + len(shapes)]
        scratch = refs[len(arrays) + len(shapes) :]
        body(*jax.tree.unflatten(structure, inputs), type(shapes)(*results), *([Memory(*scratch)] if memory else []))

    results = pl.pallas_call(
        kernel,
        grid=(num_tiles // g,),
        in_specs=[_tiles_of(g, x.shape[1:]) for x in arrays],
        out_specs=[_tiles_of(g, shape) for shape in shapes],
        out_shape=[jax.ShapeDtypeStruct((num_tiles, *shape), jnp.float32) for shape in shapes],
        cost_estimate=pl.CostEstimate(
            flops=int(num_tiles * flops),
            transcendentals=num_tiles * config.chunk_length**2,  # the decays of a tile
            bytes_accessed=4 * (sum(x.size for x in arrays) + num_tiles * sum(map(math.prod, shapes))),
        ),
        scratch_shapes=[pltpu.VMEM((g, *memory), jnp.float32) for _ in Memory._fields] if memory else [],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=config.vmem_bytes),
        interpret=interpret,
        name=name,
    )(*arrays)
    return type(shapes)(*(x.reshape(*lead, *x.shape[1:]) for x in results))


def _tiles_of(g: int, shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec((g, *shape), lambda i: (i, *[0] * len(shape)))
