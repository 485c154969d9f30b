"""Device meshes: one CPU, several, or accelerators, all under the same axes."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.cli import UserError
from mesanet_jax.sharding import MESH_AXES


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices share the work.

    Attributes:
      data: replicas that each hold all parameters and a share of the batch; 0 takes all devices that are left.
      fsdp: replicas that share parameters and batch.
      tensor: devices that share heads and features.
      cpu_devices: devices to split a CPU host into; 0 leaves it whole.
    """

    data: int = 0
    fsdp: int = 1
    tensor: int = 1
    cpu_devices: int = 0

    def __post_init__(self):
        if self.data < 0 or self.fsdp < 1 or self.tensor < 1 or self.cpu_devices < 0:
            raise ValueError("MeshConfig: fsdp and tensor must be at least 1, data and cpu_devices at least 0.")


def make_mesh(config: MeshConfig) -> jax.sharding.Mesh:
    """Returns the mesh with axes (data, fsdp, tensor) over all devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    if config.cpu_devices:
        _split_cpu(config.cpu_devices)
    num_devices = len(jax.devices())
    shared = config.fsdp * config.tensor
    data = config.data or max(1, num_devices // shared)
    shape = (data, config.fsdp, config.tensor)
    if math.prod(shape) != num_devices:
        sizes = " x ".join(f"{name}={size}" for name, size in zip(MESH_AXES, shape, strict=True))
        raise UserError(f"mesh: {sizes} needs {math.prod(shape)} devices, but there are {num_devices}; change mesh.*.")
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def compiler_options() -> dict[str, str] | None:
    """XLA options for jit on this host: CPUs get the library's matrix products, up to twice as fast; others none."""
    if jax.default_backend() != "cpu":
        return None
    return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}


def matmul_peak(mesh: jax.sharding.Mesh, dtype: str, size: int = 2048) -> float:
    """Returns the FLOP/s of all devices of the mesh together at matrix products, measured now: the best of five."""
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    everywhere = NamedSharding(mesh, PartitionSpec())
    x = jax.device_put(jnp.ones((mesh.size * size, size), dtype), rows)
    y = jax.device_put(jnp.ones((size, size), dtype), everywhere)
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
