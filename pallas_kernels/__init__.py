"""Operators on local arrays: every function here computes on what one device holds and knows nothing of meshes."""

from pallas_kernels.mesa_chunk import MesaState, MesaSummary, SolverConfig, SolveReport, mesa_chunk, mesa_summary
from pallas_kernels.mesa_step import mesa_step
from pallas_kernels.router_descent import router_descent

__all__ = [
    "MesaState",
    "MesaSummary",
    "SolveReport",
    "SolverConfig",
    "mesa_chunk",
    "mesa_step",
    "mesa_summary",
    "router_descent",
]
