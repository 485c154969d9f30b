"""Whether anything that may be asked of `mesa_chunk` and its derivative comes back as NaN or infinity."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import MesaState, SolverConfig, mesa_chunk
from pallas_kernels.mesa_chunk.cases import Adversary, adversary

LENGTH, DIM, BATCH = 16, 8, 1000
# dtype of the inputs, precision of the steps, share of the heads
KINDS = (
    ("float32", "float32", 0.4),
    ("float32", "mixed", 0.2),
    ("bfloat16", "bfloat16_3x", 0.2),
    ("float32", "bfloat16", 0.2),
)


def count(num_heads: int, max_steps: int = 16) -> dict[str, tuple[int, int]]:
    """Returns heads solved, and heads with anything not finite in value or gradient, by dtype and precision."""
    counts, seed = {}, 0
    for dtype, precision, share in KINDS:
        config = SolverConfig(max_steps=max_steps, tolerance=0.0, precision=precision)
        bad, batches = 0, math.ceil(share * num_heads / BATCH)
        for _ in range(batches):
            bad += int(np.sum(~all_finite(adversary(BATCH, LENGTH, DIM, seed), dtype, config)))
            seed += 1
        counts[f"{dtype} inputs, {precision} steps"] = batches * BATCH, bad
    return counts


def all_finite(heads: Adversary, dtype: str, config: SolverConfig) -> np.ndarray:
    """Returns [h] bool: whether outputs, final states, residuals and all gradients of a head are finite."""
    *sequences, kk, kv = heads.inputs
    arrays = *(jnp.asarray(x, dtype) for x in sequences), *(jnp.asarray(x, jnp.float32) for x in (kk, kv))
    finite = _run(arrays, jnp.asarray(heads.segment_ids), jnp.asarray(heads.dout, dtype), config=config)
    return np.asarray(finite)


@functools.partial(jax.jit, static_argnames="config")
def _run(arrays, segment_ids, dout, *, config):
    def run_head(arrays, segment_ids, dout):
        def call(q, k, v, log_decay, beta, ridge, kk, kv):
            choices = {"segment_ids": segment_ids, "solver": config, "with_report": True}
            out, state, report = mesa_chunk(q, k, v, log_decay, beta, ridge, MesaState(kk, kv), **choices)
            return (out, *state), report.residual

        values, pull, residual = jax.vjp(call, *arrays, has_aux=True)
        gradients = pull((dout, jnp.ones_like(values[1]), jnp.zeros_like(values[2])))
        return jnp.stack([jnp.all(jnp.isfinite(x)) for x in (residual, *values, *gradients)]).all()

    return jax.vmap(run_head)(arrays, segment_ids, dout)
