"""The TPU kernel's adapter: when it fits, how the arrays are laid out, what it costs.

Batch in lanes: every operation of a step is elementwise, or a sum over answers in sublanes, so the whole descent runs
on the vector unit with no transpose and no matrix product (README.md, section 3).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.manual import result_like
from pallas_kernels.router_descent import algebra, pallas_tpu_kernel, xla
from pallas_kernels.router_descent.contract import Inputs, Rule
from pallas_kernels.tiling import pad_axis, round_up

LANES = 128
MEBIBYTE = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuConfig:
    """Changes the time, never the answer.

    Attributes:
      resident_bytes: a tile's neighbours stay on the chip for all steps up to this size, and are streamed beyond it.
      chunk_bytes: size up to which neighbours are streamed together.
      at_once_bytes: size of the logits up to which neighbours are computed together; registers hold 256 KiB.
      vmem_bytes: what the compiler may use; blocks are there twice, one being computed on and one being fetched.
    """

    resident_bytes: int = 16 * MEBIBYTE
    chunk_bytes: int = 4 * MEBIBYTE
    at_once_bytes: int = 128 * 1024
    vmem_bytes: int = 48 * MEBIBYTE


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """How the neighbours of a tile are cut: they are padded to chunks times turns times neighbours at once."""

    at_once: int
    turns: int
    chunks: int
    answers: int  # padded to whole sublanes

    @property
    def neighbors(self) -> int:
        return self.chunks * self.turns * self.at_once


def why_not(inputs: Inputs, config: TpuConfig = TpuConfig()) -> str | None:
    """Returns why the kernel cannot run on these shapes and types, as part of a sentence, or None if it can."""
    if inputs.offset.dtype != jnp.float32:
        return f"the kernel computes in float32, not in {inputs.offset.dtype}"
    if jnp.result_type(float) == jnp.float64:  # the setting, also where a context manager made it
        return "kernels do not compile while jax_enable_x64 is on"
    e, y = inputs.readout.shape[2:]
    one = _neighbor_bytes(inputs)
    if one > config.chunk_bytes:
        return (
            f"one neighbour of {e} experts and {y} answers takes {one} bytes of a tile, more than {config.chunk_bytes}"
        )
    return None


def forward_or_xla(inputs: Inputs, rule: Rule) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel where the program is lowered for a TPU, and xla elsewhere."""
    kernel, elsewhere = functools.partial(forward, rule=rule), functools.partial(xla.forward, rule=rule)
    return dispatch.on_tpu(inputs, kernel=kernel, elsewhere=elsewhere)


def forward(
    inputs: Inputs, rule: Rule, *, config: TpuConfig = TpuConfig(), interpret=False
) -> tuple[jax.Array, jax.Array]:
    """Returns the routing [b, e] after the last step and the surrogate loss [b] there."""
    b, _, e, _ = inputs.readout.shape
    num_steps = inputs.learning_rates.shape[0]
    plan = _plan(inputs, config)
    arrays = _to_lanes(inputs, plan)
    tiles = arrays[0].shape[-1] // LANES
    rates = jnp.stack(algebra.rates(inputs.learning_rates, rule))
    rates = pad_axis(rates, 1, max(num_steps, 1))  # no step is a case, an array of nothing is not
    streams = plan.chunks > 1
    state = [pltpu.VMEM((rows, LANES), jnp.float32) for rows in (e, e, e, 1, e)]
    routing, loss = pl.pallas_call(
        functools.partial(
            pallas_tpu_kernel.streamed if streams else pallas_tpu_kernel.resident,
            rule=rule,
            num_steps=num_steps,
            at_once=plan.at_once,
        ),
        grid=(tiles, num_steps + 1, plan.chunks) if streams else (tiles,),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), _rows(e), *_neighbor_specs(arrays[1:], plan)],
        out_specs=[_rows(e), _rows(1)],
        out_shape=[result_like(arrays[0], (rows, tiles * LANES)) for rows in (e, 1)],
        scratch_shapes=state if streams else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary") if streams else ("parallel",),
            vmem_limit_bytes=config.vmem_bytes,
        ),
        cost_estimate=_cost(arrays, plan, num_steps),
        interpret=interpret,
        name="router_descent",
    )(rates, *arrays)
    return routing[:, :b].T, loss[0, :b]


def _neighbor_bytes(inputs: Inputs) -> int:
    """Bytes of one neighbour of a tile: read-outs, offsets, and a padded row each of labels and weights."""
    e, y = inputs.readout.shape[2:]
    y = round_up(y, _sublanes(inputs))
    return LANES * (y * (e * inputs.readout.dtype.itemsize + 4) + 2 * 8 * 4)


def _sublanes(inputs: Inputs) -> int:
    """Rows of one register: 8 of 4 bytes, 16 of 2."""
    return 32 // inputs.readout.dtype.itemsize


def _plan(inputs: Inputs, config: TpuConfig) -> _Plan:
    _, m, _, y = inputs.readout.shape
    answers = round_up(y, _sublanes(inputs))
    one = _neighbor_bytes(inputs)
    fitting = m if m * one <= config.resident_bytes else config.chunk_bytes // one
    chunks = -(-m // fitting)
    in_chunk = -(-m // chunks)
    turns = -(-in_chunk // max(config.at_once_bytes // (answers * LANES * 4), 1))
    return _Plan(at_once=-(-in_chunk // turns), turns=turns, chunks=chunks, answers=answers)


def _to_lanes(inputs: Inputs, plan: _Plan) -> tuple[jax.Array, ...]:
    """Log routing [e, b], read-outs [m, e, y, b], offsets [m, y, b], labels and weights [m, 1, b], padded.

    Answers that are not there are masked; neighbours and inputs that are not there weigh nothing.
    """
    batch = round_up(inputs.readout.shape[0], LANES)
    more_answers = ((0, 0), (0, 0), (0, plan.answers - inputs.offset.shape[-1]))
    neighbors = (
        pad_axis(inputs.readout, 3, plan.answers),
        jnp.pad(inputs.offset, more_answers, constant_values=-jnp.inf),
        inputs.labels[..., None],
        inputs.weights[..., None],
    )
    arrays = inputs.log_routing, *(pad_axis(x, 1, plan.neighbors) for x in neighbors)
    return tuple(jnp.moveaxis(pad_axis(x, 0, batch), 0, -1) for x in arrays)


def _rows(rows: int) -> pl.BlockSpec:
    return pl.BlockSpec((rows, LANES), lambda tile, *_: (0, tile))


def _neighbor_specs(arrays, plan: _Plan) -> list[pl.BlockSpec]:
    """Blocks of one chunk of neighbours and one tile of the batch."""

    def index(tile, *step_and_chunk, between: int):
        return (step_and_chunk[-1] if step_and_chunk else 0, *[0] * between, tile)

    return [
        pl.BlockSpec((plan.turns * plan.at_once, *x.shape[1:-1], LANES), functools.partial(index, between=x.ndim - 2))
        for x in arrays
    ]


def _cost(arrays, plan: _Plan, num_steps: int) -> pl.CostEstimate:
    """What the compiler schedules by: a multiply-add per read-out forward and one backward, an exp per logit."""
    _, readout, offset, *_ = arrays
    evaluations = num_steps + 1
    fetched = sum(x.size * x.dtype.itemsize for x in arrays)
    return pl.CostEstimate(
        flops=evaluations * (4 * readout.size + 8 * offset.size),
        transcendentals=evaluations * offset.size,
        bytes_accessed=fetched * (evaluations if plan.chunks > 1 else 1),
    )
