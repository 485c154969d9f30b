"""Multiply-adds of a solve per token and head, as `xla.py` executes them; k is the key size, c the chunk's length."""


def application(k: int, c: int) -> float:
    """Of the matrix, or of the factor that the nested preconditioner shares: k^2 + 2 c k."""
    return k * k + 2 * c * k


def factor(k: int, c: int) -> float:
    """Of the factor of a chunk, made once for its forward and its adjoint solve, shared evenly by its tokens.

    A symmetric inverse [k, k] (Cholesky, triangular inverse, product of the halves), the keys times it, their Gram
    matrix, its Cholesky factor, and the triangular solve with c x k right-hand sides.
    """
    inverse = k**3 / 6 + k**3 / 2 + k**3
    return (inverse + c * k * k + c * c * k + c**3 / 6 + c * c * k / 2) / c


def steps(num_steps: float, num_residuals: float, k: int, c: int) -> float:
    """Of steps that apply one matrix each, and of the residuals that are computed anew with another application each.

    A step of the nested preconditioner applies the factor and not the matrix; a plain one the matrix alone.
    """
    return (num_steps + num_residuals) * application(k, c)
