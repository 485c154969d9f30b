"""How many steps, and how much work, the systems of the Mesa layer take: plain, Jacobi and nested, on the same tiles.

Steps of a tile are those of its worst token, because a tile runs until all its tokens have stopped. The baselines are
the recurrences of the textbooks on the same matrix applications, and test the residual that they carry along, so that
nothing of our solver slows them down: one true residual at the end is all that is added, and counted.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.clock import ratio, take_turns
from experiments.cli import UserError
from pallas_kernels import SolverConfig, mesa_chunk
from pallas_kernels.mesa_chunk import algebra, nested, solver, work, xla
from pallas_kernels.mesa_chunk.algebra import Tile
from pallas_kernels.mesa_chunk.cases import STUDY, Case, sample
from pallas_kernels.mesa_chunk.chunks import to_columns
from pallas_kernels.mesa_chunk.contract import zero_state
from pallas_kernels.mesa_chunk.methods import STEP_PRECISIONS, Method
from pallas_kernels.mesa_chunk.nested import Factor

TOLERANCES = (1e-4, 1e-6)
SIDES = ("forward", "adjoint")
MAX_STEPS = 60
TIMED = ("silu, 0.8-0.99", "low_rank, 0.95-1", "low_rank, 1")  # easy, in between and hard
TARGET_STEPS = {1e-4: 9, 1e-6: 12}
TARGET_WORK = {"hard": 0.4, "easy": 1.0}  # halves of the rows by the steps of plain conjugate gradient


class Counts(NamedTuple):
    """What the solve of one tile executed, and where it left its tokens."""

    num_steps: jax.Array  # [] executed, those of the worst token of every round
    num_residuals: jax.Array  # [] computed anew
    mean_steps: jax.Array  # [] over tokens
    worst_steps: jax.Array  # [] of one token
    residual: jax.Array  # [] largest true relative residual


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyRow:
    """One solver on one side of one row of the study: means over tiles, worst over tokens, work as multiply-adds."""

    inputs: str
    side: str
    tolerance: float
    solver: str
    worst_steps: int
    mean_steps: float
    tile_steps: float
    residuals_computed: float
    residual: float
    work_per_token: float
    factor_per_token: float


def study(cases: dict[str, Case] = STUDY) -> list[StudyRow]:
    """Solves every row forward and adjoint, to both tolerances, with every solver."""
    rows = []
    for name, case in cases.items():
        for tolerance in TOLERANCES:
            counts, use = jax.device_get(_solve_all(_operands(case), tolerance=tolerance))
            rows += [
                _row(name, side, tolerance, label, found, use if label.startswith("nested") else 0 * use, case)
                for label, sides in counts.items()
                for side, found in sides.items()
            ]
    return rows


def _operands(case: Case) -> list[jax.Array]:
    arrays = [jnp.asarray(x, jnp.float32) for x in sample(case)[:6]]
    return [*arrays, jnp.asarray(np.random.default_rng(1).normal(size=arrays[2].shape), jnp.float32)]


@functools.partial(jax.jit, static_argnames="tolerance")
def _solve_all(operands, *, tolerance: float):
    """Returns counts [tiles] by solver and side, and for which tiles [tiles] a factor is made."""

    def solve_tile(inputs):
        q, dout, tile, expected = inputs
        sides = dict(zip(SIDES, (q, algebra.adjoint_rhs(dout, tile)), strict=True))
        factors = {p: nested_config(tolerance, p) for p in STEP_PRECISIONS}
        shared = xla.factor_tile(tile, expected, factors["float32"])
        solvers = {
            "plain": lambda rhs: textbook(tile, rhs, jnp.ones_like(rhs), tolerance),
            "Jacobi": lambda rhs: textbook(tile, rhs, diagonal(tile), tolerance),
        }
        for precision, config in factors.items():
            solvers[f"nested {precision}"] = functools.partial(_nested, tile=tile, factor=shared, config=config)
        counts = {name: {side: solve(rhs) for side, rhs in sides.items()} for name, solve in solvers.items()}
        return counts, jnp.zeros((), bool) if shared is None else nested.is_worth_it(expected)[0, 0]

    q, dout, tiles = cut(operands)
    arrays = q, dout, tiles, nested.expected_decays(tiles.decays)
    return jax.lax.map(solve_tile, jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), arrays))


def cut(operands) -> tuple[jax.Array, jax.Array, Tile]:
    """Returns queries, cotangents of the outputs and tiles, [n, b, h, ...] each, of a sequence from an empty state."""
    q, k, v, log_decay, beta, ridge, dout = operands
    starts, config = jnp.zeros(q.shape[:2], jnp.int32), xla.XlaConfig()
    tiles, _ = xla.cut(k, v, log_decay, beta, ridge, zero_state(q, v), starts, config)
    return to_columns(q, tiles.k.shape[-2]), to_columns(dout, tiles.k.shape[-2]), tiles


def textbook(tile: Tile, rhs: jax.Array, diagonal: jax.Array, tolerance: float) -> Counts:
    """Conjugate gradient preconditioned by a diagonal [k, c], all tokens of a tile [k, c] in step, each stopping alone.

    A token stops by the residual that the recurrence carries (Saad, Iterative Methods for Sparse Linear Systems, 9.1).
    """
    apply_matrix = algebra.matrix(tile)

    def dot(x, y):
        return jnp.sum(x * y, axis=0)

    def divide(x, y):
        return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 0)

    def going(residual):
        return dot(residual, residual) > tolerance**2 * dot(rhs, rhs)

    def step(carry):
        x, residual, direction, energy, active, num_steps = carry
        image = apply_matrix(direction)
        size = jnp.where(active, divide(energy, dot(direction, image)), 0)
        x, residual = x + size * direction, residual - size * image
        searched = residual / diagonal
        new = dot(residual, searched)
        direction = searched + divide(new, energy) * direction
        return x, residual, direction, new, active & going(residual), num_steps + active

    def goes_on(carry):
        *_, active, num_steps = carry
        return jnp.any(active) & (jnp.max(num_steps) < MAX_STEPS)

    start = rhs / diagonal
    carry = jnp.zeros_like(rhs), rhs, start, dot(rhs, start), going(rhs), jnp.zeros(rhs.shape[1:], jnp.int32)
    x, *_, num_steps = jax.lax.while_loop(goes_on, step, carry)
    return _counts(num_steps, jnp.max(num_steps), jnp.ones((), jnp.int32), rhs - apply_matrix(x), rhs)


def diagonal(tile: Tile) -> jax.Array:
    """Returns the diagonals of H_t + Lambda [k, c]."""
    state = jnp.sum(jnp.where(jnp.eye(tile.kk.shape[-1], dtype=bool), tile.kk, 0), axis=-1, keepdims=True)
    weights = tile.decays.within * tile.beta.T
    return tile.decays.into * state + (tile.k**2).T @ weights + tile.ridge


def _nested(rhs: jax.Array, *, tile: Tile, factor: Factor | None, config: SolverConfig) -> Counts:
    """Counts what the operator's solver executes; NaN for a residual if this count has lost track of it."""
    problem, methods, _ = nested.pose_tile(rhs, tile, factor, config, config.precisions())
    found, executed, computed = executed_steps(problem, methods)
    truth = nested.solve_tile(rhs, tile, factor, config)
    same = jnp.all(truth.num_steps == found)
    return _counts(found[0], executed, computed, jnp.where(same, truth.residual, jnp.nan), rhs)


