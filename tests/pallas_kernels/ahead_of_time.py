"""Rung 5: compiles for accelerators that are not here, and lowers for those whose compiler is not here either."""

import importlib.util

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from experiments.lower import chips
from experiments.lower.chips import CHIPS

__all__ = ["CHIPS", "GPUS", "TPU", "compile_for", "lower_for_cuda", "needs_libtpu", "tracing_for_a_tpu"]

TPU = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
GPUS = {  # by compute capability
    capability: AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    for capability, kind in {"8.0": "NVIDIA A100-SXM4-80GB", "9.0": "NVIDIA H100 80GB HBM3"}.items()
}

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)


def compile_for(chip: str, function, *arguments) -> str:
    """Compiles for one core of a chip of CHIPS; returns the program. Arguments are trees of jax.ShapeDtypeStruct."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in chips.ENVIRONMENT.items():
            patch.setenv(name, value)
        return chips.compile_for(chip, function, *arguments).as_text()


def tracing_for_a_tpu():
    """A context in which programs are traced as under a mesh of TPUs."""
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=TPU))


def tracing_for_a_gpu(compute_capability: str):
    """A context in which programs are traced as under a mesh of one of GPUS."""
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=GPUS[compute_capability]))


def lower_for_cuda(function, *arguments, compute_capability: str) -> str:
    """Lowers for one of GPUS; returns the program. jax 0.10 takes every GPU that is not here for an H100."""
    with tracing_for_a_gpu(compute_capability):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
