"""A mesh decides where things lie and what devices send each other, and nothing else."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from mesanet_jax import MesaNet, MesaNetConfig, SamplingConfig, SolverConfig, generate, sharding, weights
from mesanet_jax.mixers import MIXERS
from mesanet_jax.sharding import MESH_AXES, batch_sharding, parameter_shardings
from tests import tolerances

MODEL = MesaNet(MesaNetConfig(vocab_size=31, num_layers=1, model_dim=16, num_heads=2, key_dim=4, value_dim=4))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (4, 6)))
TABLE = jnp.asarray(np.random.default_rng(1).normal(size=(31, 16)), jnp.float32)
SUMMED = re.compile(r" = (.*) (?:all-reduce|reduce-scatter)(?:-start)?\(")


def mesh_of(axis: str, kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    """Two devices along one axis."""
    return jax.make_mesh([1 + (name == axis) for name in MESH_AXES], MESH_AXES, axis_types=(kind,) * len(MESH_AXES))


def tied(table, tokens):
    """A read-out of the embedding that a token itself has."""
    table = weights.spread(table, tokens.shape)
    return jnp.sum(jnp.tanh(weights.read_out(jnp.sin(weights.look_up(table, tokens)), table)))


@pytest.fixture(params=["cpu", "tpu"])
def platform(request, monkeypatch):
    """Programs are traced as for a TPU, and run here all the same."""
    monkeypatch.setattr(weights.dispatch, "platform", lambda: request.param)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("axis", MESH_AXES)
def test_a_table_has_the_same_gradient_however_it_is_spread(axis):
    expected = jax.grad(tied)(TABLE, TOKENS)
    with jax.set_mesh(mesh_of(axis)):
        found = jax.jit(jax.grad(tied))(TABLE, TOKENS)
    tolerances.assert_near(found, expected, tolerances.LAW["float32"])


KERNELS = {  # a parameter's logical axes and shape
    "from the stream to heads": (("embed", "heads", "head"), (16, 2, 6)),
    "to the stream from heads": (("heads", "head", "embed"), (2, 6, 16)),
    "from the stream to features": (("embed", "mlp"), (16, 10)),
    "to the stream from features": (("mlp", "embed"), (10, 16)),
    "to features that no axis divides": (("embed", "mlp"), (16, 7)),
}


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("axis", MESH_AXES)
@pytest.mark.parametrize(("axes", "shape"), KERNELS.values(), ids=KERNELS)
def test_a_product_with_a_parameter_is_the_same_in_value_and_gradient_wherever_the_parameter_lies(axes, shape, axis):
    kernel = jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)
    inner = shape[:-1] if axes[-1] == "embed" else shape[:1]
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 6, *inner)), jnp.float32)

    def squared(x, kernel):
        return jnp.sum(weights.product(x, kernel, *axes) ** 2)

    expected = jax.value_and_grad(squared, (0, 1))(x, kernel)
    box = nn.LogicallyPartitioned(kernel, axes)
    with jax.set_mesh(mesh := mesh_of(axis)):
        laid = jax.device_put(x, batch_sharding(mesh)), jax.device_put(kernel, parameter_shardings(box, mesh))
        found = jax.jit(jax.value_and_grad(squared, (0, 1)))(*laid)
    jax.tree.map(lambda a, b: tolerances.assert_near(a, b, tolerances.LAW["float32"]), found, expected)


@pytest.mark.parametrize("axis", MESH_AXES)
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8, jnp.uint8])
def test_rows_are_looked_up_as_without_a_mesh_those_that_are_not_there_too(axis, dtype):
    tokens = jnp.asarray([[0, 15, 16, 30, 31, 40], [-1, -31, -32, 29, 1, 127]], jnp.int32).astype(dtype)
    with jax.set_mesh(mesh_of(axis)):
        found = jax.jit(lambda table: weights.look_up(weights.spread(table, tokens.shape), tokens))(TABLE)
    np.testing.assert_array_equal(found, jnp.take(TABLE, tokens, axis=0))


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("axis", ["data", "fsdp", "sequence"])
def test_what_two_uses_of_a_table_find_for_its_gradient_is_summed_over_devices_once(axis):
    mesh = mesh_of(axis)
    table = jax.ShapeDtypeStruct(TABLE.shape, TABLE.dtype, sharding=jax.NamedSharding(mesh, jax.P(None, "fsdp")))
    tokens = jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(tied)).lower(table, tokens).compile().as_text()
    results = "".join(match[1] for match in SUMMED.finditer(program or ""))
    assert len(re.findall(r"\[(?:31,8|8,31|31,16)\]", results)) == 1


def a_convolution():
    x = jnp.ones((2, 8, 2, 4))
    return sharding.short_convolution(x, jnp.ones((4, 2, 4)), x[:, :3], None)


def a_layer(segment_ids=None):
    q, gate = jnp.ones((2, 8, 2, 4)), jnp.ones((2, 8, 2))
    choices = {"segment_ids": segment_ids, "solver": SolverConfig(), "with_report": False}
    return sharding.mesa(q, q, q, -gate, gate, jnp.ones((2, 4)), None, **choices)


USES = {
    "a model": lambda mesh: MODEL.init(jax.random.key(0), TOKENS),
    "an array": lambda mesh: sharding.lay_out(TABLE, "batch", None),
    "a convolution": lambda mesh: a_convolution(),
    "a layer": lambda mesh: a_layer(),
    "parameters": lambda mesh: parameter_shardings({}, mesh),
    "a batch": lambda mesh: batch_sharding(mesh),
}


@pytest.mark.parametrize("use", USES)
def test_explicit_axes_are_refused_in_one_sentence_with_the_remedy(use):
    mesh = mesh_of("fsdp", AxisType.Explicit)
    sentence = r"^mesh: axes \('data', 'fsdp', 'sequence', 'tensor'\) are explicit, .*; pass it "
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=sentence + r"axis_types=\(AxisType.Auto,\) \* 4\."):
        USES[use](mesh)


@pytest.mark.parametrize("axis", MESH_AXES)
def test_ids_of_floats_are_refused_in_one_sentence_whatever_the_mesh_splits(axis):
    with jax.set_mesh(mesh_of(axis)), pytest.raises(TypeError, match=r"^mesa: segment_ids have dtype float32; pass "):
        a_layer(jnp.zeros((2, 8)))


@pytest.mark.parametrize("axis", MESH_AXES)
def test_tokens_of_floats_are_refused_in_one_sentence_whatever_the_mesh_splits(axis):
    with jax.set_mesh(mesh_of(axis)), pytest.raises(TypeError, match=r"^MesaNet: tokens have dtype float32; pass "):
        MODEL.init(jax.random.key(0), jnp.zeros((2, 8)))


@pytest.mark.parametrize("mixer", [name for name in MIXERS if name != "mesa"])  # see test_sequence_parallel.py
@pytest.mark.parametrize("axis", ["sequence", "tensor"])
def test_a_mixer_over_two_devices_equals_the_mixer_on_one_in_value_and_gradient(mixer, axis):
    boxed, arrays, pulled = mixer_to_pull(mixer)
    mesh = mesh_of(axis)
    expected = pulled(nn.unbox(boxed), *arrays)
    with jax.set_mesh(mesh):
        params = jax.device_put(nn.unbox(boxed), parameter_shardings(boxed, mesh))
        found = pulled(params, *arrays)
    jax.tree.map(lambda a, b: tolerances.assert_near(a, b, tolerances.MODEL["gradient"]), found, expected)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_mixer_in_a_map_over_shards_of_the_batch_equals_the_mixer_on_one_device(mixer):
    """A map that checks what varies from device to device, and sums the gradients of what does not."""
    boxed, arrays, pulled = mixer_to_pull(mixer)
    mesh = mesh_of("data")
    specs = jax.P("data"), (jax.P(), jax.P("data"))
    split = jax.shard_map(pulled, mesh=mesh, in_specs=(jax.P(), *[jax.P("data")] * 3), out_specs=specs)
    found, expected = (function(nn.unbox(boxed), *arrays) for function in (jax.jit(split), pulled))
    jax.tree.map(lambda a, b: tolerances.assert_near(a, b, tolerances.MODEL["gradient"]), found, expected)


def test_text_is_generated_in_a_map_over_shards_of_the_batch():
    params = nn.unbox(MODEL.init(jax.random.key(0), TOKENS))

    def continued(params, prompt):
        greedy = SamplingConfig(temperature=0.0)
        return generate(MODEL, params, prompt, num_tokens=3, key=jax.random.key(0), sampling=greedy, stop_token=1)

    rows = jax.P("data")
    split = jax.shard_map(continued, mesh=mesh_of("data"), in_specs=(jax.P(), rows), out_specs=rows)
    np.testing.assert_array_equal(jax.jit(split)(params, TOKENS), continued(params, TOKENS))


def mixer_to_pull(mixer: str):
    """Returns boxed parameters, arrays, and what pulls a cotangent back to the parameters and the first array."""
    shape = dict(model_dim=8, num_heads=2, key_dim=4, value_dim=4, recurrent_dim=6, window=5, max_context=20)
    layer = MIXERS[mixer](MesaNetConfig(**shape, solver=SolverConfig(max_steps=8, tolerance=0.0)))
    x, dy = (jax.random.normal(jax.random.key(seed), (2, 20, 8)) for seed in range(2))
    ids = jnp.repeat(jnp.array([[0, 1, 1], [0, 0, -1]]), jnp.array([7, 9, 4]), axis=1)

    @jax.jit
    def pulled(params, x, dy, ids):
        y, pullback = jax.vjp(lambda params, x: layer.apply(params, x, None, ids)[0], params, x)
        return y, pullback(dy)

    return layer.init(jax.random.key(2), x, None, ids), (x, dy, ids), pulled
