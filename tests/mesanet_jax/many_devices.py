"""Run by test_sequence_parallel.py on sixteen devices: a training step under meshes of several axes, against no mesh.

Prints, for each of MESHES of eight devices, the relative differences of the metrics and the largest one of any moment,
and whether rows of a table are looked up as without a mesh, those that are not there too; for each of PRODUCTS the
relative difference of the gradient of a product with a parameter that is computed as for TPUs.
"""

import functools
import json
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from mesanet_jax import MesaNet, MesaNetConfig, SolverConfig, weights
from mesanet_jax.loss import Batch
from mesanet_jax.sharding import MESH_AXES, batch_sharding
from mesanet_jax.train import OptimizerConfig, init_train_state, make_optimizer, train_state_shardings, train_step

MESHES = {
    "sequence": {"sequence": 8},
    "data, fsdp, sequence": {"data": 2, "fsdp": 2, "sequence": 2},
    "data, sequence, tensor": {"data": 2, "sequence": 2, "tensor": 2},
    "fsdp, sequence, tensor": {"fsdp": 2, "sequence": 2, "tensor": 2},
}
PRODUCTS = {  # and the sizes of its parameter
    "in one hop": ({"fsdp": 8}, (32, 10)),
    "in two hops": ({"fsdp": 16}, (32, 10)),
    "along all axes": ({"data": 2, "fsdp": 2, "sequence": 2, "tensor": 2}, (32, 10)),
    "of features that are not split": ({"fsdp": 4, "sequence": 2, "tensor": 2}, (32, 9)),
}
COMPARED = ("loss", "grad_norm", "num_targets")


def _difference(x, y) -> float:
    """Of the largest entry."""
    return float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y)))


def _mesh(sizes: dict[str, int]) -> jax.sharding.Mesh:
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def _product(sizes: dict[str, int], shape: tuple[int, int]) -> float:
    x, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(16, 16, shape[0]), shape]))

    @functools.partial(jax.grad, argnums=1)
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def gradient(x, kernel):
        return jnp.sum(weights.product(x, kernel, "embed", "mlp") ** 2)

    expected = gradient(x, kernel)
    tpu = mock.patch.object(weights.dispatch, "platform", return_value="tpu")
    with tpu, jax.set_mesh(mesh := _mesh(sizes)):
        return _difference(jax.jit(gradient)(jax.device_put(x, batch_sharding(mesh)), kernel), expected)


def main() -> None:
    """Computes and prints."""
    solver = SolverConfig(max_steps=16, tolerance=0.0)
    shape = dict(vocab_size=31, num_layers=3, model_dim=32, num_heads=2, key_dim=16, value_dim=16)
    model = MesaNet(
        MesaNetConfig(**shape, pattern=("mesa", "gated_deltanet", "sliding_window"), window=7, solver=solver)
    )
    optimizer = make_optimizer(OptimizerConfig(peak_lr=1e-2, warmup_steps=2), 50)
    step = functools.partial(train_step, model=model, optimizer=optimizer)
    state = init_train_state(jax.random.key(0), model, optimizer)
    ids = np.zeros((1, 8, 41), np.int32)
    ids[:, 1, 9:], ids[:, 1, 20:], ids[:, 2, 33:] = 1, 2, -1
    batch = Batch(jax.random.randint(jax.random.key(1), ids.shape, 0, 31), jnp.asarray(ids))
    expected, metrics = jax.jit(step)(state, batch)
    table = jax.random.normal(jax.random.key(2), (31, 16))  # along `tensor` one part has fewer rows
    tokens = jnp.arange(-32, 32).reshape(4, 16)  # the first is before all rows, the last behind them
    results = {}
    for name, sizes in MESHES.items():
        mesh = _mesh(sizes)
        with jax.set_mesh(mesh):
            shardings = train_state_shardings(model, optimizer, mesh)
            arguments = jax.device_put(state, shardings), jax.device_put(batch, batch_sharding(mesh, 1))
            found, found_metrics = jax.jit(step, out_shardings=(shardings, None))(*arguments)
            rows = jax.jit(lambda table: weights.look_up(weights.spread(table, tokens.shape), tokens))(table)
        moments = zip(*(jax.tree.leaves(x.opt_state) for x in (found, expected)), strict=True)
        axes = {a for x in jax.tree.leaves(found.params) for a in x.sharding.spec if a and mesh.shape[a] > 1}
        results[name] = {
            "spread": sorted(axes),
            "rows": np.array_equal(rows, jnp.take(table, tokens, axis=0), equal_nan=True),
            "moments": max(_difference(x, y) for x, y in moments),
            **{x: _difference(getattr(found_metrics, x), getattr(metrics, x)) for x in COMPARED},
        }
    print(json.dumps(results | {name: _product(*case) for name, case in PRODUCTS.items()}))


if __name__ == "__main__":
    main()
