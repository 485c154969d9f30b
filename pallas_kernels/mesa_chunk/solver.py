"""Conjugate gradient for many small systems at once, as pure functions of values.

Unknowns are columns [k, c]; each column, at each index of any axes before, is a system of its own and called a token.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import while_loop

from pallas_kernels.mesa_chunk.methods import MIXED, STEP_PRECISIONS, Method

PRECONDITIONERS = ("none", "nested")
MOST_STEPS = 10_000
# Budgets that hardly any solve exhausts.
ENOUGH_STEPS = 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """How a token is solved, and when its solve ends.

    Attributes:
      max_steps: steps at most. 0 skips the solve and reads out with the query itself, which turns the layer into gated
        linear attention (arXiv 2506.05233, section 3).
      tolerance: a token stops once ||residual|| <= tolerance * ||right-hand side||, or once more steps change nothing;
        with 0 it is solved as far as its numbers go. At the default a model trains as with exact solves (README.md,
        section 3), in an eighth of the steps.
      preconditioner: "none" for plain conjugate gradient. "nested" shares one factor among all tokens of a chunk
        (README.md, section 3) and needs far fewer steps where little is forgotten; tiles that forget fast, short chunks
        and single tokens are preconditioned by the ridge alone.
      precision: of the matrix products inside a step, "float32", "bfloat16_3x" or "bfloat16". "mixed" begins in
        float32 and goes on in bfloat16_3x as soon as the residual lets it (README.md, section 2). Residuals are
        computed anew in float32 after a round of steps, so that a lower precision costs steps before it costs accuracy.
        Where a condition is beyond what a precision resolves, steps do not converge, and reports tell; what a first
        round of "mixed" leaves is solved in float32. None is "float32", except in the kernels for TPUs, whose matrix
        units multiply bfloat16: there it is "mixed", for the preconditioner "nested" and a budget of 30 steps or more.
        `mesa_step` computes in float32.
      adjoint_max_steps, adjoint_tolerance: the same for the solve of the backward pass; None takes those above.
    """

    max_steps: int = 30
    tolerance: float = 1e-4
    preconditioner: str = "nested"
    precision: str | None = None
    adjoint_max_steps: int | None = None
    adjoint_tolerance: float | None = None

    def __post_init__(self):
        for field in ("max_steps", "adjoint_max_steps"):
            steps = getattr(self, field)
            if steps is None and field.startswith("adjoint"):
                continue
            if not isinstance(steps, int | np.integer) or isinstance(steps, bool) or steps > MOST_STEPS:
                raise ValueError(f"SolverConfig: {field}={steps} must be a whole number up to {MOST_STEPS}.")
            if steps < 0:
                raise ValueError(f"SolverConfig: {field}={steps} is negative; use 0 or more.")
            object.__setattr__(self, field, int(steps))  # numpy's numbers are constants that kernels do not take
        for field in ("tolerance", "adjoint_tolerance"):
            value = getattr(self, field)
            if value is None and field.startswith("adjoint"):
                continue
            if not isinstance(value, int | float | np.floating) or not 0.0 <= value < 1.0:
                raise ValueError(f"SolverConfig: {field}={value} is outside [0, 1); 1e-4 is a common choice.")
            object.__setattr__(self, field, float(value))
        for field, known in {"preconditioner": PRECONDITIONERS, "precision": (None, *STEP_PRECISIONS)}.items():
            if getattr(self, field) not in known:
                raise ValueError(f"SolverConfig: {field}={getattr(self, field)!r} is unknown; use one of {known}.")
        if self.adjoint_max_steps is not None and (self.adjoint_max_steps == 0) != (self.max_steps == 0):
            raise ValueError(
                f"SolverConfig: max_steps={self.max_steps} and adjoint_max_steps={self.adjoint_max_steps}: linear "
                "attention has no solve either way, so set both to 0 or neither."
            )

    def precisions(self, otherwise: str = "float32") -> tuple[str, ...]:
        """Returns those of the levels of a solve (methods.Level); `otherwise` is taken if none is named and it may be.

        Fewer digits cost some tokens steps: of plain ones, which are many as it is, and out of small budgets, none.
        """
        spared = self.preconditioner == "none" or self.max_steps < ENOUGH_STEPS
        precision = self.precision or ("float32" if spared else otherwise)
        return ("float32", "bfloat16_3x") if precision == MIXED else (precision,)

    @property
    def adjoint(self) -> "SolverConfig":
        """The solve of the backward pass as a configuration of its own."""
        steps, tolerance = self.adjoint_max_steps, self.adjoint_tolerance
        return dataclasses.replace(
            self,
            max_steps=self.max_steps if steps is None else steps,
            tolerance=self.tolerance if tolerance is None else tolerance,
            adjoint_max_steps=None,
            adjoint_tolerance=None,
        )


def check_solver(operator: str, solver) -> None:
    """Raises TypeError if `solver` is no SolverConfig."""
    if not isinstance(solver, SolverConfig):
        raise TypeError(f"{operator}: solver is a {type(solver).__name__}; pass a SolverConfig.")


class Solution(NamedTuple):
    """Result of a solve; `residual` is the vector rhs - A solution, computed from the solution."""

    solution: jax.Array  # [k, c]
    residual: jax.Array  # [k, c]
    num_steps: jax.Array  # [1, c] int32


def solve(problem: "Problem", methods: tuple[Method, ...]) -> Solution:
    """Solves A x = rhs for symmetric positive definite A from x = 0.

    Rounds of conjugate-gradient steps, with the residual computed anew after each: the steps may be taken in low
    precision or on a recurrence that drifts, and what is reported is true all the same. Nothing is absolute: right-hand
    sides are of unit size and every division is guarded instead of shifted by an epsilon, so gradients of size 1e-20
    are solved as well as those of size 1. A token that has reached its tolerance is frozen; its answer depends on no
    other token. A loop ends when all its tokens have. What one method fails on, the next takes up.

    Args:
      problem: from `pose`.
      methods: what to iterate with, in this order.
    """
    found = nothing_found(problem)
    for method in methods:

        def take_round(rounds: Rounds, method=method):
            return end_round(problem, method, rounds, take_steps(problem, method, rounds))

        rounds = first_round(problem, method, found)
        found = while_loop(lambda rounds: _any(rounds.wanted), take_round, rounds).found
    return found


def take_steps(problem: "Problem", method: Method, rounds: "Rounds") -> "Steps":
    """Takes the steps of one round."""
    steps = first_step(problem, method, rounds)
    for number in range(1, len(method.levels) + 1):
        steps = take_level(problem, method, number, rounds, steps)
    return steps


def take_level(problem: "Problem", method: Method, number: int, rounds: "Rounds", steps: "Steps") -> "Steps":
    """Takes the steps of one level, whose number counts from 1."""
    return while_loop(
        lambda steps: _any(steps.level == number),
        lambda steps: step(problem, method, number, rounds.begun, steps),
        steps,
    )


class Problem(NamedTuple):
    """Systems to solve, with right-hand sides whose largest entry is 1."""

    apply_matrix: Callable[[jax.Array], jax.Array]
    rhs: jax.Array  # [k, c]
    target: jax.Array  # [1, c] squared norm of the residual to reach
    max_steps: int


class Begun(NamedTuple):
    """How a round began, [1, c] each."""

    size: jax.Array  # squared norm of the residual
    is_first: jax.Array  # bool, whether it is the token's first


class Rounds(NamedTuple):
    """Where tokens stand between two rounds of steps."""

    found: Solution
    size: jax.Array  # [1, c] squared norm of the residual
    wanted: jax.Array  # [1, c] 1 where the token goes on, else 0, in float32: loops of kernels carry no booleans

    @property
    def begun(self) -> Begun:
        """How a round begins here."""
        return Begun(self.size, self.found.num_steps == 0)


class Steps(NamedTuple):
    """Where tokens stand between two steps of a round, in equations multiplied by the method's scale.

    Whether and how a token goes on is decided once, and carried along: a compiler may round a threshold in the loop's
    condition and in its body in two ways, and a token between them would keep a loop going in which it takes no step.
    """

    solution: jax.Array  # [k, c] correction to that of the round
    residual: jax.Array  # [k, c] as the recurrence has it
    direction: tuple[jax.Array, ...]  # [k, c] each
    size: jax.Array  # [1, c] squared norm of the residual, without the scale
    energy: jax.Array  # [1, c] residual times preconditioned residual
    num_steps: jax.Array  # [1, c] int32
    level: jax.Array  # [1, c] number of the level that its next step is of, from 1; 0 if it takes none; in float32


# A round aims a little below the tolerance, so that rounding between recurrence and residual does not cost another.
_AIM = 0.9
# A round that leaves more than this of the residual is the last one of its token: rounding has the word.
_PROGRESS = 0.7
# A round in which a residual grows by more than this is one that diverges, and is not taken over.
_GROWTH = 1e3
# A method that leaves more than this of the right-hand side has failed on its token.
_FAILED = 0.1


def pose(apply_matrix, rhs: jax.Array, config: SolverConfig) -> tuple[Problem, jax.Array]:
    """Returns the problem of unit size, and the scale [1, c] by which its solutions are to be multiplied."""
    scale = jnp.max(jnp.abs(rhs), axis=-2, keepdims=True)
    rhs = _divide(rhs, scale)
    return Problem(apply_matrix, rhs, config.tolerance**2 * _dot(rhs, rhs), config.max_steps), scale


def nothing_found(problem: Problem) -> Solution:
    """Returns the start of every solve: 0, after no step."""
    rhs = problem.rhs
    return Solution(jnp.zeros_like(rhs), rhs, jnp.zeros_like(problem.target, jnp.int32))


def first_round(problem: Problem, method: Method, found: Solution) -> Rounds:
    """Returns where the tokens of a method stand before its first round.

    It takes up what no method has touched or the one before has failed on, not what rounding kept from the last digits.
    What has been made worse than it was begins at 0 again.
    """
    size, nothing = _dot(found.residual, found.residual), nothing_found(problem)
    begun = _dot(problem.rhs, problem.rhs)
    worse, untouched = size > begun, (found.num_steps == 0) | (size > _FAILED**2 * begun)
    solution = jnp.where(worse, nothing.solution, found.solution)
    residual = jnp.where(worse, nothing.residual, found.residual)
    size = jnp.where(worse, begun, size)
    wanted = method.wanted & untouched & _unsolved(problem, size, found.num_steps)
    return Rounds(Solution(solution, residual, found.num_steps), size, wanted.astype(jnp.float32))


def first_step(problem: Problem, method: Method, rounds: Rounds) -> Steps:
    """Returns where tokens stand at the beginning of a round."""
    residual = rounds.found.residual * method.scale
    zero, num_steps = jnp.zeros_like(residual), rounds.found.num_steps
    return Steps(
        zero,
        residual,
        (zero,) * method.num_directions,
        rounds.size,
        jnp.zeros_like(rounds.size),
        num_steps,
        _level(problem, method, rounds.begun, level=rounds.wanted, size=rounds.size, num_steps=num_steps),
    )


def step(problem: Problem, method: Method, number: int, begun: Begun, steps: Steps) -> Steps:
    """Takes one step of conjugate gradient (arXiv 2506.05233, Algorithm 1) with the tokens of this level.

    `number` is that of the level, from 1.
    """
    level, active = method.levels[number - 1], steps.level == number

    def kept(new, old):
        """Tokens of later levels wait for them; those that have stopped need nothing any more."""
        return new if number == len(method.levels) else jnp.where(active, new, old)

    searched = level.search(steps.residual)
    # not steps.size, even without a preconditioner: a compiler may round the residual that is summed there and the one
    # that is kept in two ways, and where little is left of it a step that is too long by that much makes it grow
    energy = jnp.maximum(_dot(steps.residual, searched[0]), 0)
    conjugacy = _divide(energy, steps.energy)
    direction = tuple(s + conjugacy * d for s, d in zip(searched, steps.direction, strict=True))
    image = level.image(*direction)
    step_size = jnp.where(active, _divide(energy, _dot(direction[0], image)), 0)
    residual = steps.residual - step_size * image
    # where something is not positive there is no way down, and the round is over: what is left counts as nothing
    stuck = active & (step_size == 0)
    size = jnp.where(stuck, 0, _dot(residual, residual) / method.scale**2)
    num_steps = steps.num_steps + active.astype(jnp.int32)
    return Steps(
        solution=steps.solution + step_size * direction[0],
        residual=residual,
        direction=tuple(map(kept, direction, steps.direction)),
        size=kept(size, steps.size),
        energy=kept(energy, steps.energy),
        num_steps=num_steps,
        level=jnp.where(active, _level(problem, method, begun, steps.level, size, num_steps), steps.level),
    )


def _level(problem: Problem, method: Method, begun: Begun, level, size, num_steps) -> jax.Array:
    """Returns the level of the next steps of tokens at `level`, which is never an earlier one, or 0 for none.

    Fewer digits are for the first round: what it leaves is more than they resolve.
    """
    aim = jnp.maximum(_AIM**2 * problem.target, method.reduction**2 * begun.size)
    going = (level > 0) & (size > aim) & (size <= _GROWTH**2 * begun.size) & (num_steps < problem.max_steps)
    for number, before in enumerate(method.levels[:-1], 2):
        level = jnp.where(begun.is_first & (size <= before.until**2 * aim), jnp.maximum(level, number), level)
    return jnp.where(going, level, 0.0)


def end_round(problem: Problem, method: Method, rounds: Rounds, steps: Steps) -> Rounds:
    """Takes over what a round of steps has found, with the residual computed from it."""
    solution = rounds.found.solution + steps.solution
    residual = problem.rhs - problem.apply_matrix(solution)
    size = _dot(residual, residual)
    # what the recurrence takes for progress and the residual does not was rounding; NaN fails the comparison too
    accept = size <= jnp.minimum(jnp.maximum(rounds.size, 4 * steps.size), _GROWTH**2 * rounds.size)
    found = Solution(
        solution=jnp.where(accept, solution, rounds.found.solution),
        residual=jnp.where(accept, residual, rounds.found.residual),
        num_steps=steps.num_steps,
    )
    size = jnp.where(accept, size, rounds.size)
    goes_on = size < _PROGRESS**2 * rounds.size
    if len(method.levels) > 1:  # what fewer digits cannot solve others may
        goes_on |= rounds.begun.is_first
    wanted = (rounds.wanted > 0) & goes_on & _unsolved(problem, size, steps.num_steps)
    return Rounds(found, size, wanted.astype(jnp.float32))


def _unsolved(problem: Problem, size: jax.Array, num_steps: jax.Array) -> jax.Array:
    return (size > problem.target) & (num_steps < problem.max_steps)


def _any(marks: jax.Array) -> jax.Array:
    """Returns whether any mark is true; kernels for GPUs have no such sum of booleans."""
    return jnp.max(marks.astype(jnp.float32)) > 0


def relative_size(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns ||x|| / ||y|| [1, c]; 0 where y is 0."""
    return jnp.sqrt(_divide(_dot(x, x), _dot(y, y)))


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sum(x * y, axis=-2, keepdims=True)


def _divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x / y, and 0 where y is not positive: a converged or empty system stays where it is."""
    positive = y > 0
    return jnp.where(positive, x / jnp.where(positive, y, 1), 0)
