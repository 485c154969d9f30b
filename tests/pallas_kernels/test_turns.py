"""Computations written in turns are those written one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from tolerances import LAW, assert_near

from pallas_kernels.mesa_chunk.products import split, times_parts
from pallas_kernels.turns import in_turns

MATRICES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16, 16)), jnp.float32)


def chain(x):
    """Two products, each in three passes, with something to do in between and after."""
    first = times_parts(split(x, "bfloat16_3x"), x)
    second = times_parts(split(x, "bfloat16_3x"), jnp.where(first > 0, first, jnp.exp(first)))
    return {"sum": jnp.sum(second), "both": (first, jnp.tanh(second))}


@pytest.mark.parametrize("count", [0, 1, 3])
def test_results_are_those_of_one_after_the_other(count):
    found = jax.jit(lambda xs: in_turns(lambda i: chain(xs[i]), count))(MATRICES)
    expected = [chain(x) for x in MATRICES[:count]]
    jax.tree.map(lambda a, b: assert_near(a, b, LAW["float32"]), found, expected)


def test_a_turn_ends_with_a_product_in_all_its_passes():
    program = jax.make_jaxpr(lambda xs: in_turns(lambda i: chain(xs[i]), 2))(MATRICES)
    names = [equation.primitive.name for equation in program.eqns]
    written = " ".join(name for name in names if name in ("dot_general", "exp", "tanh"))
    passes = " ".join(["dot_general"] * 3)
    assert written == f"{passes} {passes} exp {passes} exp {passes} tanh tanh"


def test_computations_of_other_lengths_run_to_their_ends():
    def powers(i):
        x = MATRICES[i]
        for _ in range(i):
            x = jnp.sin(x @ MATRICES[i])
        return x

    for found, expected in zip(in_turns(powers, 3), map(powers, range(3)), strict=True):
        assert_near(found, expected, LAW["float32"])


def test_references_are_read_and_written_in_a_computation_s_own_order():
    def kernel(x, y):
        def square_twice(i):
            y[i] = x[i] @ x[i]
            y[i] = jnp.tanh(y[i] @ y[i])
            return jnp.max(y[i])

        largest = in_turns(square_twice, 3)
        y[...] = y[...] + sum(largest)

    shape = jax.ShapeDtypeStruct(MATRICES.shape, jnp.float32)
    found = pl.pallas_call(kernel, out_shape=shape, interpret=True)(MATRICES)
    squares = jnp.stack([jnp.tanh((x @ x) @ (x @ x)) for x in MATRICES])
    assert_near(found, squares + sum(jnp.max(x) for x in squares), LAW["float32"])
