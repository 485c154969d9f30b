"""What sweeps over mixers share: names of hybrids, the devices, and one fit of one model."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cli import UserError
from experiments.mesh import MeshConfig, make_mesh
from experiments.synthetic.autoencoder import AutoEncoder
from experiments.synthetic.examples import Examples
from experiments.synthetic.fit import Choice, FitConfig, Fitted, fit
from mesanet_jax import MesaNet, MesaNetConfig
from mesanet_jax.mixers import MIXERS

# as in the tables of arXiv 2506.05233
ALL_MIXERS = ("mesa", "hawk+mesa", "gated_deltanet", "deltanet", "gla", "mlstm", "mamba2", "hawk", "attention")


def check_mixers(config_name: str, mixers: Sequence[str], depths: Sequence[int]) -> None:
    """Raises ValueError, which names it, for a mixer that is unknown or a hybrid that fills none of the depths."""
    for name in mixers:
        unknown = [part for part in name.split("+") if part not in MIXERS]
        if unknown:
            raise ValueError(
                f"{config_name}: mixers: {unknown[0]!r} is unknown; use {', '.join(MIXERS)}, or several joined by +."
            )
        if not any(fills(name, depth) for depth in depths):
            raise ValueError(
                f"{config_name}: mixers: {name} does not fill {' or '.join(map(str, depths))} layers evenly; take a "
                f"multiple of {len(name.split('+'))}."
            )


def fills(mixer: str, depth: int) -> bool:
    """True if repeating the layers of a hybrid comes to so many."""
    return depth % len(mixer.split("+")) == 0


def mesh_for(config: MeshConfig, batch_size: int) -> jax.sharding.Mesh:
    """Returns the mesh, over which batches can be shared.

    Raises:
      UserError: they cannot, or there are other devices.
    """
    mesh = make_mesh(config)
    rows = math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))
    if batch_size % rows:
        raise UserError(f"fit.batch_size: {batch_size} cannot be shared evenly by {rows} devices; take a multiple.")
    return mesh


def shaped(shape: MesaNetConfig, mixer: str, vocab_size: int, length: int, **sizes: int) -> MesaNetConfig:
    """Returns the config of a mixer's model for sequences of so many ids and tokens.

    Raises:
      UserError: a field is given that mixer and task say, or the sizes do not fit each other.
    """
    said = {"pattern": tuple(mixer.split("+")), "vocab_size": vocab_size, "max_context": length, **sizes}
    for field in said:
        if getattr(shape, field) != MesaNetConfig.__dataclass_fields__[field].default:
            raise UserError(f"model.{field}: mixers, task and the sizes to try say it; leave the option out.")
    try:
        return dataclasses.replace(shape, **said)
    except ValueError as error:
        raise UserError(f"model: of {mixer}, {error}") from None


def check_fit(config: FitConfig, choice: Choice, num_train: int) -> None:
    """Tries what a fit needs before anything is computed.

    Raises:
      UserError: a number is out of its range, or there is less than a batch to train on.
    """
    if num_train < config.batch_size:
        raise UserError(f"num_train: {num_train} is less than fit.batch_size={config.batch_size}; take more.")
    try:
        config.optimizer(choice, num_steps=1)
    except ValueError as error:
        raise UserError(f"fit: {error}") from None


def make_model(shape: MesaNetConfig, *, compresses: bool = False) -> tuple:
    """Returns a model and its function from parameters and tokens to logits.

    One that compresses says the tokens themselves from its last output.
    """
    model = (AutoEncoder if compresses else MesaNet)(shape)

    def apply(params, inputs):
        found = model.apply(params, inputs)
        return found if compresses else found[0]  # without the state

    return model, apply


def fit_model(
    shape: MesaNetConfig,
    train: Examples,
    test: Examples,
    accuracy: Callable[[np.ndarray], float],
    config: FitConfig,
    choice: Choice,
    mesh: jax.sharding.Mesh,
    *,
    compresses: bool = False,
) -> Fitted:
    """Trains and tests a model, see `make_model` and `fit`."""
    model, apply = make_model(shape, compresses=compresses)
    example = jnp.zeros((1, train.inputs.shape[1]), jnp.int32)
    return fit(apply, lambda key: model.init(key, example), train, test, accuracy, config, choice, mesh)
