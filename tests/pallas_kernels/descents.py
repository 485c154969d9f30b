"""Calls `router_descent` and its derivative under one jit, so that a test states only inputs and expectations."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import router_descent
from pallas_kernels.router_descent.cases import Case
from pallas_kernels.router_descent.contract import Inputs

FLOATS = tuple(name for name in Inputs._fields if name != "labels")


class Cotangents(NamedTuple):
    """Of the routing and of the loss."""

    routing: np.ndarray
    loss: np.ndarray


class Differentiated(NamedTuple):
    """Values and gradients by name, all numpy."""

    values: dict[str, np.ndarray]  # routing, loss
    gradients: dict[str, np.ndarray]  # by the names of FLOATS


def random_cotangents(inputs: Inputs, seed: int = 1) -> Cotangents:
    rng = np.random.default_rng(seed)
    return Cotangents(rng.normal(size=inputs.log_routing.shape), rng.normal(size=len(inputs.log_routing)))


def rounded(inputs: Inputs, dtype: str) -> Inputs:
    """What a computation on read-outs in `dtype` is given; in bfloat16 all else is float32, as in use."""
    other = jnp.promote_types(dtype, jnp.float32)
    kept = {name: dtype if name == "readout" else other for name in FLOATS}
    return inputs._replace(**{name: getattr(inputs, name).astype(kept[name]).astype(np.float64) for name in FLOATS})


def arrays(inputs: Inputs, dtype: str) -> Inputs:
    """On the device: read-outs in `dtype`, the rest in float32 at least."""
    other = jnp.promote_types(dtype, jnp.float32)
    cast = {name: jnp.asarray(getattr(inputs, name), dtype if name == "readout" else other) for name in FLOATS}
    return Inputs(labels=jnp.asarray(inputs.labels), **cast)


def differentiate(inputs: Inputs, cotangents: Cotangents, *, dtype="float32", **choices) -> Differentiated:
    """Returns values and gradients of `router_descent` on inputs cast to `dtype`."""
    with jax.enable_x64(dtype == "float64"):
        cotangents = Cotangents(*(jnp.asarray(x, jnp.promote_types(dtype, jnp.float32)) for x in cotangents))
        values, gradients = jax.device_get(_pullback(tuple(choices.items()))(arrays(inputs, dtype), cotangents))
    return Differentiated(dict(zip(Cotangents._fields, values, strict=True)), gradients)


def descend(inputs: Inputs, *, dtype="float64", **choices) -> Cotangents:
    """Returns routing and loss alone."""
    with jax.enable_x64(dtype == "float64"):
        return Cotangents(*jax.device_get(_operator(tuple(choices.items()))(*arrays(inputs, dtype))))


def rule(case: Case) -> dict:
    """The choices that a case names."""
    return dict(groups=case.groups)


@functools.cache
def _operator(choices: tuple):
    return jax.jit(functools.partial(router_descent, **dict(choices)))


@functools.cache
def _pullback(choices: tuple):
    """Compiled once per choices, shapes and dtype; tests share it."""

    def pullback(inputs, cotangents):
        def call(floats):
            return router_descent(**floats, labels=inputs.labels, **dict(choices))

        values, pull = jax.vjp(call, {name: getattr(inputs, name) for name in FLOATS})
        return values, pull(tuple(cotangents))[0]

    return jax.jit(pullback)
