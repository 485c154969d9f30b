"""Whether the arrays that were saved are the arrays that are asked for, before any of them is read."""

from collections.abc import Sequence

import jax
import numpy as np

from experiments.checkpoints.manifest import Array

REMEDY = "give the model and optimizer it was saved from"


def described(tree) -> list[Array]:
    """Returns path, shape and dtype of all arrays, or shapes of arrays, in a pytree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [Array(_name(path), tuple(np.shape(leaf)), _dtype(leaf)) for path, leaf in leaves]


def difference(saved: Sequence[Array], asked: Sequence[Array], cast: bool) -> str | None:
    """Returns the first difference, with its remedy, or None; with `cast` dtypes may differ."""
    here, there = {x.path: x for x in saved}, {x.path: x for x in asked}
    for path, array in there.items():
        if path not in here:
            return f"has no {path} {_form(array)}, which is asked for; {REMEDY}"
        if here[path].shape != array.shape:
            return (
                f"holds {path} in the shape {here[path].shape}, and {array.shape} is asked for; "
                f"give the sizes it was saved with"
            )
        if here[path].dtype != array.dtype and not cast:
            return (
                f"holds {path} in {here[path].dtype}, and {array.dtype} is asked for; give the dtype it was saved in, "
                f"or pass cast=True to convert"
            )
    extra = next((path for path in here if path not in there), None)
    if extra is not None:
        return f"holds {extra} {_form(here[extra])}, which is not asked for; {REMEDY}"
    return None


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _dtype(leaf) -> str:
    return str(leaf.dtype) if hasattr(leaf, "dtype") else np.asarray(leaf).dtype.name


def _form(array: Array) -> str:
    return f"{array.dtype}{list(array.shape)}"
