"""The Mesa layer's sequence form; see README.md in this folder."""

from pallas_kernels.mesa_chunk.api import mesa_chunk
from pallas_kernels.mesa_chunk.contract import MesaState, SolveReport
from pallas_kernels.mesa_chunk.solver import SolverConfig

__all__ = ["MesaState", "SolveReport", "SolverConfig", "mesa_chunk"]
