"""Operators on local arrays: every function here computes on what one device holds and knows nothing of meshes."""

from pallas_kernels.mesa_chunk import MesaState, SolverConfig, SolveReport, mesa_chunk
from pallas_kernels.mesa_step import mesa_step
from pallas_kernels.router_descent import router_descent

__all__ = ["MesaState", "SolveReport", "SolverConfig", "mesa_chunk", "mesa_step", "router_descent"]
