"""One custom derivative above all implementations: the implicit gradient of the solve (README.md, section 4)."""

from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import dispatch
from pallas_kernels.mesa_chunk import pallas_gpu, pallas_tpu, xla
from pallas_kernels.mesa_chunk.contract import MesaState, SolveReport
from pallas_kernels.mesa_chunk.nested import Factor
from pallas_kernels.mesa_chunk.solver import SolverConfig

BACK_ENDS = {"xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}


def mesa_chunk(inputs: tuple, solver: SolverConfig, chosen: str) -> tuple[jax.Array, MesaState, SolveReport]:
    """Returns outputs, final state and report, all arrays in the solver's dtype.

    Args:
      inputs: (q, k, v, log_decay, beta, ridge, state, starts).
      solver: when a token's solve ends.
      chosen: one of BACK_ENDS or "by_platform". The platform is chosen above the derivative: tiles, and with them what
        is kept for the backward pass, have other sizes in other back ends.
    """
    if chosen != "by_platform":
        return _differentiable(*inputs, solver, chosen)
    kernel, elsewhere = (lambda *xs, name=name: _differentiable(*xs, solver, name) for name in ("pallas_tpu", "xla"))
    return dispatch.on_tpu(*inputs, kernel=kernel, elsewhere=elsewhere)


class Residuals(NamedTuple):
    """What the backward pass keeps. States are computed again, which is cheap beside a solve."""

    inputs: tuple  # k, v, log_decay, beta, ridge, state, starts
    solution: jax.Array  # of all tiles, [n, b, h, k, c]
    factors: Factor | None  # of all tiles; the solve of the backward pass has the same matrices


def _primal(
    q, k, v, log_decay, beta, ridge, state, starts, solver: SolverConfig, back_end: str
) -> tuple[jax.Array, MesaState, SolveReport]:
    return _forward(q, k, v, log_decay, beta, ridge, state, starts, solver, back_end)[0]


_differentiable = jax.custom_vjp(_primal, nondiff_argnums=(8, 9))


def _forward(q, k, v, log_decay, beta, ridge, state, starts, solver, back_end):
    inputs = (k, v, log_decay, beta, ridge, state, starts)
    out, final, x, report, factors = BACK_ENDS[back_end].forward(q, *inputs, solver=solver)
    # the name lets a remat policy keep the solution, so that the backward pass never solves forward again; see api.py
    return (out, final, report), Residuals(inputs, checkpoint_name(x, "mesa_solution"), factors)


def _backward(solver, back_end, residuals: Residuals, cotangents):
    dout, dstate, _ = cotangents
    grads = BACK_ENDS[back_end].backward(*residuals, dout, MesaState(*dstate), solver=solver)
    return (*grads, None)  # starts are integers


_differentiable.defvjp(_forward, _backward)
