"""The Mesa layer's sequence form; see README.md in this folder."""

from pallas_kernels.mesa_chunk.api import mesa_chunk
from pallas_kernels.mesa_chunk.contract import MesaState, SolveReport
from pallas_kernels.mesa_chunk.solver import SolverConfig
from pallas_kernels.mesa_chunk.summary import MesaSummary, mesa_summary

__all__ = ["MesaState", "MesaSummary", "SolveReport", "SolverConfig", "mesa_chunk", "mesa_summary"]
