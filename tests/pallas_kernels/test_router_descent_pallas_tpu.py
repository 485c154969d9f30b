"""Rungs 4 and 5: the TPU kernel in the interpreter and in the simulator, then compiled for TPUs that are not here."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ahead_of_time import CHIPS, compile_for, needs_libtpu, tracing_for_a_tpu
from descents import arrays, descend, rounded
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from tolerances import DESCENT, assert_near

from pallas_kernels import dispatch, router_descent
from pallas_kernels.router_descent import pallas_tpu
from pallas_kernels.router_descent.cases import CASES, TILES, sample
from pallas_kernels.router_descent.contract import Inputs, make_rule, prepare
from pallas_kernels.router_descent.pallas_tpu import TpuConfig

RULES = {
    "sgd": dict(groups=(3, 3), optimizer="sgd", prox=0.0),
    "adam": dict(groups=(6,), optimizer="adam", prox=0.3),
    "exponentiated": dict(groups=(1, 2, 3), optimizer="exponentiated", prox=0.3),
}
CONFIGS = {
    "resident": TpuConfig(),
    "turns": TpuConfig(at_once_bytes=8 * 1024),  # two neighbours at once, five of them
    "streamed": TpuConfig(resident_bytes=1, chunk_bytes=90_000, at_once_bytes=1),  # three chunks of two turns of one
}


def two_tiles(**changes) -> Inputs:
    """The last of 130 inputs are in a second tile; a neighbour is absent and poisoned, an answer is masked."""
    case = dataclasses.replace(CASES["moai"], batch=130, answers=7, steps=3, **changes)
    inputs = sample(case)
    inputs.offset[..., 3] = np.where(inputs.labels == 3, inputs.offset[..., 3], -np.inf)
    inputs.weights[129, 1], inputs.readout[129, 1], inputs.offset[129, 1] = 0, np.nan, np.nan
    return inputs


def run(inputs: Inputs, rule: dict, config: TpuConfig, interpret, dtype="float32"):
    inputs = prepare(arrays(inputs, dtype))
    rule = make_rule(**rule, num_experts=inputs.readout.shape[2])
    return jax.jit(functools.partial(pallas_tpu.forward, rule=rule, config=config, interpret=interpret))(inputs)


@pytest.mark.parametrize(
    ("config", "rule", "dtype"),
    [
        ("resident", "sgd", "bfloat16"),
        ("turns", "adam", "float32"),
        ("turns", "exponentiated", "float32"),
        ("streamed", "adam", "float32"),
        ("streamed", "sgd", "bfloat16"),
    ],
)
def test_the_kernel_equals_the_reference(config, rule, dtype):
    inputs = rounded(two_tiles(), dtype)
    expected = descend(inputs, implementation="reference", **RULES[rule])
    for found, truth in zip(run(inputs, RULES[rule], CONFIGS[config], True, dtype), expected, strict=True):
        assert found.dtype == jnp.float32
        assert_near(found, truth, DESCENT["float32"])


@pytest.mark.parametrize("config", ["turns", "streamed"])
def test_the_kernel_neither_races_nor_reads_what_was_not_written(config):
    """In the simulator of a TPU: memory starts as NaN, copies arrive when they are waited for, tiles in any order."""
    inputs, rule = two_tiles(), RULES["adam"]
    simulator = pltpu.InterpretParams(detect_races=True, random_seed=5, out_of_bounds_reads="raise")
    expected = descend(rounded(inputs, "float32"), implementation="reference", **rule)
    for found, truth in zip(run(inputs, rule, CONFIGS[config], simulator), expected, strict=True):
        assert_near(found, truth, DESCENT["float32"])
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("config", ["resident", "streamed"])
def test_the_kernel_without_steps_gives_the_loss_at_the_start(config):
    inputs = two_tiles()._replace(learning_rates=np.zeros(0))
    expected = descend(inputs, implementation="reference", groups=(3, 3))
    for found, truth in zip(run(inputs, RULES["sgd"], CONFIGS[config], True), expected, strict=True):
        assert_near(found, truth, DESCENT["float32"])


def test_the_kernel_is_taken_where_the_program_is_compiled_for_a_tpu_and_xla_elsewhere():
    inputs = arrays(two_tiles(), "float32")
    with tracing_for_a_tpu():
        traced = jax.jit(router_descent).trace(*inputs)
        halves = jax.jit(router_descent).trace(*inputs._replace(readout=inputs.readout.astype(jnp.bfloat16)))
        named = jax.jit(functools.partial(router_descent, implementation="xla")).trace(*inputs)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "tensor<5x6x16x256xbf16>" in halves.lower(lowering_platforms=("tpu",)).as_text(), "fetched as they are"
    assert "tpu_custom_call" not in named.lower(lowering_platforms=("tpu",)).as_text()


def test_the_kernel_named_on_a_cpu_is_refused_with_a_reason():
    with pytest.raises(NotImplementedError) as caught:
        router_descent(*arrays(two_tiles(), "float32"), implementation="pallas_tpu")
    assert str(caught.value) == (
        "router_descent: implementation='pallas_tpu' cannot run this: programs here are for cpu, not for tpu; "
        "use None, which adapts."
    )


def test_what_does_not_fit_the_kernel_runs_in_xla_and_says_why_once(caplog):
    dispatch._log_once.cache_clear()
    inputs = Inputs(*(jnp.asarray(x, jnp.int32 if x.dtype == np.int32 else jnp.float32) for x in sample(CASES["moai"])))
    wide = inputs._replace(readout=jnp.zeros((5, 5, 6, 2000)), offset=jnp.zeros((5, 5, 2000)))
    with caplog.at_level(logging.INFO), tracing_for_a_tpu():
        for _ in range(2):
            traced = jax.jit(lambda *x: router_descent(*x)).trace(*wide)
            assert "tpu_custom_call" not in traced.lower(lowering_platforms=("tpu",)).as_text()
    (record,) = caplog.records
    assert record.message.endswith(
        "one neighbour of 6 experts and 2000 answers takes 7176192 bytes of a tile, more than 4194304"
    )
    with jax.enable_x64(True):
        assert pallas_tpu.why_not(inputs) == "kernels do not compile while jax_enable_x64 is on"
        double = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), inputs)
        assert pallas_tpu.why_not(double) == "the kernel computes in float32, not in float64"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_plan_holds_all_neighbors_with_little_padding_and_within_the_memory_it_claims(tile, dtype):
    m, e, y = tile
    config, inputs = TpuConfig(), prepare(arrays(sample(dataclasses.replace(CASES["moai"], batch=1)), dtype))
    inputs = inputs._replace(readout=jax.ShapeDtypeStruct((1, m, e, y), dtype))
    plan, one = pallas_tpu._plan(inputs, config), pallas_tpu._neighbor_bytes(inputs)
    assert m <= plan.neighbors < m + plan.chunks * plan.turns
    assert y <= plan.answers < y + 32 // inputs.readout.dtype.itemsize
    logits = plan.at_once * plan.answers * pallas_tpu.LANES * 4
    assert logits <= config.at_once_bytes or plan.at_once == 1
    assert 2 * plan.turns * plan.at_once * one + 8 * logits < config.vmem_bytes
    assert (plan.chunks == 1) == (m * one <= config.resident_bytes)


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("tile", "dtype"), [*((tile, "float32") for tile in TILES), (TILES[0], "bfloat16")], ids=str)
def test_every_tile_compiles_for_every_generation(tile, dtype, chip):
    (m, e, y), b = tile, 300
    shapes = Inputs((b, e), (b, m, e, y), (b, m, y), (b, m), (b, m), (10,))
    kinds = Inputs("float32", dtype, "float32", "int32", "float32", "float32")
    operator = functools.partial(router_descent, groups=(3, e - 3), optimizer="adam", prox=0.1)
    assert "tpu_custom_call" in compile_for(chip, operator, *map(jax.ShapeDtypeStruct, shapes, kinds))
