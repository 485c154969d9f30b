"""The operator under JAX's transformations, and what it costs in memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ahead_of_time import tracing_for_a_tpu
from jax.ad_checkpoint import checkpoint_policies
from jax.sharding import PartitionSpec
from jaxtyping import TypeCheckError, jaxtyped
from pullbacks import differentiate, random_cotangents
from tolerances import CHUNKWISE, LAW, assert_near

from pallas_kernels import MesaState, SolverConfig, mesa_chunk, mesa_step
from pallas_kernels.mesa_chunk import pallas_gpu, pallas_tpu, xla
from pallas_kernels.mesa_chunk.cases import EASY, Case, sample

SMALL = Case(source="two chunks, the second one short", batch=2, length=67, key_dim=6, value_dim=5)
LONG = dataclasses.replace(EASY, num_heads=2, key_dim=32, value_dim=32)


def float32(inputs):
    return [jnp.float32(x) for x in inputs]


def loss(*arrays, solver=SolverConfig(tolerance=0.0), implementation=None):
    out, state = mesa_chunk(*arrays[:6], MesaState(*arrays[6:]), solver=solver, implementation=implementation)
    return jnp.sum(jnp.sin(out)) + jnp.sum(state.kk**2) + jnp.sum(state.kv)


gradient = jax.grad(loss, argnums=tuple(range(8)))


def test_under_jit_and_without_it_the_answer_is_the_same():
    arrays = float32(sample(dataclasses.replace(SMALL, length=2)))
    for plain, jitted in zip(gradient(*arrays), jax.jit(gradient)(*arrays), strict=True):
        assert_near(jitted, plain, LAW["float32"])


def test_vmap_equals_one_call_after_the_other():
    arrays = [float32(sample(SMALL, seed)) for seed in range(3)]
    stacked = [jnp.stack(x) for x in zip(*arrays, strict=True)]
    together = jax.jit(jax.vmap(gradient))(*stacked)
    for one, alone in enumerate(map(functools.partial(_call, jax.jit(gradient)), arrays)):
        for found, truth in zip(together, alone, strict=True):
            assert_near(found[one], truth, LAW["float32"])


def _call(function, arguments):
    return function(*arguments)


def test_heads_split_over_devices_equal_one_device():
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    time_major, state, ridge = (PartitionSpec(*axes, "heads") for axes in ((None, None), (None,), ()))
    specs = (*[time_major] * 5, ridge, state, state)
    arrays = float32(sample(SMALL))
    split = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=specs))
    for found, truth in zip(split(*arrays), jax.jit(gradient)(*arrays), strict=True):
        assert_near(found, truth, LAW["float32"])


def equations(jaxpr):
    """Yields every equation of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from equations(getattr(inner, "jaxpr", inner))


def _is_jaxpr(x) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def count(primitive: str, function, arrays) -> int:
    """Counts a primitive before XLA, which merges equal work on CPUs by itself; every platform has its own."""
    names = [e.primitive.name for e in equations(jax.make_jaxpr(function)(*arrays).jaxpr)]
    return names.count(primitive) // 2


def num_solves(function, arrays) -> int:
    """Only the solver has `while`: rounds and steps, with the factor and without. All other loops are `scan`."""
    return count("while", function, arrays) // 4


def num_factors(function, arrays) -> int:
    """A factor of these sizes eliminates two small matrices, which nothing else divides by a root."""
    return count("rsqrt", function, arrays) // 2


nested_loss = functools.partial(loss, solver=SolverConfig(preconditioner="nested"))
plain_loss = functools.partial(loss, solver=SolverConfig(preconditioner="none"))


def test_a_kept_solution_spares_the_backward_pass_the_forward_solve():
    arrays = float32(sample(SMALL))
    keep = checkpoint_policies.save_only_these_names("mesa_solution")
    assert num_solves(nested_loss, arrays) == 1
    assert num_solves(jax.value_and_grad(nested_loss), arrays) == 2
    assert num_solves(jax.value_and_grad(jax.checkpoint(nested_loss, policy=keep)), arrays) == 2
    assert num_solves(jax.value_and_grad(jax.checkpoint(nested_loss)), arrays) == 3


def test_the_backward_solve_takes_the_factor_of_the_forward_solve():
    arrays = float32(sample(SMALL))
    assert num_factors(jax.value_and_grad(nested_loss), arrays) == 1
    assert num_factors(jax.value_and_grad(plain_loss), arrays) == 0


@pytest.mark.parametrize("implementation", [xla, pallas_tpu, pallas_gpu])
def test_the_condition_of_a_loop_reads_only_what_the_loop_carries(implementation):
    """Else it may round a threshold otherwise than the body does, and wait for a step that the body does not take."""
    *arrays, kk, kv = (jax.ShapeDtypeStruct(x.shape, "float32") for x in sample(SMALL))
    starts = jax.ShapeDtypeStruct(arrays[0].shape[:2], "int32")
    forward = functools.partial(implementation.forward, solver=SolverConfig())
    jaxpr = jax.make_jaxpr(forward)(*arrays, MesaState(kk, kv), starts).jaxpr
    loops = [e for e in equations(jaxpr) if e.primitive.name == "while"]
    assert len(loops) >= 4, "rounds and steps, with the factor and without"
    assert not any(loop.params["cond_nconsts"] for loop in loops)


