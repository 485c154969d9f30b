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
    mlp = 6 * c.model_dim * c.feed_forward_dim
    mixers = sum(_mixer_flops(c, mixer, length, solver_steps, context) for mixer in c.pattern) / len(c.pattern)
    return c.num_layers * (mlp + mixers) + 2 * c.model_dim * c.vocab_size


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
    """FLOPs per token of a mixer, its projections among them."""
    if mixer == "hawk":
        return 6 * c.model_dim * c.channels + 4 * c.channels**2 / c.num_heads
    k, v, chunk = c.key_dim, c.value_dim, min(length, CHUNK)
    projections = 4 * c.model_dim * c.num_heads * (k + v)
    if mixer in ("attention", "sliding_window"):
        span = c.window if mixer == "sliding_window" else c.max_context
        seen = _seen(context + length, span) - _seen(context, span)
        return projections + 2 * c.num_heads * (k + v) * seen / length
    gates = 4 * c.model_dim
    read_and_write = 4 * k * v + 2 * chunk * (k + v)
    head = gates + read_and_write
    if mixer in ("deltanet", "gated_deltanet"):
        head += 2 * k * v + 2 * chunk * k + chunk * (k + v)  # what is read at keys, their products, the triangles
    if mixer != "mesa":
        return projections + c.num_heads * head
    steps = _steps(c, solver_steps)
    solve = 2 * work.steps(steps, 1 if steps else 0, k, chunk)  # and one true residual
    return projections + c.num_heads * (head + 2 * k * k + solve) + _factor_flops(c, length, solver_steps)


def _seen(length: int, span: int) -> float:
    """How many tokens the first `length` see together, each at most `span`: 1 + 2 + ... + span + span + ..."""
    span = min(length, span)
    return span * length - span * (span - 1) / 2


def _factor_flops(c: MesaNetConfig, length: int, solver_steps: float | None) -> float:
    """FLOPs per token and layer of the factors of all heads; 0 if the solver makes none."""
    chunk = min(length, CHUNK)
    made = _steps(c, solver_steps) and nested.serves(c.solver, chunk, c.key_dim)
    return 2 * c.num_heads * work.factor(c.key_dim, chunk) if made else 0.0


def _steps(c: MesaNetConfig, solver_steps: float | None) -> float:
    return c.solver.max_steps if solver_steps is None else solver_steps
