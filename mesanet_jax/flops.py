"""Multiply-adds of a model, counted twice as usual: what utilisation is measured against."""

import dataclasses

from mesanet_jax.config import MesaNetConfig
from pallas_kernels.mesa_chunk import nested, work

CHUNK = 64  # a matrix of the solve is applied chunk by chunk; its cost depends on the chunk's length


def forward_flops(config: MesaNetConfig, length: int, solver_steps: float | None = None, context: int = 0) -> float:
    """Returns FLOPs per token of the forward pass over a sequence of `length` tokens.

    Args:
      config: the model.
      length: tokens of the sequence; attention grows with it.
      solver_steps: steps that a token took on average; None counts the budget.
      context: tokens that were read before the sequence; attention looks back at them.
    """
    c = config
    heads = c.num_heads * (2 * c.key_dim + 2 * c.value_dim)
    layer = 2 * c.model_dim * (heads + 3 * c.feed_forward_dim)
    mixers = sum(_mixer_flops(c, mixer, length, solver_steps, context) for mixer in c.pattern) / len(c.pattern)
    return c.num_layers * (layer + mixers) + 2 * c.model_dim * c.vocab_size


def training_flops(config: MesaNetConfig, length: int, solver_steps: float | None = None) -> float:
    """Returns FLOPs per token of a training step: backward is twice forward, and the adjoint solve counts once.

    It takes the factor of the forward solve, if there is one.
    """
    adjoint_config = dataclasses.replace(config, solver=config.solver.adjoint)
    solves = forward_flops(config, length, solver_steps) + forward_flops(adjoint_config, length, solver_steps)
    without_solve = forward_flops(config, length, 0)
    shares = config.pattern.count("mesa") / len(config.pattern)
    shared = config.num_layers * shares * _factor_flops(config, length, solver_steps)
    return without_solve + solves - shared


def _mixer_flops(c: MesaNetConfig, mixer: str, length: int, solver_steps: float | None, context: int) -> float:
    """FLOPs per token of what a mixer does beyond its projections."""
    if mixer != "mesa":
        span = c.window if mixer == "sliding_window" else c.max_context
        seen = _seen(context + length, span) - _seen(context, span)
        return 2 * c.num_heads * (c.key_dim + c.value_dim) * seen / length
    steps = _steps(c, solver_steps)
    solve = 2 * work.steps(steps, 1 if steps else 0, c.key_dim, min(length, CHUNK))  # and one true residual
    states = 2 * c.key_dim * (c.key_dim + c.value_dim)
    read_out = 2 * c.key_dim * c.value_dim + 2 * CHUNK * (c.key_dim + c.value_dim)
    gates = 4 * c.model_dim
    return c.num_heads * (solve + states + read_out + gates) + _factor_flops(c, length, solver_steps)


def _seen(length: int, span: int) -> float:
    """How many tokens the first `length` see together, each at most `span`: 1 + 2 + ... + span + span + ..."""
    span = min(length, span)
    return span * length - span * (span - 1) / 2


def _factor_flops(c: MesaNetConfig, length: int, solver_steps: float | None) -> float:
    """FLOPs per token and layer of the factors of all heads; 0 if the solver makes none."""
    chunk = min(length, CHUNK)
    made = _steps(c, solver_steps) and c.solver.preconditioner == "nested" and nested.serves(chunk, c.key_dim)
    return 2 * c.num_heads * work.factor(c.key_dim, chunk) if made else 0.0


def _steps(c: MesaNetConfig, solver_steps: float | None) -> float:
    return c.solver.max_steps if solver_steps is None else solver_steps
