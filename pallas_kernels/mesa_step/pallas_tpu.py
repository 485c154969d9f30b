"""The TPU kernel's adapter: when it fits, how the arrays are laid out, what it costs.

Arrays enter as they are, with batch and heads in one axis: no padding and no transpose outside the kernel, so that each
state is read once, written once, and never copied if it was donated (README.md, section 3).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.manual import result_like
from pallas_kernels.mesa_chunk.contract import MesaState, SolveReport
from pallas_kernels.mesa_chunk.pallas_tpu import why_not
from pallas_kernels.mesa_chunk.pallas_tpu_tiles import LANES, MEBIBYTE
from pallas_kernels.mesa_chunk.solver import SolverConfig
from pallas_kernels.mesa_step import pallas_tpu_kernel
from pallas_kernels.mesa_step.pallas_tpu_kernel import StepResults, TokenArrays
from pallas_kernels.tiling import round_up

SUBLANES = 8

__all__ = ["TpuConfig", "forward", "why_not"]  # it runs what the kernels of mesa_chunk run


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuConfig:
    """Changes the time, never the answer.

    Attributes:
      side_by_side: most heads that a program solves at once, a multiple of 8; a lane each.
      state_bytes: what states and matrices may take on the chip; fewer heads lie side by side if they are large.
      vmem_bytes: what the compiler may use for everything.
    """

    side_by_side: int = 64
    state_bytes: int = 48 * MEBIBYTE
    vmem_bytes: int = 60 * MEBIBYTE


def forward(
    q, k, v, log_decay, beta, ridge, state: MesaState, *, solver: SolverConfig, config=TpuConfig(), interpret=False
) -> tuple[jax.Array, MesaState, SolveReport]:
    """Returns what xla.forward does; the new state is where the old one was, if that was donated."""
    lead, num_heads = q.shape[:2], math.prod(q.shape[:2])
    arrays = TokenArrays(q, k, v, log_decay[..., None], beta[..., None], jnp.broadcast_to(ridge, q.shape)), state
    token, state = jax.tree.map(lambda x: x.reshape(num_heads, *x.shape[2:]), arrays)
    g = _heads_at_once(num_heads, q.shape[-1], v.shape[-1], config)
    programs = -(-num_heads // g)
    shape = functools.partial(result_like, token.q)
    report = (programs, 1, g)
    shapes = StepResults(
        out=shape(token.v.shape),
        kk=shape(state.kk.shape),
        kv=shape(state.kv.shape),
        num_steps=shape(report, jnp.int32),
        residual=shape(report),
    )
    found = StepResults(
        *pl.pallas_call(
            functools.partial(_body, num_heads=num_heads, config=solver),
            grid=(programs,),
            in_specs=[_blocks(g, x) for x in (*token, *state)],
            out_specs=[*(_blocks(g, x) for x in shapes[:3]), *(_blocks(1, x) for x in shapes[3:])],
            out_shape=list(shapes),
            input_output_aliases={len(token): 1, len(token) + 1: 2},
            scratch_shapes=[pltpu.VMEM((*state.kk.shape[1:], g), jnp.float32)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=config.vmem_bytes),
            cost_estimate=_cost(token, state, solver),
            interpret=interpret,
            name="mesa_step",
        )(*token, *state)
    )
    rows = (x.reshape(-1)[:num_heads].reshape(lead) for x in (found.num_steps, found.residual))
    state = MesaState(*(x.reshape(*lead, *x.shape[1:]) for x in (found.kk, found.kv)))
    return found.out.reshape(v.shape), state, SolveReport(*rows)


def _body(*refs, **choices) -> None:
    token, state, results = len(TokenArrays._fields), len(MesaState._fields), len(StepResults._fields)
    after = token + state
    pallas_tpu_kernel.step(
        refs[:token], MesaState(*refs[token:after]), StepResults(*refs[after : after + results]), refs[-1], **choices
    )


def _heads_at_once(num_heads: int, key_dim: int, value_dim: int, config: TpuConfig) -> int:
    """Returns how many heads a program holds: all of them, or whole registers of their vectors.

    A state is on the chip four times, read and written, one being computed on and one being moved; the matrices in
    lanes once, as large for few heads as for many.
    """
    rows, columns = round_up(key_dim, SUBLANES), round_up(key_dim, LANES) + round_up(value_dim, LANES)
    room = config.state_bytes - 4 * key_dim * rows * LANES
    fitting = room // (4 * 4 * rows * columns) // SUBLANES * SUBLANES
    return min(num_heads, config.side_by_side, fitting)


def _blocks(g: int, array) -> pl.BlockSpec:
    return pl.BlockSpec((g, *array.shape[1:]), lambda i: (i, *[0] * (len(array.shape) - 1)))


def _cost(token: TokenArrays, state: MesaState, solver: SolverConfig) -> pl.CostEstimate:
    """What the compiler schedules by, as if every head took all its steps: a multiply-add per entry and product."""
    products = solver.max_steps + 1 if solver.max_steps else 1
    vectors = sum(x.size for x in token) + token.v.size
    return pl.CostEstimate(
        flops=(2 * products + 3) * state.kk.size + 5 * state.kv.size,
        transcendentals=token.log_decay.size,
        bytes_accessed=4 * (vectors + 2 * (state.kk.size + state.kv.size)),
    )
