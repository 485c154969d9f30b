"""Conjugate gradient for many small systems at once, as pure functions of values.

The last axis is the unknown; every index of the axes before it is a system of its own.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """When the solve of a token ends.

    Attributes:
      max_steps: conjugate-gradient steps at most. 0 skips the solve and reads out with the query itself, which turns
        the layer into gated linear attention (arXiv 2506.05233, section 3).
      tolerance: a token stops once ||residual|| <= tolerance * ||right-hand side||; 0 uses every step.
    """

    max_steps: int = 30
    tolerance: float = 0.0

    def __post_init__(self):
        if self.max_steps < 0:
            raise ValueError(f"SolverConfig: max_steps={self.max_steps} is negative; use 0 or more.")
        if not 0.0 <= self.tolerance < 1.0:
            raise ValueError(f"SolverConfig: tolerance={self.tolerance} is outside [0, 1); 1e-4 is a common choice.")


class Solution(NamedTuple):
    """Result of a solve; `residual` is the vector rhs - A solution as the recursion carries it."""

    solution: jax.Array  # [..., k]
    residual: jax.Array  # [..., k]
    num_steps: jax.Array  # [...] int32


class _Carry(NamedTuple):
    step: jax.Array
    solution: jax.Array
    residual: jax.Array
    direction: jax.Array
    energy: jax.Array  # [..., 1] squared norm of the residual
    num_steps: jax.Array  # [..., 1]


def conjugate_gradient(
    apply_matrix: Callable[[jax.Array], jax.Array], rhs: jax.Array, config: SolverConfig
) -> Solution:
    """Solves A x = rhs for symmetric positive definite A from x = 0 (arXiv 2506.05233, Algorithm 1).

    Nothing in it is absolute: right-hand sides are scaled to unit size first and every division is guarded instead of
    shifted by an epsilon, so gradients of size 1e-20 are solved as well as those of size 1. A token that has reached
    its tolerance is frozen; its answer depends on no other token. The loop ends when all have.

    Args:
      apply_matrix: maps [..., k] to A x, system by system.
      rhs: [..., k], of the dtype to compute in.
      config: when to stop.
    """
    scale = jnp.max(jnp.abs(rhs), axis=-1, keepdims=True)
    rhs = _divide(rhs, scale)
    energy = _dot(rhs, rhs)
    target = config.tolerance**2 * energy

    def unfinished(carry: _Carry):
        return (carry.step < config.max_steps) & jnp.any(carry.energy > target)

    def advance(carry: _Carry):
        active = carry.energy > target
        image = apply_matrix(carry.direction)
        step_size = jnp.where(active, _divide(carry.energy, _dot(carry.direction, image)), 0)
        residual = carry.residual - step_size * image
        energy = _dot(residual, residual)
        conjugacy = _divide(energy, carry.energy)
        return _Carry(
            step=carry.step + 1,
            solution=carry.solution + step_size * carry.direction,
            residual=residual,
            direction=residual + conjugacy * carry.direction,
            energy=energy,
            num_steps=carry.num_steps + active,
        )

    start = _Carry(jnp.int32(0), jnp.zeros_like(rhs), rhs, rhs, energy, jnp.zeros(energy.shape, jnp.int32))
    end = jax.lax.while_loop(unfinished, advance, start)
    return Solution(end.solution * scale, end.residual * scale, end.num_steps[..., 0])


def relative_residual(apply_matrix: Callable[[jax.Array], jax.Array], rhs: jax.Array, solution: jax.Array) -> jax.Array:
    """Returns ||rhs - A solution|| / ||rhs|| [...] computed from the solution; 0 where rhs is 0."""
    error = rhs - apply_matrix(solution)
    return _divide(jnp.linalg.norm(error, axis=-1), jnp.linalg.norm(rhs, axis=-1))


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sum(x * y, axis=-1, keepdims=True)


def _divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x / y, and 0 where y is not positive: a converged or empty system stays where it is."""
    positive = y > 0
    return jnp.where(positive, x / jnp.where(positive, y, 1), 0)
