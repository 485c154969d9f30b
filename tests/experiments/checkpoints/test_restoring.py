"""What is restored has the tree, shapes and dtypes that were asked for, on any devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from experiments.checkpoints import Checkpoints, saver
from experiments.cli import UserError
from tests.experiments.checkpoints.states import make_state


def with_weight(weight) -> dict:
    state = make_state(0)
    state["params"]["layer"]["weight"] = weight
    return state


@pytest.mark.parametrize(
    ("like", "sentence"),
    [
        (
            with_weight(jnp.zeros((64, 65))),
            r"30 holds params/layer/weight in the shape \(64, 64\), and \(64, 65\) is asked for; give the sizes",
        ),
        (
            with_weight(jnp.zeros((64, 64), jnp.bfloat16)),
            r"30 holds params/layer/weight in float32, and bfloat16 is asked for; .* or pass cast=True",
        ),
        (
            make_state(0) | {"more": jnp.zeros(2)},
            r"30 has no more float32\[2\], which is asked for; give the model and optimizer",
        ),
        (
            {key: value for key, value in make_state(0).items() if key != "step"},
            r"30 holds step int32\[\], which is not asked for; give the model and optimizer",
        ),
        (
            make_state(0) | {"opt_state": optax.sgd(1e-3).init({})},
            r"30 holds opt_state/0/count int32\[\], which is not asked for",
        ),
    ],
    ids=["shape", "dtype", "missing", "extra", "optimizer"],
)
def test_another_tree_is_refused_before_anything_is_read(like, sentence, saved, monkeypatch):
    monkeypatch.setattr(saver, "read", lambda *_: pytest.fail("read"))
    checkpoints = Checkpoints.open(saved)
    for call in (lambda: checkpoints.restore(30, like), lambda: checkpoints.newest(like, pytest.fail)):
        with pytest.raises(UserError, match=sentence):
            call()


def test_a_dtype_is_converted_when_that_is_asked_for(saved):
    like = with_weight(jnp.zeros((64, 64), jnp.bfloat16))
    weight = Checkpoints.open(saved).restore(30, like, cast=True)["params"]["layer"]["weight"]
    expected = make_state(30)["params"]["layer"]["weight"].astype(jnp.bfloat16)
    assert weight.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(weight, np.float32), np.asarray(expected, np.float32))


def test_arrays_are_restored_onto_another_mesh(tmp_path):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    alone = SingleDeviceSharding(jax.devices()[1])
    rows = np.arange(32.0, dtype=np.float32).reshape(8, 4)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step, sharding in enumerate((split, whole, alone)):
            checkpoints.save(step, {"rows": jax.device_put(rows, sharding)})
        for step in range(3):
            for sharding in (split, whole, alone):
                like = {"rows": jax.ShapeDtypeStruct((8, 4), np.float32, sharding=sharding)}
                restored = checkpoints.restore(step, like)["rows"]
                assert restored.sharding == sharding
                np.testing.assert_array_equal(restored, rows)
