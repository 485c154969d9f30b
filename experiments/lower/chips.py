"""TPU generations as targets of compilation; libtpu holds their compiler and needs no device."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}  # smallest topologies
CORES = {"v5e": 1, "v5p": 2, "v6e": 1, "tpu7x": 1}  # that share the programs of a kernel

# read once, when libtpu is loaded
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # no machine in a data centre to ask for what it is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any: the target is named when compiling
    "TPU_LOG_DIR": "disabled",  # each estimate that aborts would leave a gigabyte of logs in the temporary folder
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes, and nothing to share but a compiler
}


def compile_for(chip: str, function: Callable, *arguments: Any) -> jax.stages.Compiled:
    """Compiles a function for one core of a chip that is not here; ENVIRONMENT must be set.

    Args:
      chip: one of CHIPS.
      function: what to jit.
      arguments: trees of jax.ShapeDtypeStruct.
    """
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
    mesh = jax.sharding.Mesh(topology.devices[:1], ("core",), axis_types=(jax.sharding.AxisType.Auto,))
    core = jax.NamedSharding(mesh, jax.P())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=core), arguments)
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*placed).compile()
