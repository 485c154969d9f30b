"""The public one-token operator: the same contract as `mesa_chunk`, without the time axis."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch, manual
from pallas_kernels.mesa_chunk.api import mesa_chunk
from pallas_kernels.mesa_chunk.contract import LOWEST_LOG_DECAY, MesaState, SolveReport, check_inputs, solver_dtype
from pallas_kernels.mesa_chunk.solver import SolverConfig, check_solver
from pallas_kernels.mesa_step import pallas_gpu, pallas_tpu, xla

KERNELS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}


def mesa_step(
    q: Float[Array, "b h k"],
    k: Float[Array, "b h k"],
    v: Float[Array, "b h v"],
    log_decay: Float[Array, "b h"],
    beta: Float[Array, "b h"],
    ridge: Float[Array, "h k"],
    state: MesaState,
    *,
    solver: SolverConfig = SolverConfig(),
    with_report: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "b h v"], MesaState, *tuple[SolveReport, ...]]:
    """Advances the Mesa layer by one token; equals `mesa_chunk` with t = 1 and takes the same arguments and errors.

    Its products are in float32 whatever `solver.precision` says: decoding waits for memory, not for them.

    Work and memory do not depend on how many tokens came before. Donate `state` to update it in place.

    Args:
      q, k, v, log_decay, beta, ridge, state, solver, with_report: as in `mesa_chunk`.
      implementation: as in `mesa_chunk`; these kernels read and write each state once.

    Returns:
      (out [b, h, v] in the dtype of v, new state), and a SolveReport of [b, h] if asked for.
    """
    if state is None:
        raise TypeError("mesa_step: state is None; pass the MesaState that mesa_chunk or the last step returned.")
    check_solver("mesa_step", solver)
    check_inputs("mesa_step", q, k, v, log_decay, beta, ridge, state, time_axis=False)
    out_dtype, dtype = v.dtype, solver_dtype(q, k, v, log_decay, beta, ridge)
    kernels = {name: kernel.why_not(dtype, q.shape[-1], v.shape[-1]) for name, kernel in KERNELS.items()}
    chosen = dispatch.resolve("mesa_step", implementation, kernels)
    if chosen == "reference":
        return _as_chunk(
            q, k, v, log_decay, beta, ridge, state, solver=solver, with_report=with_report, implementation=chosen
        )
    log_decay = jnp.maximum(log_decay, LOWEST_LOG_DECAY)
    q, k, v, log_decay, beta, ridge = (x.astype(dtype) for x in (q, k, v, log_decay, beta, ridge))
    inputs = manual.vary_alike((q, k, v, log_decay, beta, ridge, state.astype(dtype)))
    out, state, report = _step(*inputs, solver, chosen)
    out = out.astype(out_dtype)
    return (out, state, report) if with_report else (out, state)


def _primal(
    q, k, v, log_decay, beta, ridge, state, solver: SolverConfig, implementation: str
) -> tuple[jax.Array, MesaState, SolveReport]:
    inputs = (q, k, v, log_decay, beta, ridge, state)
    if implementation == "by_platform":
        kernel, elsewhere = (functools.partial(back_end.forward, solver=solver) for back_end in (pallas_tpu, xla))
        return dispatch.on_tpu(*inputs, kernel=kernel, elsewhere=elsewhere)
    return KERNELS.get(implementation, xla).forward(*inputs, solver=solver)


_step = jax.custom_vjp(_primal, nondiff_argnums=(7, 8))


def _step_forward(*args):
    return _step(*args), args[:7]


def _step_backward(solver, _, inputs, cotangents):
    _, pullback = jax.vjp(functools.partial(_as_chunk, solver=solver), *inputs)
    dout, dstate, _ = cotangents
    return pullback((dout, MesaState(*dstate)))


_step.defvjp(_step_forward, _step_backward)


def _as_chunk(q, k, v, log_decay, beta, ridge, state, **choices):
    """Runs `mesa_chunk` on a sequence of one token."""
    q, k, v, log_decay, beta = (x[:, None] for x in (q, k, v, log_decay, beta))
    out, state, *report = mesa_chunk(q, k, v, log_decay, beta, ridge, state, **choices)
    return (out[:, 0], state, *jax.tree.map(lambda x: x[:, 0], report))
