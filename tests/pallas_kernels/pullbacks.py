"""Calls an operator and its derivative under one jit, so that a test states only inputs and expectations."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import MesaState, mesa_chunk
from pallas_kernels.mesa_chunk.cases import Inputs


class Cotangents(NamedTuple):
    """Of the outputs and of the final state."""

    out: np.ndarray
    kk: np.ndarray
    kv: np.ndarray

    def scaled(self, scale: float) -> "Cotangents":
        """Returns all three times `scale`."""
        return Cotangents(*(scale * x for x in self))


class Differentiated(NamedTuple):
    """Values and gradients by name, all numpy."""

    values: dict[str, np.ndarray]  # out, final_kk, final_kv
    gradients: dict[str, np.ndarray]  # by the names of Inputs


def random_cotangents(inputs: Inputs, seed: int = 1) -> Cotangents:
    """Draws cotangents; that of kk is not symmetric, on purpose."""
    rng = np.random.default_rng(seed)
    return Cotangents(*(rng.normal(size=x.shape) for x in (inputs.v, inputs.kk, inputs.kv)))


def differentiate(inputs: Inputs, cotangents: Cotangents, segment_ids=None, *, dtype="float32", **choices):
    """Returns values and gradients of `mesa_chunk`, on inputs cast to `dtype`; states are float32 at least."""
    with jax.enable_x64(dtype == "float64"):
        state_dtype = jnp.promote_types(dtype, jnp.float32)
        *sequences, kk, kv = inputs
        arrays = (*(jnp.asarray(x, dtype) for x in sequences), *(jnp.asarray(x, state_dtype) for x in (kk, kv)))
        dout, *dstate = cotangents
        dout = (jnp.asarray(dout, dtype), *(jnp.asarray(x, state_dtype) for x in dstate))
        values, gradients = _pullback(tuple(choices.items()))(arrays, dout, segment_ids)
        values, gradients = jax.device_get((values, gradients))
    names = ("out", "final_kk", "final_kv")
    return Differentiated(dict(zip(names, values, strict=True)), dict(zip(Inputs._fields, gradients, strict=True)))


@functools.cache
def _pullback(choices: tuple):
    """Compiled once per choices, shapes and dtype; tests share it."""

    def pullback(arrays, cotangents, segment_ids):
        def call(*arrays):
            *arguments, kk, kv = arrays
            out, state = mesa_chunk(*arguments, MesaState(kk, kv), segment_ids=segment_ids, **dict(choices))
            return out, *state

        values, pull = jax.vjp(call, *arrays)
        return values, pull(cotangents)

    return jax.jit(pullback)
