"""Device meshes: one CPU, several, or accelerators, all under the same axes."""

import dataclasses
import math
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.cli import UserError
from mesanet_jax.sharding import MESH_AXES


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices share the work.

    Attributes:
      data: replicas that each hold all parameters and a share of the batch; 0 takes all devices that are left.
      fsdp: replicas that share parameters and batch.
      sequence: devices that each hold a stretch of every sequence.
      tensor: devices that share heads and features.
      cpu_devices: devices to split a CPU host into; 0 leaves it whole.
    """

    data: int = 0
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1
    cpu_devices: int = 0

    def __post_init__(self):
        least = {"data": 0, "fsdp": 1, "sequence": 1, "tensor": 1, "cpu_devices": 0}
        for field, low in least.items():
            if getattr(self, field) < low:
                raise ValueError(f"MeshConfig: {field}={getattr(self, field)} must be at least {low}.")


def make_mesh(config: MeshConfig, devices: Sequence | None = None) -> jax.sharding.Mesh:
    """Returns the mesh with axes MESH_AXES over these devices, by default all there are.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    if config.cpu_devices:
        _split_cpu(config.cpu_devices)
    num_devices = len(devices or jax.devices())
    shared = config.fsdp * config.sequence * config.tensor
    data = config.data or max(1, num_devices // shared)
    shape = (data, config.fsdp, config.sequence, config.tensor)
    if math.prod(shape) != num_devices:
        sizes = " x ".join(f"{name}={size}" for name, size in zip(MESH_AXES, shape, strict=True))
        raise UserError(f"mesh: {sizes} needs {math.prod(shape)} devices, but there are {num_devices}; change mesh.*.")
    auto = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=auto, devices=devices)
    except NotImplementedError:  # sizes that are no products of the torus's: rings then have to share its links
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(placed, MESH_AXES, axis_types=auto)


# On TPUs a product with a parameter that has to be gathered is not cut into windows handed around a ring: those hand on
# n + 1 where n - 1 would do, and cannot share what they bring with the other products of the same parameter. A gather
# runs beside the computing before it anyway. Nor does a gather become a sum of what is mostly zeros, which sends twice
# as much: left alone the compiler does that where all devices of a slice hold few rows each.
COMPILER_OPTIONS = {
    "tpu": {
        "xla_tpu_enable_windowed_einsum_for_all_gather": "false",
        "xla_tpu_prefer_async_allgather_to_allreduce": "true",
    }
}


def compiler_options(platform: str | None = None) -> dict[str, str] | None:
    """Returns the XLA options for jit, on this host or a platform."""
    return COMPILER_OPTIONS.get(platform or jax.default_backend())


def keep_compiled(folder: str) -> None:
    """Keeps compiled programs in a folder, so that the next start need not compile them; an empty name does nothing."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)


def matmul_peak(mesh: jax.sharding.Mesh, dtype: str) -> float:
    """Returns the FLOP/s of all devices of the mesh together at matrix products, measured now: the best of five."""
    size = 1024 if mesh.devices.flat[0].platform == "cpu" else 8192  # small takes longer to hand over than to compute
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    everywhere = NamedSharding(mesh, PartitionSpec())
    # made where they lie: together they are more than one host holds
    x, y = jax.jit(
        lambda: (jnp.ones((mesh.size * size, size), dtype), jnp.ones((size, size), dtype)),
        out_shardings=(rows, everywhere),
    )()
    product = jax.jit(jnp.dot, compiler_options=compiler_options())
    product(x, y).block_until_ready()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        product(x, y).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2 * mesh.size * size**3 / min(seconds)


def _split_cpu(num_devices: int) -> None:
    """Only before JAX has touched a device; afterwards it has to be the number it already uses."""
    try:
        jax.config.update("jax_num_cpu_devices", num_devices)
    except RuntimeError:
        if len(jax.devices("cpu")) != num_devices:
            raise UserError(
                f"mesh.cpu_devices: {num_devices} cannot be had, this process already uses {len(jax.devices('cpu'))}."
            ) from None
