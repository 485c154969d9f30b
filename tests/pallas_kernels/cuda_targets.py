"""Compiles for GPUs that are not here: the compiler comes with XLA's plugin for CUDA, a text stands for the device.

Installed by: pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm, in the versions of
constraints.txt. No device and no driver is asked for.
"""

import importlib.util
from pathlib import Path

import jax
import pytest
from ahead_of_time import GPUS, tracing_for_a_gpu
from jax.experimental import topologies

KIBIBYTE, GIGABYTE = 1 << 10, 10**9
COMMON = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "shared_memory_per_block": 48 * KIBIBYTE,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "registers_per_core_limit": 1 << 16,
    "registers_per_block_limit": 1 << 16,
}
DEVICES = {  # by compute capability, from the white papers of A100 and H100
    "8.0": {
        "core_count": 108,
        "fpus_per_core": 64,
        "shared_memory_per_core": 164 * KIBIBYTE,
        "shared_memory_per_block_optin": 163 * KIBIBYTE,
        "clock_rate_ghz": 1.41,
        "memory_bandwidth": 2039 * GIGABYTE,
        "device_memory_size": 80 * GIGABYTE,
        "l2_cache_size": 40 * KIBIBYTE**2,
    },
    "9.0": {
        "core_count": 132,
        "fpus_per_core": 128,
        "shared_memory_per_core": 228 * KIBIBYTE,
        "shared_memory_per_block_optin": 227 * KIBIBYTE,
        "clock_rate_ghz": 1.98,
        "memory_bandwidth": 3352 * GIGABYTE,
        "device_memory_size": 80 * GIGABYTE,
        "l2_cache_size": 50 * KIBIBYTE**2,
    },
}

needs_cuda_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="XLA's plugin for CUDA is not installed"
)


def compile_for_cuda(function, *arguments, compute_capability: str) -> str:
    """Compiles for a GPU of GPUS; returns the program. Arguments are trees of jax.ShapeDtypeStruct."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=_describe(compute_capability), topology="1x1x1"
    )
    gpu = jax.sharding.SingleDeviceSharding(topology.devices[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=gpu), arguments)
    toolkit = importlib.util.find_spec("nvidia.cu13")
    options = {"xla_gpu_cuda_data_dir": str(Path(*toolkit.submodule_search_locations))} if toolkit else {}
    with tracing_for_a_gpu(compute_capability):
        lowered = jax.jit(function).lower(*placed)
    return lowered.compile(compiler_options=options).as_text() or ""


def _describe(compute_capability: str) -> str:
    """Returns the device as text that XLA reads."""
    major, minor = compute_capability.split(".")
    fields = "\n".join(f"{name}: {value}" for name, value in (COMMON | DEVICES[compute_capability]).items())
    return f"""
gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: {minor} }} }}
platform_name: "CUDA"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{GPUS[compute_capability].device_kind}"
"""
