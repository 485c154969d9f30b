"""MesaNet and the models it is compared with: pure-functional Flax modules."""

from mesanet_jax.config import SIZES, MesaNetConfig
from mesanet_jax.generate import SamplingConfig, generate, generate_with_report
from mesanet_jax.model import MesaNet, apply_with_report
from mesanet_jax.monitor import SolverDriftWarning, SolverRange, check_solves, solver_range
from pallas_kernels import SolverConfig

__all__ = [
    "SIZES",
    "MesaNet",
    "MesaNetConfig",
    "SamplingConfig",
    "SolverConfig",
    "SolverDriftWarning",
    "SolverRange",
    "apply_with_report",
    "check_solves",
    "generate",
    "generate_with_report",
    "solver_range",
]