def test_no_array_holds_a_matrix_per_token():
    case = dataclasses.replace(LONG, length=512, num_heads=1)
    jaxpr = jax.make_jaxpr(gradient)(*float32(sample(case)))
    results = (variable.aval for equation in equations(jaxpr.jaxpr) for variable in equation.outvars)
    sizes = {str(aval): int(np.prod(aval.shape)) for aval in results if hasattr(aval, "shape")}
    largest, size = max(sizes.items(), key=lambda item: item[1])
    assert len(sizes) > 40, "the walk did not reach the inside of the operator"
    assert size <= 2 * 512 * max(64, 32), largest  # a tile of decays per chunk, or a few vectors per token


def test_peak_memory_of_forward_and_backward_grows_linearly_with_time():
    shapes = jax.eval_shape(lambda: float32(sample(LONG)))
    peaks = {}
    for length in (1024, 2048, 4096):
        arrays = [jax.ShapeDtypeStruct((1, length, *x.shape[2:]), x.dtype) for x in shapes[:5]]
        peaks[length] = jax.jit(gradient).lower(*arrays, *shapes[5:]).compile().memory_analysis().temp_size_in_bytes
    slopes = [(peaks[2 * n] - peaks[n]) / n for n in (1024, 2048)]
    assert slopes[1] <= 1.05 * slopes[0], peaks
    assert slopes[1] <= 4 * 2 * 40 * 32, f"{slopes[1]} bytes per token: more than 40 vectors per token and head"


def test_gradient_of_a_step_is_that_of_a_sequence_of_one():
    inputs = sample(dataclasses.replace(SMALL, length=1))
    cotangents = random_cotangents(inputs)
    expected = differentiate(inputs, cotangents, dtype="float64", implementation="reference")
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x[:, 0] if x.ndim > 2 and name not in ("kk", "kv") else x) for name, x in _items(inputs)]
        (out, state), pull = jax.vjp(jax.jit(lambda *x: mesa_step(*x[:6], MesaState(*x[6:]))), *arrays)
        found = pull((jnp.asarray(cotangents.out[:, 0]), MesaState(*map(jnp.asarray, cotangents[1:]))))
    assert_near(out, expected.values["out"][:, 0], CHUNKWISE["float64"])
    assert_near(state.kk, expected.values["final_kk"], CHUNKWISE["float64"])
    for (name, truth), grad in zip(expected.gradients.items(), found, strict=True):
        assert_near(np.reshape(grad, truth.shape), truth, CHUNKWISE["float64"], f"gradient of {name}")


def _items(inputs):
    return inputs._asdict().items()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_annotations_are_true(dtype):
    from beartype import beartype

    case = dataclasses.replace(SMALL, length=2)
    q, k, v, log_decay, beta, ridge, kk, kv = (jnp.asarray(x, dtype) for x in sample(case))
    state = MesaState(kk, kv).astype(jnp.float32)
    checked = jaxtyped(mesa_chunk, typechecker=beartype)
    out, after, report = checked(
        q, k, v, log_decay, beta, ridge, state, segment_ids=jnp.zeros((2, 2), jnp.int32), with_report=True
    )
    assert out.dtype == v.dtype and after.kk.dtype == after.kv.dtype == report.residual.dtype == jnp.float32
    token = (x[:, 0] for x in (q, k, v, log_decay, beta))
    step = jaxtyped(mesa_step, typechecker=beartype)(*token, ridge, state, with_report=True)
    assert step[0].dtype == v.dtype and step[1].kk.dtype == jnp.float32
    with pytest.raises(TypeCheckError):
        checked(q, k, v, log_decay[..., None], beta, ridge)


@functools.cache
def traced_for_a_tpu(implementation: str | None):
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in sample(LONG)]
    with tracing_for_a_tpu():
        return jax.jit(jax.grad(functools.partial(loss, implementation=implementation), range(8))).trace(*shapes)


def test_the_default_takes_the_kernels_where_the_program_is_for_a_tpu_and_xla_elsewhere():
    program = traced_for_a_tpu(None).lower(lowering_platforms=("tpu",)).as_text()
    assert all(f"mesa_chunk_{kernel}" in program for kernel in ("forward", "adjoint", "cotangents"))
    assert "tpu_custom_call" not in traced_for_a_tpu("xla").lower(lowering_platforms=("tpu",)).as_text()
    one = [jax.ShapeDtypeStruct(s, jnp.float32) for s in [(1, 2, 8)] * 3 + [(1, 2)] * 2 + [(2, 8)]]
    state = MesaState(*[jax.ShapeDtypeStruct((1, 2, 8, 8), jnp.float32)] * 2)
    with tracing_for_a_tpu():
        step = jax.jit(mesa_step).trace(*one, state)
    assert "mesa_step" in step.lower(lowering_platforms=("tpu",)).as_text()


def test_a_choice_that_waits_for_the_platform_keeps_no_more_than_the_one_that_is_made():
    """Branches keep their own for the backward pass; those that are not taken must leave nothing behind."""
    chosen, named = (traced_for_a_tpu(x).lower(lowering_platforms=("cpu",)).compile() for x in (None, "xla"))
    assert "tpu_custom_call" not in chosen.as_text()
    assert chosen.memory_analysis().temp_size_in_bytes <= named.memory_analysis().temp_size_in_bytes
