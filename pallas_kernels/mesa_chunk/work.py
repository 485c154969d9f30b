"""Multiply-adds of a solve per token and head, as `xla.py` executes them; k is the key size, c the chunk's length."""

from pallas_kernels.mesa_chunk import positive


def application(k: int, c: int) -> float:
    """Of the matrix, or of the factor that the nested preconditioner shares: k^2 + 2 c k."""
    return k * k + 2 * c * k


def factor(k: int, c: int) -> float:
    """Of the factor of a chunk, made once for its forward and its adjoint solve, shared evenly by its tokens.

    A symmetric inverse [k, k], the keys times it, their Gram matrix [c, c], the inverse of its Cholesky factor, and
    that times the keys.
    """
    return (positive.inverse_work(k) + c * k * k + 2 * c * c * k + positive.inverse_root_work(c)) / c


def cotangents(k: int, c: int) -> float:
    """Of the gradients of a tile, values as large as keys: products over the chunk, and with the states' cotangents."""
    return 6 * c * k + 3 * k * k


def steps(num_steps: float, num_residuals: float, k: int, c: int) -> float:
    """Of steps that apply one matrix each, and of the residuals that are computed anew with another application each.

    A step of the nested preconditioner applies the factor and not the matrix; a plain one the matrix alone.
    """
    return (num_steps + num_residuals) * application(k, c)
