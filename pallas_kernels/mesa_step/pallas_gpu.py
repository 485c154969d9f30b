"""The GPU kernel's adapter, for Ampere and Hopper by Pallas' Triton path: when it fits and how the arrays are laid out.

Each state is read once and written once, and never copied if it was donated and its sizes are powers of two.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.manual import result_like
from pallas_kernels.mesa_chunk.contract import MesaState, SolveReport
from pallas_kernels.mesa_chunk.solver import SolverConfig
from pallas_kernels.mesa_step import pallas_gpu_kernel
from pallas_kernels.mesa_step.pallas_gpu_kernel import StepResults, Token
from pallas_kernels.tiling import pad_axis

LARGEST = 128  # key and value size; a program's matrix has to stay in registers


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """Changes the time, never the answer.

    Attributes:
      num_warps: that a program has.
    """

    num_warps: int = 8


def why_not(dtype: jnp.dtype, key_dim: int, value_dim: int) -> str | None:
    """Returns why the kernel cannot run in this type at these sizes, as part of a sentence, or None if it can."""
    if dtype != jnp.float32:
        return f"the kernel computes in float32, not in {jnp.dtype(dtype)}"
    if max(key_dim, value_dim) > LARGEST:
        return f"keys have size {key_dim} and values {value_dim}, and the kernel takes {LARGEST} at most"
    return None


def forward(
    q, k, v, log_decay, beta, ridge, state: MesaState, *, solver: SolverConfig, config=GpuConfig(), interpret=False
) -> tuple[jax.Array, MesaState, SolveReport]:
    """Returns what xla.forward does; the new state is where the old one was, if that was donated."""
    lead, num_heads = q.shape[:2], math.prod(q.shape[:2])
    # channels that are not there have no query; any ridge will do
    missing = pl.next_power_of_2(q.shape[-1]) - q.shape[-1]
    ridge = jnp.pad(jnp.broadcast_to(ridge, q.shape), ((0, 0), (0, 0), (0, missing)), constant_values=1)
    log_decay, beta = log_decay[..., None, None], beta[..., None, None]
    token = Token(q[..., None], k[..., None], v[..., None, :], log_decay, beta, ridge[..., None])
    arrays = [_whole_blocks(x.reshape(num_heads, *x.shape[2:])) for x in (*token, *state)]
    shape = functools.partial(result_like, arrays[0])
    results = StepResults(
        *(shape(x.shape) for x in (arrays[2], *arrays[-2:])),
        num_steps=shape((num_heads, 1, 1), jnp.int32),
        residual=shape((num_heads, 1, 1)),
    )

    def mesa_step(*refs):  # the Triton path calls a kernel by the name of its function
        token, state, results = Token(*refs[:6]), MesaState(*refs[6:8]), StepResults(*refs[8:])
        pallas_gpu_kernel.step(token, state, results, config=solver)

    found = pl.pallas_call(
        mesa_step,
        grid=(num_heads,),
        in_specs=[_head(x) for x in arrays],
        out_specs=[_head(x) for x in results],
        out_shape=list(results),
        input_output_aliases={6: 1, 7: 2},
        compiler_params=triton.CompilerParams(num_warps=config.num_warps),
        cost_estimate=_cost(solver, arrays),
        interpret=interpret,
        name="mesa_step",
    )(*arrays)
    found = StepResults(*(x.reshape(*lead, *x.shape[1:]) for x in found))
    kk, kv = (x[..., : old.shape[-2], : old.shape[-1]] for x, old in zip((found.kk, found.kv), state, strict=True))
    report = SolveReport(found.num_steps[..., 0, 0], found.residual[..., 0, 0])
    return found.out[..., 0, : v.shape[-1]], MesaState(kk, kv), report


def _whole_blocks(x: jax.Array) -> jax.Array:
    """Pads the two axes of each head to powers of two."""
    return functools.reduce(lambda x, axis: pad_axis(x, axis, pl.next_power_of_2(x.shape[axis])), (1, 2), x)


def _head(array) -> pl.BlockSpec:
    return pl.BlockSpec((None, *array.shape[1:]), lambda i: (i, 0, 0))


def _cost(solver: SolverConfig, arrays) -> pl.CostEstimate:
    """What a step costs that takes all steps of its solve: a multiply-add per entry and product."""
    kk, kv = arrays[-2:]
    return pl.CostEstimate(
        flops=(2 * solver.max_steps + 5) * kk.size + 5 * kv.size,
        transcendentals=kk.shape[0],
        bytes_accessed=4 * sum(x.size for x in (*arrays, kk, kv)),
    )
