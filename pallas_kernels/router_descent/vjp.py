"""One custom derivative above all implementations: the steps are differentiated in xla's closed forms."""

import functools

import jax

from pallas_kernels.router_descent import pallas_tpu, xla
from pallas_kernels.router_descent.contract import Inputs, Rule

BACK_ENDS = {"xla": xla.forward, "pallas_tpu": pallas_tpu.forward, "by_platform": pallas_tpu.forward_or_xla}


@functools.partial(jax.jit, static_argnums=(1, 2))  # a loop called outside jit would be compiled anew every time
def _primal(inputs: Inputs, rule: Rule, back_end: str) -> tuple[jax.Array, jax.Array]:
    """Returns the routing [b, e] and the surrogate loss [b]."""
    return BACK_ENDS[back_end](inputs, rule)


router_descent = jax.custom_vjp(_primal, nondiff_argnums=(1, 2))


def _forward(inputs: Inputs, rule: Rule, back_end: str):
    return _primal(inputs, rule, back_end), inputs


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(rule: Rule, back_end: str, inputs: Inputs, cotangents) -> tuple[Inputs]:
    del back_end  # all have the same derivative
    return (xla.backward(inputs, cotangents, rule),)


router_descent.defvjp(_forward, _backward)
