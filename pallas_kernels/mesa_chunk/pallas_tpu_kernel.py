"""Kernel bodies: references are loaded, the pure functions of the other files do the arithmetic, results are stored.

A program holds a few tiles and takes their solver steps side by side: one tile alone waits for its own sums and
products most of the time. What lasts from step to step is in scratch memory, [g, k, c] for g tiles.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.lax import while_loop

from pallas_kernels.mesa_chunk import algebra, nested, solver
from pallas_kernels.mesa_chunk.contract import MesaState
from pallas_kernels.mesa_chunk.methods import MIXED, Method
from pallas_kernels.mesa_chunk.nested import Factor, HalfFactor
from pallas_kernels.mesa_chunk.products import SIX_PASSES, transposed_times
from pallas_kernels.mesa_chunk.solver import Begun, Problem, Rounds, Solution, SolverConfig, Steps
from pallas_kernels.turns import in_turns


class TileArrays(NamedTuple):
    """A tile as it lies in memory, without its decays: they are cheaper to compute than to fetch."""

    k: jax.Array  # [c, k]
    v: jax.Array  # [c, v]
    beta: jax.Array  # [1, c]
    log_decay: jax.Array  # [1, c]
    starts: jax.Array  # [1, c] int32
    kk: jax.Array  # [k, k]
    kv: jax.Array  # [k, v]
    ridge: jax.Array  # [1, k]: as a column it would take a register for every eight numbers

    def tile(self) -> algebra.Tile:
        """Returns the tile with its decays."""
        decays = algebra.cumulative_decays(self.log_decay, self.starts, SIX_PASSES)
        return algebra.Tile(self.k, self.v, self.beta, decays, self.kk, self.kv, algebra.to_column(self.ridge))


class Memory(NamedTuple):
    """Scratch memory of a solve, [g, k, c] each."""

    solution: jax.Ref
    residual: jax.Ref
    step_solution: jax.Ref
    step_residual: jax.Ref
    direction: jax.Ref
    image: jax.Ref


class ForwardResults(NamedTuple):
    """What the forward kernel stores of a tile."""

    out: jax.Array  # [v, c]
    solution: jax.Array  # [k, c]
    num_steps: jax.Array  # [1, c] float32, as all results are
    residual: jax.Array  # [1, c]


class StatesAndSystems(NamedTuple):
    """What is stored of a tile before it is factored."""

    kk: jax.Array  # [k, k]
    kv: jax.Array  # [k, v]
    system: jax.Array  # [k, k], nested.state_system
    expected: jax.Array  # [1, 1], nested.expected_decay


class StatesAndForecast(NamedTuple):
    """What is carried from chunk to chunk where tiles are factored."""

    kk: jax.Array  # [k, k]
    kv: jax.Array  # [k, v]
    forecast: jax.Array  # [1, 1], nested.forecast


class FactorRows(NamedTuple):
    """What the second half of a factor stores of a tile."""

    rows: jax.Array  # [c, k]
    usable: jax.Array  # [1, c] float32


class AdjointResults(NamedTuple):
    """What the adjoint kernel stores of a tile."""

    solution: jax.Array  # [k, c]
    residual: jax.Array  # [k, c]


def forward(
    q,
    arrays: TileArrays,
    factor: Factor | None,
    results: ForwardResults,
    memory: Memory,
    *,
    config: SolverConfig,
) -> None:
    """Solves and reads out; all arguments are references to blocks [g, ...], q [k, c] of a tile."""
    tiles = [a.tile() for a in _load(arrays)]
    rhs = _load(q)
    report = _solve(rhs, tiles, _factors(factor, len(tiles)), memory, config)
    for i, tile in enumerate(tiles):
        if config.max_steps:
            x, residual = memory.solution[i] * report[i].scale, memory.residual[i] * report[i].scale
        else:
            x, residual = rhs[i], rhs[i] - algebra.matrix(tile)(rhs[i])
        results.solution[i] = x
        results.out[i] = algebra.read_out(x, tile)
        results.num_steps[i] = report[i].num_steps.astype(jnp.float32)
        results.residual[i] = solver.relative_size(residual, rhs[i])


def adjoint(
    dout,
    arrays: TileArrays,
    factor: Factor | None,
    results: AdjointResults,
    memory: Memory,
    *,
    config: SolverConfig,
) -> None:
    """Solves backward; all arguments are references to blocks [g, ...], dout [v, c] of a tile."""
    tiles = [a.tile() for a in _load(arrays)]
    rhs = [algebra.adjoint_rhs(d, tile) for d, tile in zip(_load(dout), tiles, strict=True)]
    report = _solve(rhs, tiles, _factors(factor, len(tiles)), memory, config)
    for i in range(len(tiles)):
        results.solution[i] = memory.solution[i] * report[i].scale
        results.residual[i] = memory.residual[i] * report[i].scale


def states(k, v, beta, log_decay, starts, results: MesaState, state: MesaState) -> None:
    """Stores the states before the tiles and replaces `state` by those after; references to blocks [g, ...]."""
    for i in range(k.shape[0]):
        decays = algebra.cumulative_decays(log_decay[i], starts[i])
        before = MesaState(state.kk[i], state.kv[i])
        _store(results, before, i)
        _store(state, _after(before, k[i], v[i], beta[i], decays), i)


def states_and_systems(
    k, v, beta, log_decay, starts, ridge, results: StatesAndSystems, carried: StatesAndForecast
) -> None:
    """`states`, and the systems that factors begin with; references to blocks [g, ...]."""
    for i in range(k.shape[0]):
        decays = algebra.cumulative_decays(log_decay[i], starts[i])
        before, expected = MesaState(carried.kk[i], carried.kv[i]), nested.expected_decay(carried.forecast[i], decays)
        system = nested.state_system(before.kk, algebra.to_column(ridge[i]), decays, expected)
        _store(results, (*before, system, expected), i)
        _store(carried, (*_after(before, k[i], v[i], beta[i], decays), nested.forecast(decays)), i)


def first_halves(root, expected, k, beta, ridge, log_decay, starts, results: HalfFactor) -> None:
    """First half of the factors, from inverse roots [k, k] of the systems before the tokens; references to blocks."""

    def take_tile(i):
        inverse = transposed_times(root[i], root[i])
        decays = algebra.cumulative_decays(log_decay[i], starts[i])
        half = nested.first_half(inverse, k[i], beta[i], algebra.to_column(ridge[i]), decays, expected[i])
        _store(results, half._replace(usable=half.usable.astype(jnp.float32)), i)

    def take():
        in_turns(take_tile, k.shape[0])

    take_if(jnp.any(nested.is_worth_it(expected[...])), take, results)


def second_halves(root, solved, usable, log_decay, starts, results: FactorRows) -> None:
    """Second half of the factors, from inverse roots [c, c] of the systems between tokens; references to blocks."""

    def take():
        for i in range(root.shape[0]):
            decays = algebra.cumulative_decays(log_decay[i], starts[i])
            rows, still_usable = nested.second_half(root[i], solved[i], usable[i] > 0, decays)
            _store(results, (rows, still_usable.astype(jnp.float32)), i)

    take_if(jnp.any(usable[...] > 0), take, results)


def cotangents(x, y, residual, dout, arrays: TileArrays, results: algebra.Cotangents, dstate: MesaState) -> None:
    """Gradients of the tiles; all arguments are references to blocks [g, ...], `dstate` to the cotangents after them.

    Those are replaced by the cotangents of the states before the tiles.
    """

    def differentiate(i):
        tile = jax.tree.map(lambda ref: ref[i], arrays).tile()
        after = MesaState(dstate.kk[i], dstate.kv[i])
        found = algebra.cotangents(x[i], y[i], residual[i], dout[i], tile, *after)
        _store(results, found._replace(ridge=algebra.to_row(found.ridge)), i)
        added = algebra.added_cotangents(x[i], y[i], dout[i], tile.decays)
        _store(dstate, [tile.decays.through * d + a for d, a in zip(after, added, strict=True)], i)

    in_turns(differentiate, x.shape[0])


def _after(state: MesaState, k, v, beta, decays: algebra.Decays) -> MesaState:
    """Returns the states after the tiles."""
    added = algebra.added_states(k, v, beta, decays)
    return MesaState(*(decays.through * s + a for s, a in zip(state, added, strict=True)))


class _Solved(NamedTuple):
    scale: jax.Array  # [1, c] by which solution and residual in memory are to be multiplied
    num_steps: jax.Array  # [1, c]


def _solve(rhs, tiles, factors, memory: Memory, config: SolverConfig) -> list[_Solved]:
    """Solves the tiles side by side and leaves solutions and residuals in memory."""
    precisions = [SIX_PASSES if p == "float32" else p for p in config.precisions(otherwise=MIXED)]
    posed = [nested.pose_tile(b, t, f, config, precisions) for b, t, f in zip(rhs, tiles, factors, strict=True)]
    num_steps = []
    for i, (problem, _, _) in enumerate(posed):
        found = solver.nothing_found(problem)
        memory.solution[i], memory.residual[i] = found.solution, found.residual
        num_steps.append(found.num_steps)
    problems = [problem for problem, _, _ in posed]
    for methods in zip(*(methods for _, methods, _ in posed), strict=True):
        num_steps = _rounds(problems, methods, num_steps, memory)
    return [_Solved(scale, n) for (_, _, scale), n in zip(posed, num_steps, strict=True)]


class RoundRows(NamedTuple):
    """What a loop over rounds carries of a tile, [1, c] each; the rest is in memory."""

    size: jax.Array
    wanted: jax.Array
    num_steps: jax.Array


class StepRows(NamedTuple):
    """What a loop over steps carries of a tile, [1, c] each; the rest is in memory."""

    size: jax.Array
    energy: jax.Array
    num_steps: jax.Array
    level: jax.Array


def _rounds(problems: list[Problem], methods: tuple[Method, ...], num_steps, memory: Memory) -> list[jax.Array]:
    """Runs solver.solve's rounds of one method on all tiles; returns the steps taken so far."""
    heads = range(len(problems))

    def rounds_of(i, rows: RoundRows) -> Rounds:
        found = Solution(memory.solution[i], memory.residual[i], rows.num_steps)
        return Rounds(found, rows.size, rows.wanted)

    def rows_of(rounds: Rounds) -> RoundRows:
        return RoundRows(rounds.size, rounds.wanted, rounds.found.num_steps)

    def take_round(rows):
        begun = []
        for i in heads:
            steps = solver.first_step(problems[i], methods[i], rounds_of(i, rows[i]))
            begun.append(_store_steps(memory, i, steps))
        end = _steps(problems, methods, rows, tuple(begun), memory)
        after = []
        for i in heads:
            steps = _load_steps(memory, i, end[i], methods[i])
            rounds = solver.end_round(problems[i], methods[i], rounds_of(i, rows[i]), steps)
            memory.solution[i], memory.residual[i] = rounds.found.solution, rounds.found.residual
            after.append(rows_of(rounds))
        return tuple(after)

    first = []
    for i in heads:
        found = Solution(memory.solution[i], memory.residual[i], num_steps[i])
        rounds = solver.first_round(problems[i], methods[i], found)
        memory.solution[i], memory.residual[i] = rounds.found.solution, rounds.found.residual
        first.append(rows_of(rounds))
    rows = while_loop(lambda rows: _any([r.wanted for r in rows]), take_round, tuple(first))
    return [r.num_steps for r in rows]


