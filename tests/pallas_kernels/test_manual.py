"""Operators inside `jax.shard_map`, which keeps track of what varies along the axes of a mesh unless told not to."""

import functools

import jax
import jax.numpy as jnp
import pytest
from ahead_of_time import GPUS, TPU
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh
from tolerances import LAW, assert_near

from pallas_kernels import MesaState, SolverConfig, mesa_chunk, mesa_step, router_descent
from pallas_kernels.mesa_chunk.cases import Case, sample

PLATFORMS = {"tpu": TPU, "cuda": GPUS["9.0"]}
B, T, H, K, V = 2, 130, 3, 8, 5
SOLVERS = {"solved": SolverConfig(), "not solved": SolverConfig(max_steps=0)}


def arrays(*shapes):
    return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)


TOKENS = arrays((B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H), (B, T, H))
RIDGE, STATE = arrays((H, K)), arrays((B, H, K, K), (B, H, K, V))


def chunk(tokens, ridge, state, **choices):
    return mesa_chunk(*tokens, *ridge, MesaState(*state), with_report=True, **choices)


def chunk_from_nothing(tokens, ridge, **choices):
    return mesa_chunk(*tokens, *ridge, **choices)


def step(tokens, ridge, state, **choices):
    return mesa_step(*(x[:, 0] for x in tokens), *ridge, MesaState(*state), with_report=True, **choices)


def value_and_gradient(operator):
    def loss(*args):
        results = operator(*args)
        return sum(jnp.sum(x) for x in jax.tree.leaves(results) if jnp.issubdtype(x.dtype, jnp.floating)), results

    def both(*args):
        (_, results), grads = jax.value_and_grad(loss, argnums=tuple(range(len(args))), has_aux=True)(*args)
        return results, grads

    return both


def lower(platform: str, operator, arguments, shared: tuple[int, ...]):
    """Lowers for two devices that split the batch, except of the arguments with these numbers."""
    specs = tuple(jax.P() if i in shared else jax.P("data") for i in range(len(arguments)))
    mesh = AbstractMesh((2,), ("data",), (AxisType.Auto,), abstract_device=PLATFORMS[platform])
    with use_abstract_mesh(mesh):
        split = jax.shard_map(value_and_gradient(operator), mesh=mesh, in_specs=specs, out_specs=(jax.P("data"), specs))
        return jax.jit(split).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize(
    ("platform", "implementation"),
    [("tpu", None), ("tpu", "xla"), ("tpu", "reference"), ("tpu", "pallas_tpu"), ("cuda", "pallas_gpu")],
)
@pytest.mark.parametrize("operator", [chunk, step])
def test_devices_share_a_ridge_and_sum_its_gradient(operator, platform, implementation, solver):
    operator = functools.partial(operator, implementation=implementation, solver=solver)
    assert "all_reduce" in lower(platform, operator, (TOKENS, RIDGE, STATE), shared=(1,))


@pytest.mark.parametrize("implementation", [None, "xla", "reference", "pallas_tpu"])
def test_devices_share_a_starting_point_and_sum_its_gradient(implementation):
    floats, labels = arrays((B, 4, 3, V), (B, 4, V), (B, 4)), jax.ShapeDtypeStruct((B, 4), jnp.int32)

    def descend(others, log_routing, rates):
        readout, offset, weights = others
        labelled = jnp.zeros_like(weights, labels.dtype)
        start = jnp.broadcast_to(log_routing, (len(weights), 3))
        return router_descent(start, readout, offset, labelled, weights, *rates, implementation=implementation)

    assert "all_reduce" in lower("tpu", descend, (floats, *arrays((3,)), arrays((6,))), shared=(1, 2))


def test_values_and_gradients_are_those_of_one_device():
    case = Case(source="a batch for two devices", batch=2, length=67, key_dim=6, value_dim=5)
    q, k, v, log_decay, beta, ridge, *_ = (jnp.float32(x) for x in sample(case))
    both = value_and_gradient(lambda tokens, ridge: chunk_from_nothing(tokens, ridge)[0])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    specs = jax.P("data"), jax.P()
    split = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=specs, out_specs=(jax.P("data"), specs)))
    arguments = (q, k, v, log_decay, beta), (ridge,)
    jax.tree.map(lambda a, b: assert_near(a, b, LAW["float32"]), split(*arguments), jax.jit(both)(*arguments))
