"""States to be saved, and what their files look like."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

ARRAYS = "ocdbt.process_0/d"  # where orbax writes them


def make_state(step: int) -> dict:
    """Parameters in two precisions, a NaN among them, their optimizer, and a count."""
    weight = np.arange(4096, dtype=np.float32).reshape(64, 64) * step
    weight[3, 4] = np.nan
    params = {"layer": {"weight": jnp.asarray(weight), "bias": jnp.full(3, step / 3, jnp.bfloat16)}, "none": {}}
    return {"params": params, "opt_state": optax.adamw(1e-3).init(params), "step": jnp.int32(step)}


def bits(state) -> list[tuple]:
    """Paths, dtypes, shapes and bytes, so that even NaNs compare."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return [(str(path), x.dtype, x.shape, np.asarray(x).tobytes()) for path, x in leaves]


def arrays_file(folder: Path, step: int) -> Path:
    return max((folder / str(step) / ARRAYS).iterdir(), key=lambda file: file.stat().st_size)


def spoil(folder: Path, step: int) -> None:
    file = arrays_file(folder, step)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, object]:
    """Everything about a folder that could have been touched."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }
