"""What must hold before a time is printed: the operator meets its float64 reference, the yardstick the operator."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cli import UserError
from pallas_kernels import MesaState, SolverConfig, mesa_chunk, mesa_step
from pallas_kernels.mesa_chunk.cases import CASES, EASY, Inputs, sample

CHECKED = ("odd_length", "paper_head", "resets", "low_rank")
TO_ROUNDING = SolverConfig(max_steps=60, tolerance=0.0)
TOLERANCE = 2e-5  # float32, relative to the largest entry; tests/tolerances.py is stricter, per input


def check(names: tuple[str, ...] = CHECKED, implementation: str | None = None) -> None:
    """Raises UserError if values or gradients of the operator are wrong on one of the named cases."""
    for name in names:
        inputs = _inputs(name)
        with jax.enable_x64(True):
            expected = _pulled([jnp.asarray(x, jnp.float64) for x in inputs], implementation="reference")
        actual = _pulled(list(map(jnp.asarray, inputs)), solver=TO_ROUNDING, implementation=implementation)
        require_near(_called("mesa_chunk", name, implementation), actual, expected)


def check_step(names: tuple[str, ...] = CHECKED, implementation: str | None = None) -> None:
    """Raises UserError if the operator for one token is wrong on the first token of one of the named cases."""
    for name in names:
        inputs = _inputs(name)
        arrays = [*(x[:, 0] for x in inputs[:5]), *inputs[5:]]
        with jax.enable_x64(True):
            expected = _stepped([jnp.asarray(x, jnp.float64) for x in arrays], implementation="reference")
        actual = _stepped(list(map(jnp.asarray, arrays)), solver=TO_ROUNDING, implementation=implementation)
        require_near(_called("mesa_step", name, implementation), actual, expected)


def _inputs(name: str) -> Inputs:
    return Inputs(*(np.float32(x) for x in sample(CASES[name])))


def _called(operator: str, case: str, implementation: str | None) -> str:
    return f"{operator} on {case}" + (f' by "{implementation}"' if implementation else "")


def check_yardstick() -> None:
    """Raises UserError if the yardstick computes something else."""
    from experiments.bench import yardstick

    inputs = sample(EASY)[:6]
    arrays = [jnp.asarray(x[:, :256] if x.ndim > 2 else x, jnp.float32) for x in inputs]
    dout = jnp.ones_like(arrays[2])
    out, pull = jax.vjp(lambda *x: mesa_chunk(*x, solver=SolverConfig(tolerance=0.0))[0], *arrays)
    theirs, gradients = yardstick.forward_backward(*yardstick.tensors((*arrays, dout)), chunk_length=64)
    heads = out.shape[2]
    flat = [yardstick.sequence(x, heads).reshape(x.numel()) for x in (theirs, *gradients[:3], gradients[4])]
    require_near("the yardstick", flat, [np.ravel(x) for x in (out, *pull(dout)[:3], pull(dout)[4])])


def _pulled(arrays, **choices):
    """Values and gradients of all inputs for cotangents of one."""

    def call(q, k, v, log_decay, beta, ridge, kk, kv):
        out, state = mesa_chunk(q, k, v, log_decay, beta, ridge, MesaState(kk, kv), **choices)
        return out, *state

    values, pull = jax.vjp(jax.jit(call), *arrays)
    return jax.device_get((*values, *pull(jax.tree.map(jnp.ones_like, values))))


def _stepped(arrays, **choices):
    """Values of all outputs."""

    def call(q, k, v, log_decay, beta, ridge, kk, kv):
        out, state = mesa_step(q, k, v, log_decay, beta, ridge, MesaState(kk, kv), **choices)
        return out, *state

    return jax.device_get(jax.jit(call)(*arrays))


def require_near(what: str, actual, expected) -> None:
    """Raises UserError if arrays differ by more than TOLERANCE of the largest entry of what is expected."""
    for found, truth in zip(actual, expected, strict=True):
        off = error(found, truth)
        if not off <= TOLERANCE:
            raise UserError(f"{what} is off by {off:.1e} of its largest entry; nothing is timed before that is mended.")


def error(found, truth) -> float:
    """Returns the largest difference of two arrays in parts of the largest entry of the second."""
    found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    return float(np.max(np.abs(found - truth)) / np.max(np.abs(truth)))
