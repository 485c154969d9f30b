"""One custom derivative above all implementations: the implicit gradient of the solve (README.md, section 3)."""

from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.mesa_chunk import xla
from pallas_kernels.mesa_chunk.contract import MesaState, SolveReport
from pallas_kernels.mesa_chunk.solver import SolverConfig

BACK_ENDS = {"xla": xla}


class Residuals(NamedTuple):
    """What the backward pass keeps. States are recomputed: a scan is cheap beside a solve."""

    inputs: tuple  # k, v, log_decay, beta, ridge, state, starts
    solution: jax.Array  # [b, t, h, k]


def _primal(
    q, k, v, log_decay, beta, ridge, state, starts, solver: SolverConfig, with_report: bool, back_end: str
) -> tuple[jax.Array, MesaState, SolveReport | None]:
    """Returns outputs, final state and report (None unless asked for); all arrays in the solver's dtype."""
    return _forward(q, k, v, log_decay, beta, ridge, state, starts, solver, with_report, back_end)[0]


mesa_chunk = jax.custom_vjp(_primal, nondiff_argnums=(8, 9, 10))


def _forward(q, k, v, log_decay, beta, ridge, state, starts, solver, with_report, back_end):
    inputs = (k, v, log_decay, beta, ridge, state, starts)
    out, final, x, report = BACK_ENDS[back_end].forward(q, *inputs, solver=solver, with_report=with_report)
    # the name lets a remat policy keep the solution, so that the backward pass never solves forward again; see api.py
    return (out, final, report), Residuals(inputs, checkpoint_name(x, "mesa_solution"))


def _backward(solver, with_report, back_end, residuals: Residuals, cotangents):
    dout, dstate, _ = cotangents
    grads = BACK_ENDS[back_end].backward(*residuals, dout, MesaState(*dstate), solver=solver)
    return (*grads, None)  # starts are integers


mesa_chunk.defvjp(_forward, _backward)
