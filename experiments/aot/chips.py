"""TPUs that are not here: their devices, and what one of them can do."""

import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from experiments.cli import UserError
from experiments.lower.chips import ENVIRONMENT

# Bytes per second that a device sends in a ring along an axis of a torus that wraps around, both ways: a chip's
# bidirectional bandwidth in Google's tables over its ports (4 on v5e and v6e, 6 on v5p and tpu7x): two ports send one
# way; half of it for tpu7x, whose chips are two devices.
RING = {"v5e": 100e9, "v5p": 200e9, "v6e": 200e9, "tpu7x": 100e9}


class Chip(NamedTuple):
    """What one device of a mesh has; a chip of tpu7x is two devices."""

    memory_bytes: int
    memory_bandwidth: float  # bytes per second
    flops: float  # per second, in bfloat16
    ring_bytes: float  # per second


def devices_of(topology: str) -> list:
    """Returns the devices of a slice of TPUs such as v5p:4x4x4, which need not be here.

    Raises:
      UserError: there is no such slice, or no libtpu.
    """
    name = topology.split(":")[0]
    if name not in RING or not re.fullmatch(r"\w+:\d+(x\d+)+", topology):
        raise UserError(
            f"topology: {topology!r} is no slice of TPUs; give one of {tuple(RING)} and its shape: v5p:4x4x4."
        )
    os.environ.update(ENVIRONMENT)  # before libtpu is loaded
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # whatever libtpu raises
        reason = str(error).splitlines()[0]
        raise UserError(
            f"topology: {topology} cannot be had ({reason}); install the extra `tpu`, or change it."
        ) from None


def chip_of(topology: str, mesh: jax.sharding.Mesh) -> Chip:
    """Returns what a device of a mesh over such a slice has."""
    with jax.set_mesh(mesh):
        core = pltpu.get_tpu_info()
    return Chip(
        memory_bytes=core.num_cores * core.hbm_capacity_bytes,
        memory_bandwidth=core.num_cores * core.mem_bw_bytes_per_second,
        flops=core.num_cores * core.bf16_ops_per_second,
        ring_bytes=RING[topology.split(":")[0]],
    )
