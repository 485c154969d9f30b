"""One token of the Mesa layer, for decoding."""

from pallas_kernels.mesa_step.api import mesa_step

__all__ = ["mesa_step"]
