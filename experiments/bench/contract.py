"""What must hold before a time is printed: the operator meets its float64 reference, the yardstick the operator."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cli import UserError
from pallas_kernels import MesaState, SolverConfig, mesa_chunk
from pallas_kernels.mesa_chunk.cases import CASES, EASY, Inputs, sample

CHECKED = ("odd_length", "paper_head", "resets", "low_rank")
TOLERANCE = 2e-5  # float32, relative to the largest entry; tests/tolerances.py is stricter, per input


def check(names: tuple[str, ...] = CHECKED) -> None:
    """Raises UserError if values or gradients of the operator are wrong on one of the named cases."""
    for name in names:
        inputs = Inputs(*(np.float32(x) for x in sample(CASES[name])))
        with jax.enable_x64(True):
            expected = _pulled([jnp.asarray(x, jnp.float64) for x in inputs], implementation="reference")
        actual = _pulled(list(map(jnp.asarray, inputs)), solver=SolverConfig(max_steps=60, tolerance=0.0))
        require_near(f"mesa_chunk on {name}", actual, expected)


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


def require_near(what: str, actual, expected) -> None:
    """Raises UserError if arrays differ by more than TOLERANCE of the largest entry of what is expected."""
    for found, truth in zip(actual, expected, strict=True):
        found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
        error = np.max(np.abs(found - truth)) / np.max(np.abs(truth))
        if not error <= TOLERANCE:
            raise UserError(
                f"{what} is off by {error:.1e} of its largest entry; nothing is timed before that is mended."
            )