def _steps(problems, methods, rows: tuple[RoundRows, ...], begun: tuple[StepRows, ...], memory: Memory):
    """Runs the steps of one round on all tiles."""

    def advance(number, step_rows):
        def advance_tile(i):
            steps, begun = _load_steps(memory, i, step_rows[i], methods[i]), Begun(rows[i].size, rows[i].num_steps == 0)
            return _store_steps(memory, i, solver.step(problems[i], methods[i], number, begun, steps))

        return tuple(in_turns(advance_tile, len(step_rows)))

    def any_at(number, step_rows):
        return _any([jnp.where(row.level == number, 1.0, 0.0) for row in step_rows])

    for number in range(1, len(methods[0].levels) + 1):
        begun = while_loop(functools.partial(any_at, number), functools.partial(advance, number), begun)
    return begun


def _load_steps(memory: Memory, i: int, rows: StepRows, method: Method) -> Steps:
    directions = (memory.direction[i], memory.image[i])[: method.num_directions]
    return Steps(memory.step_solution[i], memory.step_residual[i], directions, *rows)


def _store_steps(memory: Memory, i: int, steps: Steps) -> StepRows:
    memory.step_solution[i], memory.step_residual[i] = steps.solution, steps.residual
    for ref, value in zip((memory.direction, memory.image), steps.direction, strict=False):
        ref[i] = value
    return StepRows(steps.size, steps.energy, steps.num_steps, steps.level)


def _any(rows: list[jax.Array]) -> jax.Array:
    return jnp.max(functools.reduce(jnp.maximum, rows)) > 0


def take_if(worth: jax.Array, take: Callable[[], None], results: tuple) -> None:
    """Runs `take` or sets the references of `results` to 0."""
    pl.when(worth)(take)

    @pl.when(~worth)
    def leave():
        for ref in results:
            ref[...] = jnp.zeros_like(ref)


def _load(refs) -> list:
    """Returns the tiles of a tree of references as a list of trees."""
    num_tiles = jax.tree.leaves(refs)[0].shape[0]
    return [jax.tree.map(lambda ref, i=i: ref[i], refs) for i in range(num_tiles)]


def _store(refs: tuple, values: Sequence, i: int) -> None:
    """Stores what was found of tile i."""
    for ref, value in zip(refs, values, strict=True):
        ref[i] = value


def _factors(refs: Factor | None, num_tiles: int) -> list[Factor | None]:
    if refs is None:
        return [None] * num_tiles
    return [f._replace(usable=f.usable > 0) for f in _load(refs)]
