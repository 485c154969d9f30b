"""MesaNet and the models it is compared with: pure-functional Flax modules."""

from mesanet_jax.config import SIZES, MesaNetConfig
from mesanet_jax.generate import SamplingConfig, generate
from mesanet_jax.model import MesaNet, apply_with_report
from pallas_kernels import SolverConfig

__all__ = ["SIZES", "MesaNet", "MesaNetConfig", "SamplingConfig", "SolverConfig", "apply_with_report", "generate"]