def nested_config(tolerance: float, precision: str = "float32") -> SolverConfig:
    """Returns the solver of the study."""
    return SolverConfig(max_steps=MAX_STEPS, tolerance=tolerance, preconditioner="nested", precision=precision)


def executed_steps(problem: solver.Problem, methods: tuple[Method, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the loops of `solver.solve` over its own parts; returns steps [1, c], steps executed, residuals computed."""
    found = solver.nothing_found(problem)
    executed = computed = jnp.zeros((), jnp.int32)
    for method in methods:

        def take_round(carry, method=method):
            rounds, executed, computed = carry
            steps = solver.first_step(problem, method, rounds)
            for number in range(1, len(method.levels) + 1):
                before, steps = steps, solver.take_level(problem, method, number, rounds, steps)
                executed += jnp.max(steps.num_steps - before.num_steps)
            return solver.end_round(problem, method, rounds, steps), executed, computed + 1

        start = solver.first_round(problem, method, found), executed, computed
        rounds, executed, computed = jax.lax.while_loop(lambda carry: jnp.any(carry[0].wanted > 0), take_round, start)
        found = rounds.found
    return found.num_steps, executed, computed


def _counts(num_steps, executed, computed, residual, rhs) -> Counts:
    """From steps [c] and true residuals [k, c] of the tokens of a tile."""
    size = solver.relative_size(residual, rhs)
    return Counts(executed, computed, jnp.mean(num_steps.astype(jnp.float32)), jnp.max(num_steps), jnp.max(size))


def _row(inputs: str, side: str, tolerance: float, label: str, found: Counts, use, case: Case) -> StudyRow:
    if np.isnan(found.residual).any():
        raise UserError(f"solver: {label} on {inputs} is counted by other steps than the operator takes.")
    k, c = case.key_dim, min(case.length, xla.XlaConfig().chunk_length)
    executed, computed = float(found.num_steps.mean()), float(found.num_residuals.mean())
    return StudyRow(
        inputs=inputs,
        side=side,
        tolerance=tolerance,
        solver=label,
        worst_steps=int(found.worst_steps.max()),
        mean_steps=float(found.mean_steps.mean()),
        tile_steps=executed,
        residuals_computed=computed,
        residual=float(found.residual.max()),
        work_per_token=work.steps(executed, computed, k, c),
        factor_per_token=float(use.mean()) * work.factor(k, c),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeRow:
    """How many times faster nested is than plain by the best round, the quartiles, and the worst true residuals."""

    inputs: str
    work: str
    ratio: float
    quartiles: tuple[float, float]
    residual_plain: float
    residual_nested: float


def compare(name: str, case: Case, rounds: int, tolerance: float = 1e-4) -> list[TimeRow]:
    """Times the operator with both preconditioners at the same tolerance, forward and forward + backward."""
    operands, rows = _operands(case), []
    configs = {
        "plain": SolverConfig(max_steps=MAX_STEPS, tolerance=tolerance, preconditioner="none"),
        "nested": nested_config(tolerance),
    }
    for work_done, function in (("forward", forward), ("forward + backward", forward_backward)):
        calls = {name: jax.jit(functools.partial(function, solver=config)) for name, config in configs.items()}
        residuals = {name: worst_residual(operands, call(*operands)) for name, call in calls.items()}
        waiting = {name: functools.partial(_wait, call, operands) for name, call in calls.items()}
        times = take_turns(waiting, rounds)
        best, *quartiles = ratio(times["plain"], times["nested"])
        rows.append(
            TimeRow(
                inputs=name,
                work=work_done,
                ratio=best,
                quartiles=(quartiles[0], quartiles[1]),
                residual_plain=residuals["plain"],
                residual_nested=residuals["nested"],
            )
        )
    return rows


def forward(*operands, solver: SolverConfig):
    """Outputs and report of operands (q, k, v, log_decay, beta, ridge, dout)."""
    out, _, report = mesa_chunk(*operands[:6], solver=solver, with_report=True)
    return report.residual, out


def forward_backward(*operands, solver: SolverConfig):
    """The same, and the gradients of the six inputs."""

    def outputs(*inputs):
        residual, out = forward(*inputs, solver=solver)
        return out, residual

    out, pull, residual = jax.vjp(outputs, *operands[:6], has_aux=True)
    return residual, out, *pull(operands[6])


def _wait(call, operands):
    return jax.block_until_ready(call(*operands))


def worst_residual(operands, results) -> float:
    """Largest true relative residual of the forward solves and, if there are gradients, of the adjoint solves.

    The gradient of the query is the adjoint solution.
    """
    worst = float(jnp.max(results[0]))
    return worst if len(results) == 2 else max(worst, float(_adjoint_residual(operands, results[2])))


@jax.jit
def _adjoint_residual(operands, dq) -> jax.Array:
    _, dout, tiles = cut(operands)
    rhs, y = algebra.adjoint_rhs(dout, tiles), to_columns(dq, tiles.k.shape[-2])
    return jnp.max(solver.relative_size(rhs - algebra.matrix(tiles)(y), rhs))


def lines(rows: list[StudyRow], times: list[TimeRow], torture: dict[str, tuple[int, int]]) -> list[str]:
    """Markdown: steps, precisions, work, times, and what was not finite."""
    parts = steps_table(rows), precision_table(rows), work_table(rows), times_table(times)
    page = [line for part in parts for line in (*part, "")]
    counts = "; ".join(f"{bad} of {total:,} ({kind})" for kind, (total, bad) in torture.items())
    return [*page, f"Heads with anything not finite, in value or gradient: {counts}."]


def steps_table(rows: list[StudyRow]) -> list[str]:
    """Steps of the worst token, forward/adjoint at both tolerances."""
    found, solvers = _by_key(rows), ("plain", "Jacobi", "nested float32")
    titles = [f"{name} {tolerance:.0e}" for name in ("plain", "Jacobi", "nested") for tolerance in TOLERANCES]
    table = _head(["keys, gates", *titles, "residual nested 1e-06"])
    for name in dict.fromkeys(row.inputs for row in rows):
        cells = [
            "/".join(str(found[name, side, tolerance, label].worst_steps) for side in SIDES)
            for label in solvers
            for tolerance in TOLERANCES
        ]
        residual = max(found[name, side, TOLERANCES[-1], "nested float32"].residual for side in SIDES)
        table.append(_line([name, *cells, f"{residual:.1e}"]))
    worst = {
        t: max(row.worst_steps for row in rows if (row.solver, row.tolerance) == (solvers[-1], t)) for t in TOLERANCES
    }
    said = ", ".join(f"{steps} to {t:.0e} (target {TARGET_STEPS[t]})" for t, steps in worst.items())
    return [*table, "", f"Steps of the worst token of all, forward/adjoint; nested at most {said}."]


def precision_table(rows: list[StudyRow]) -> list[str]:
    """Steps and residuals of the worst token of all rows, by the precision of products inside a step."""
    table = _head(
        ["products in a step", "tolerance", "worst steps", "mean steps", "residuals computed", "worst residual"]
    )
    for precision in STEP_PRECISIONS:
        for tolerance in TOLERANCES:
            some = [row for row in rows if (row.solver, row.tolerance) == (f"nested {precision}", tolerance)]
            means = (
                f"{np.mean([getattr(row, of) for row in some]):.1f}" for of in ("mean_steps", "residuals_computed")
            )
            worst = str(max(row.worst_steps for row in some)), *means, f"{max(row.residual for row in some):.1e}"
            table.append(_line([precision, f"{tolerance:.0e}", *worst]))
    return table


def work_table(rows: list[StudyRow]) -> list[str]:
    """Multiply-adds of a forward and an adjoint solve with what they share, relative to plain."""
    table = _head(["solver", "tolerance", "easy half", "hard half", "all", "worst row"])
    for label in ("Jacobi", *(f"nested {precision}" for precision in STEP_PRECISIONS)):
        for tolerance in TOLERANCES:
            ours, plain = (total_work(rows, name, tolerance) for name in (label, "plain"))
            order = sorted(plain, key=lambda name: plain[name])
            halves = order[: len(order) // 2], order[len(order) // 2 :], order
            shares = [sum(ours[name] for name in half) / sum(plain[name] for name in half) for half in halves]
            shares.append(max(ours[name] / plain[name] for name in order))
            table.append(_line([label, f"{tolerance:.0e}", *(f"{share:.3f}" for share in shares)]))
    easy, hard = TARGET_WORK["easy"], TARGET_WORK["hard"]
    return [
        *table,
        "",
        f"Work relative to plain, set-up included; targets at 1e-04: {easy} (easy half), {hard} (hard).",
    ]


def total_work(rows: list[StudyRow], label: str, tolerance: float) -> dict[str, float]:
    """Multiply-adds per token of both solves by row; the factor they share is counted once."""
    found = _by_key(rows)
    names = dict.fromkeys(row.inputs for row in rows)
    both = {name: [found[name, side, tolerance, label] for side in SIDES] for name in names}
    return {name: sum(row.work_per_token for row in two) + two[0].factor_per_token for name, two in both.items()}


def times_table(rows: list[TimeRow]) -> list[str]:
    """How many times faster nested is than plain on this machine."""
    table = _head(["keys, gates", "work", "nested against plain", "quartiles", "residual plain", "residual nested"])
    for row in rows:
        quartiles = "{:.2f}-{:.2f}".format(*row.quartiles)
        residuals = f"{row.residual_plain:.1e}", f"{row.residual_nested:.1e}"
        table.append(_line([row.inputs, row.work, f"{row.ratio:.2f}x", quartiles, *residuals]))
    return table


def _by_key(rows: list[StudyRow]) -> dict[tuple, StudyRow]:
    return {(row.inputs, row.side, row.tolerance, row.solver): row for row in rows}


def _head(titles: list[str]) -> list[str]:
    return [_line(titles), "|---" * len(titles) + "|"]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
