"""Batched gradient descent on the routing of a mixture of experts; see README.md in this folder."""

from pallas_kernels.router_descent.api import router_descent

__all__ = ["router_descent"]
