"""The functions of a run as they are compiled for a mesh: for the devices here, or for those of a pod elsewhere."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from experiments.cli import UserError
from experiments.mesh import compiler_options
from experiments.runs import RunConfig
from mesanet_jax import MesaNet
from mesanet_jax.loss import Batch, targets_and_weights, total_loss
from mesanet_jax.sharding import batch_sharding
from mesanet_jax.train import TrainState, init_train_state, make_optimizer, train_state_shardings, train_step


class Programs(NamedTuple):
    """Jitted functions and where their arguments lie; made before, called and compiled under `jax.set_mesh`."""

    init: Callable[[jax.Array], TrainState]  # from a key
    train: Callable  # (state, batch [a, b, t + 1]) -> (state, Metrics)
    loss: Callable  # (params, batch [1, b, t + 1]) -> (summed loss, number of targets)
    prefill: Callable  # (params, tokens [b, t]) -> (logits of the last token [b, y], state)
    decode: Callable  # (params, tokens [b, 1], state) -> the same
    batch: NamedSharding  # of batches [a, b, t + 1]
    shardings: TrainState

    @classmethod
    def make(cls, config: RunConfig, mesh: jax.sharding.Mesh) -> "Programs":
        """Jits every function with its shardings; XLA compiles at the first call."""
        model = MesaNet(config.model)
        optimizer = make_optimizer(config.optimizer, config.num_steps)
        shardings = train_state_shardings(model, optimizer, mesh)
        jit = functools.partial(jax.jit, compiler_options=compiler_options(mesh.devices.flat[0].platform))
        return cls(
            init=jit(functools.partial(init_train_state, model=model, optimizer=optimizer), out_shardings=shardings),
            train=jit(
                functools.partial(train_step, model=model, optimizer=optimizer),
                donate_argnums=0,
                out_shardings=(shardings, None),
            ),
            loss=jit(functools.partial(_batch_loss, model)),
            prefill=jit(functools.partial(_continue, model)),
            decode=jit(functools.partial(_continue, model), donate_argnums=2),
            batch=batch_sharding(mesh, leading_axes=1),
            shardings=shardings,
        )

    def state_shapes(self) -> TrainState:
        """Returns shapes, types and shardings of the state; computes nothing, so the devices may be elsewhere."""
        shapes = jax.eval_shape(self.init, jax.eval_shape(lambda: jax.random.key(0)))
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings)

    def batch_shapes(self, config: RunConfig, parts: int | None = None) -> Batch:
        """Returns shapes, types and sharding of a batch in so many parts, by default its micro-batches."""
        parts = parts or config.micro_batches
        shape = (parts, config.data.batch_size // parts, config.data.length + 1)
        array = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.batch)
        return Batch(array, array)

    def rows_here(self, config: RunConfig) -> list[int]:
        """Returns which rows of a batch the devices of this host hold."""
        parts, rows, _ = shape = self.batch_shapes(config).tokens.shape
        indices = self.batch.addressable_devices_indices_map(shape).values()
        held = {range(*index[1].indices(rows)) for index in indices if index is not None}
        return sorted(part * rows + row for part in range(parts) for some in held for row in some)

    def place(self, batch: Batch) -> Batch:
        """Puts a batch [a, b, t + 1] of this host onto the devices: of all its rows only those that belong here."""
        return Batch(*(jax.make_array_from_callback(x.shape, self.batch, x.__getitem__) for x in batch))


def split(batch: Batch, parts: int) -> Batch:
    """[b, t + 1] -> [parts, b / parts, t + 1]."""
    return jax.tree.map(lambda x: x.reshape(parts, -1, x.shape[-1]), batch)


def check_fits(config: RunConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError if devices cannot share batch, sequences or heads evenly."""
    rows, shards = config.data.batch_size // config.micro_batches, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % shards:
        raise UserError(
            f"data.batch_size: {config.data.batch_size} in micro_batches={config.micro_batches} gives {rows} sequences "
            f"at a time, which {shards} devices (mesh data x fsdp) cannot share evenly; make it a multiple."
        )
    if config.data.length % mesh.shape["sequence"]:
        raise UserError(
            f"data.length: {config.data.length} tokens cannot be shared evenly by mesh.sequence="
            f"{mesh.shape['sequence']} devices; make it a multiple."
        )
    if config.model.num_heads % mesh.shape["tensor"]:
        raise UserError(
            f"mesh.tensor: {config.model.num_heads} heads cannot be shared evenly by {mesh.shape['tensor']} devices; "
            f"take a divisor."
        )


def _batch_loss(model: MesaNet, params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    batch = jax.tree.map(lambda x: x[0], batch)
    targets, weights = targets_and_weights(batch)
    logits, _ = model.apply(params, batch.tokens[:, :-1], None, batch.segment_ids[:, :-1])
    return total_loss(logits, targets, weights), weights.sum()


def _continue(model: MesaNet, params, tokens: jax.Array, state=None):
    logits, state = model.apply(params, tokens, state)
    return logits[:, -1], state
