"""One of several processes that share a folder of checkpoints; started by test_processes.py.

python savers.py PORT PROCESS PROCESSES DEVICES FOLDER
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.checkpoints import Checkpoints
from experiments.cli import UserError

PORT, PROCESS, PROCESSES, DEVICES = (int(word) for word in sys.argv[1:5])
FOLDER = Path(sys.argv[5])

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", DEVICES)
jax.distributed.initialize(f"127.0.0.1:{PORT}", PROCESSES, PROCESS, initialization_timeout=60)
MESH = jax.make_mesh((PROCESSES * DEVICES,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))


def state(step: int) -> dict[str, jax.Array]:
    """A matrix that all devices share and a counter that each of them has."""
    rows = np.arange(4096 * 8, dtype=np.float32).reshape(4096, 8) + step
    split, whole = NamedSharding(MESH, PartitionSpec("fsdp")), NamedSharding(MESH, PartitionSpec())
    return {"matrix": jax.device_put(rows, split), "step": jax.device_put(jnp.int32(step), whole)}


def same(one, other) -> bool:
    """Whether this process's parts are equal bit for bit."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(
        np.array_equal(a.data, b.data)
        for x, y in pairs
        for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True)
    )


def flip(file: Path) -> None:
    """Changes the last bit of a file."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def largest(folder: Path) -> Path:
    """The file with the arrays."""
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: (file.stat().st_size, file))


def main() -> dict:
    """Restores what one process saved, saves, meets damage, saves again, and meets nothing but damage."""
    told, report = [], {}

    def taken() -> list:
        found = checkpoints.newest(state(0), told.append)
        assert found is not None
        return [found[1], same(found[0], state(found[1]))]

    def damage(*steps: int) -> None:
        for step in steps:
            if PROCESS == 0:
                flip(largest(FOLDER / str(step)))

    with jax.set_mesh(MESH), Checkpoints(FOLDER, keep=2) as checkpoints:
        report["first"] = taken()
        for step in (2, 3, 4):
            checkpoints.save(step, state(step), mesh=dict(MESH.shape))
        checkpoints.wait()
        report["steps"] = checkpoints.steps()
        damage(4)
        report["after"] = taken()
        checkpoints.save(4, state(4))
        checkpoints.wait()
        report["again"] = checkpoints.steps()
        damage(3, 4)
        try:
            checkpoints.newest(state(0), told.append)
        except UserError as error:
            report["refused"] = str(error)
        damage(3, 4)  # undone
    return report | {"told": told}


if __name__ == "__main__":
    print(json.dumps(main()))
