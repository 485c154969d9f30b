"""How kernels for TPUs run over tiles."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.manual import result_like
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
    body: Callable,
    name: str,
    arguments: tuple,
    shapes,
    flops: float,
    config: TpuConfig,
    interpret,
    memory: tuple[int, int] | None = None,
):
    """Runs a kernel body over trees of arrays [n, b, h, ...], a few tiles at a time, in any order.

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
    arrays = [x.reshape(1, math.prod(lead), *x.shape[3:]) for x in leaves]

    def kernel(*refs):
        inputs, results, scratch = _grouped(refs, len(arrays), len(shapes))
        body(*jax.tree.unflatten(structure, inputs), type(shapes)(*results), *([Memory(*scratch)] if memory else []))

    results, _ = _run(kernel, name, arrays, [], shapes, flops, config, interpret, memory=memory)
    return type(shapes)(*(x.reshape(*lead, *x.shape[2:]) for x in results))


def fold(
    body: Callable,
    name: str,
    arguments: tuple,
    carried,
    shapes,
    flops: float,
    config: TpuConfig,
    interpret,
    *,
    reverse: bool = False,
) -> tuple:
    """Runs a kernel body over trees of arrays [n, b, h, ...], chunk after chunk, a few heads at a time.

    Args:
      body: takes references to blocks [g, ...] of the arguments, a tree of those to the results, and one of those to
        what is carried from chunk to chunk, which it changes.
      carried: arrays [b, h, ...] before the first chunk.
      reverse: begin with the last chunk.
      name, arguments, shapes, flops, config, interpret: as in `call`.

    Returns:
      The results, and what is carried after the last chunk.
    """
    leaves, structure = jax.tree.flatten(arguments)
    n, b, h = leaves[0].shape[:3]
    arrays = [x.reshape(n, b * h, *x.shape[3:]) for x in leaves]
    begun = [x.reshape(b * h, *x.shape[2:]) for x in carried]

    def kernel(*refs):
        inputs, starts, results, carry = _grouped(refs, len(arrays), len(carried), len(shapes))

        @pl.when(pl.program_id(1) == 0)
        def begin():
            for ref, start in zip(carry, starts, strict=True):
                ref[...] = start[...]

        body(*jax.tree.unflatten(structure, inputs), type(shapes)(*results), type(carried)(*carry))

    results, ends = _run(kernel, name, arrays, begun, shapes, flops, config, interpret, reverse=reverse)
    results = type(shapes)(*(x.reshape(n, b, h, *x.shape[2:]) for x in results))
    return results, type(carried)(*(x.reshape(b, h, *x.shape[1:]) for x in ends))


def _run(kernel, name, arrays, begun, shapes, flops, config: TpuConfig, interpret, memory=None, reverse=False):
    """Runs a kernel on blocks [g, ...] of arrays [n, m, ...]; programs of the same g of m run one after another.

    It gets references to blocks of the arrays, of what is `begun`, [m, ...], of the results, of what becomes of that
    which was begun, and to scratch memory. The last two stay where they are until a block's last program has run.
    """
    n, m = arrays[0].shape[:2]
    g = max(g for g in range(1, config.side_by_side + 1) if m % g == 0)

    def tiles(shape):
        return pl.BlockSpec((None, g, *shape), lambda i, j: (n - 1 - j if reverse else j, i, *[0] * len(shape)))

    def heads(shape):
        return pl.BlockSpec((g, *shape), lambda i, j: (i, *[0] * len(shape)))

    def array(*shape):
        return result_like(arrays[0], shape)

    results = pl.pallas_call(
        kernel,
        grid=(m // g, n),
        in_specs=[*(tiles(x.shape[2:]) for x in arrays), *(heads(x.shape[1:]) for x in begun)],
        out_specs=[*map(tiles, shapes), *(heads(x.shape[1:]) for x in begun)],
        out_shape=[*(array(n, m, *shape) for shape in shapes), *(array(*x.shape) for x in begun)],
        cost_estimate=pl.CostEstimate(
            flops=int(n * m * flops),
            transcendentals=n * m * config.chunk_length**2,  # the decays of a tile
            bytes_accessed=4 * (sum(x.size for x in (*arrays, *begun, *begun)) + n * m * sum(map(math.prod, shapes))),
        ),
        scratch_shapes=[pltpu.VMEM((g, *memory), jnp.float32) for _ in Memory._fields] if memory else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=config.vmem_bytes
        ),
        interpret=interpret,
        name=name,
    )(*arrays, *begun)
    return results[: len(shapes)], results[len(shapes) :]


def _grouped(refs: tuple, *sizes: int) -> list[tuple]:
    """Returns the references in groups of these sizes, and what is left as the last."""
    groups = []
    for size in sizes:
        groups.append(refs[:size])
        refs = refs[size:]
    return [*groups, refs]
