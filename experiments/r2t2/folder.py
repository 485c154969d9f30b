"""What lies in the folder of an R2-T2 run: its settings, frozen models, and what later commands put beside them."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np
import safetensors.numpy

from experiments import cli
from experiments.cli import UserError
from r2t2_jax.fingerprint import fingerprint
from r2t2_jax.models import FrozenModel
from r2t2_jax.models.scenes import ScenesConfig, frozen


class Trained(NamedTuple):
    """A frozen model with its parameters and their fingerprint."""

    config: ScenesConfig
    model: FrozenModel
    params: dict
    fingerprint: str
    settings: dict[str, Any]  # of the training


def create(folder: Path, settings: dict[str, Any]) -> None:
    """Makes the folder of a new run.

    Raises:
      UserError: there is something in it already, or it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output: {folder} is not an empty folder; give a new one, nothing is written over.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "train.json", json.dumps(settings, indent=1).encode())
    except OSError as error:
        raise cli.unwritable("output", folder, error, "folder") from None


def write(path: Path, content: bytes) -> None:
    """Writes a file as a whole or not at all."""
    copy = path.with_name(path.name + ".unfinished")
    with copy.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(copy, path)


def save_model(folder: Path, config: ScenesConfig, params: dict) -> None:
    """Saves parameters as safetensors with the config in the header."""
    flat = {name: np.asarray(x) for name, x in flax.traverse_util.flatten_dict(params, sep="/").items()}
    header = {"config": json.dumps(dataclasses.asdict(config))}
    write(folder / f"{config.readout}.safetensors", safetensors.numpy.save(flat, header))


def open_model(folder: Path, readout: str = "affine") -> Trained:
    """Loads a frozen model.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = folder / f"{readout}.safetensors"
    if not path.exists():
        remedy = f"python -m experiments.r2t2.train --readouts {readout} --output NEW_FOLDER"
        raise UserError(f"run: {path} does not exist; train it: {remedy}")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            config = ScenesConfig(**json.loads(file.metadata()["config"]))
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        settings = json.loads((folder / "train.json").read_text())
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"run: {path} cannot be read ({error}); train again into a new folder.") from None
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    return Trained(config, frozen(config), params, fingerprint(params), settings)
