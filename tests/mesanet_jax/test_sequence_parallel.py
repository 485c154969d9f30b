"""Time split over devices: every stretch solved where it lies equals the whole sequence in one place."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from many_devices import MESHES, PRODUCTS

from mesanet_jax import sharding
from mesanet_jax.convolution import short_convolution
from mesanet_jax.sharding import MESH_AXES
from pallas_kernels import MesaState, SolverConfig, mesa_chunk, mesa_summary
from pallas_kernels.mesa_chunk.cases import Case, Inputs, sample
from tests import tolerances

rng = np.random.default_rng(0)
SMALL = Case(source="two stretches of 12", batch=2, length=24, key_dim=6, value_dim=5)
SOLVER = SolverConfig(max_steps=20, tolerance=0.0)
DOCUMENTS = {  # of the 24 tokens of both rows; -1 is padding
    "one": None,
    "one begins in each stretch": np.repeat([[0, 1, 2], [0, 0, 1]], [5, 9, 10], axis=1),
    "one begins with the second stretch": np.repeat([[0, 1], [2, 3]], 12, axis=1),
    "padding across the boundary": np.repeat([[0, -1, 0], [0, -1, 1]], [10, 5, 9], axis=1),
    "nothing but padding in a stretch": np.repeat([[-1, 4], [4, -1]], 12, axis=1),
}


def mesh_of(**sizes: int):
    shape = tuple(sizes.get(name, 1) for name in MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def pulled(function, arrays, names):
    """Returns values and gradients for random cotangents."""
    values, pullback = jax.vjp(jax.jit(function), *arrays)
    cotangents = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(1).normal(size=x.shape)), values)
    gradients = pullback(cotangents)
    return [*jax.tree.leaves(values), *gradients], [f"value {i}" for i in range(len(jax.tree.leaves(values)))] + names


def assert_same(found, expected):
    for x, truth, name in zip(found[0], expected[0], expected[1], strict=True):
        tolerances.assert_near(x, truth, 10 * tolerances.LAW["float64"], name)


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_a_layer_whose_time_is_split_equals_the_whole_in_value_state_and_gradient(documents):
    ids = DOCUMENTS[documents]
    if documents == "one begins in each stretch":
        ids = ids.astype(np.uint8)  # numbers without a sign have no -1 to stand for none

    def layer(q, k, v, log_decay, beta, ridge, kk, kv):
        choices = {"segment_ids": ids, "solver": SOLVER, "with_report": False}
        return sharding.mesa(q, k, v, log_decay, beta, ridge, MesaState(kk, kv), **choices)

    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in sample(SMALL)]
        expected = pulled(layer, arrays, list(Inputs._fields))
        with jax.set_mesh(mesh_of(sequence=2)):
            assert_same(pulled(layer, arrays, list(Inputs._fields)), expected)


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_a_convolution_whose_time_is_split_equals_the_whole_in_value_history_and_gradient(documents):
    ids = None if DOCUMENTS[documents] is None else jnp.asarray(DOCUMENTS[documents])
    with jax.enable_x64(True):
        arrays = [jnp.asarray(rng.normal(size=s)) for s in [(2, 24, 3, 4), (4, 3, 4), (2, 3, 3, 4)]]
        names = ["x", "taps", "history"]
        expected = pulled(lambda *xs: short_convolution(*xs, ids), arrays, names)
        with jax.set_mesh(mesh_of(sequence=2)):
            assert_same(pulled(lambda *xs: sharding.short_convolution(*xs, ids), arrays, names), expected)


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_a_summary_gives_the_state_after_any_state_before(documents):
    ids = DOCUMENTS[documents]
    with jax.enable_x64(True):
        q, k, v, log_decay, beta, ridge, kk, kv = (jnp.asarray(x) for x in sample(SMALL))

        def from_summary(k, v, log_decay, beta, kk, kv):
            return mesa_summary(k, v, log_decay, beta, segment_ids=ids).after(MesaState(kk, kv))

        def from_operator(k, v, log_decay, beta, kk, kv):
            arrays = q, k, v, log_decay, beta, ridge, MesaState(kk, kv)
            return mesa_chunk(*arrays, segment_ids=ids, implementation="reference")[1]

        arrays, names = (k, v, log_decay, beta, kk, kv), ["k", "v", "log_decay", "beta", "kk", "kv"]
        assert_same(pulled(from_summary, arrays, names), pulled(from_operator, arrays, names))


def test_a_summary_of_strong_and_weak_gates_keeps_its_digits():
    *_, k, v, log_decay, beta = (np.float32(x) for x in sample(SMALL)[:5])
    log_decay[:, 5] = -np.inf
    log_decay[:, 20] = -30.0
    found = mesa_summary(*map(jnp.asarray, (k, v, log_decay, beta))).added
    with jax.enable_x64(True):
        exact = mesa_summary(*(jnp.asarray(x, jnp.float64) for x in (k, v, log_decay, beta))).added
    for x, truth in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        tolerances.assert_near(x, truth, tolerances.LAW["float32"])


COLLECTIVES = re.compile(r" (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")


@pytest.mark.parametrize(
    ("axis", "expected"),
    [("data", set()), ("fsdp", set()), ("tensor", set()), ("sequence", {"collective-permute"})],
)
def test_devices_say_nothing_to_each_other_around_the_solve_but_the_state_that_is_handed_on(axis, expected):
    mesh = mesh_of(**{axis: 2})
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in sample(SMALL)[:6]]
    batch, time, heads = (dict(sharding.RULES)[name] for name in ("batch", "time", "heads"))
    specs = [*[jax.P(batch, time, heads)] * 5, jax.P(heads)]

    def layer(*arrays):
        return sharding.mesa(*arrays, None, segment_ids=None, solver=SOLVER, with_report=False)[0]

    with jax.set_mesh(mesh):
        placed = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))
            for x, spec in zip(shapes, specs, strict=True)
        ]
        program = jax.jit(layer).lower(*placed).compile().as_text()
    assert set(COLLECTIVES.findall(program)) == expected


@pytest.fixture(scope="module")
def on_many_devices():
    """What tests/mesanet_jax/many_devices.py finds, in a process that has so many."""
    script = Path(__file__).parent / "many_devices.py"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=16", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(script)], env=os.environ | flags, capture_output=True, text=True, timeout=500
    )
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", MESHES)
def test_a_step_on_eight_devices_equals_one_on_a_single_device(on_many_devices, name):
    """Together the meshes have every axis and every pair of axes."""
    found = on_many_devices[name]
    assert found["spread"] == sorted(axis for axis, size in MESHES[name].items() if size > 1 and axis in "fsdp tensor")
    assert found["rows"]
    assert found["num_targets"] == 0
    assert found["loss"] <= tolerances.MODEL["float32"]
    assert max(found["grad_norm"], found["moments"]) <= tolerances.MODEL["gradient"]


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_gradient_of_a_parameter_is_the_same_however_devices_scatter_it(on_many_devices, name):
    assert on_many_devices[name] <= tolerances.LAW["float32"]
