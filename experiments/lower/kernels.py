"""The rows of the table: which kernels at which sizes. A new kernel is a function that builds it and a row here."""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import jax

from experiments.lower.chips import CHIPS
from pallas_kernels import MesaState, SolverConfig, router_descent
from pallas_kernels.mesa_chunk import pallas_tpu as mesa_tpu
from pallas_kernels.mesa_chunk import pallas_tpu_factor, pallas_tpu_kernel, pallas_tpu_roots
from pallas_kernels.mesa_chunk import solver as solvers
from pallas_kernels.mesa_chunk.methods import MIXED
from pallas_kernels.mesa_chunk.nested import Factor, HalfFactor
from pallas_kernels.mesa_chunk.pallas_tpu_kernel import StepRows, TileArrays
from pallas_kernels.mesa_chunk.products import PRECISIONS
from pallas_kernels.mesa_chunk.solver import Steps
from pallas_kernels.mesa_step import pallas_tpu as step_tpu
from pallas_kernels.router_descent.contract import Inputs

Built = tuple[Callable, tuple[Any, ...]]  # a function, and its arguments as trees of jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel at one size.

    Estimates take a second per 36,000 cycles, so steps and programs are few. Loops must have a length that is known:
    any other counts as one turn.

    Attributes:
      name: of the pallas_call; no other call in the function has it.
      case: what tells this row from others of the kernel.
      build: from the numbers of steps, of programs a core, and of cores to the function that is compiled, and its
        arguments.
      steps: the numbers of steps to compile with; the difference of two is the cost of one more, one alone has none.
      per: how much of `per_name` a program works on; cycles are divided by it.
      per_name: the unit of work, such as "input".
      programs: 2 for the cost of one program more, which fetches while another is computed on; 1 for that of the first,
        which waits for what it fetches.
      chips: what to compile for.
    """

    name: str
    case: str
    build: Callable[[int, int, int], Built]
    steps: tuple[int, ...]
    per: int
    per_name: str
    programs: int = 2
    chips: tuple[str, ...] = tuple(CHIPS)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Numbers of steps, and of programs a core, to compile with."""
        return [*((steps, 1) for steps in self.steps), *((self.steps[-1], n) for n in range(2, self.programs + 1))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operator:
    """What XLA does around the kernels of a program: copies into tiles and back, sums over tiles.

    Attributes:
      name: what the kernels' names begin with.
      case, per, per_name, chips: as in Kernel.
      build: as in Kernel, but it takes nothing.
    """

    name: str
    case: str
    build: Callable[[], Built]
    per: int
    per_name: str
    chips: tuple[str, ...] = tuple(CHIPS)


def build_router_descent(tile: tuple[int, int, int], steps: int, programs: int, cores: int) -> Built:
    """Descent of 128 inputs a program, a lane each; tile is (neighbours, experts, answers)."""
    (m, e, y), b = tile, 128 * programs * cores
    shapes = Inputs((b, e), (b, m, e, y), (b, m, y), (b, m), (b, m), (steps,))
    kinds = Inputs("float32", "float32", "float32", "int32", "float32", "float32")
    return router_descent, tuple(map(jax.ShapeDtypeStruct, shapes, kinds))


def router_descent_row(*tile: int) -> Kernel:
    """A row of router_descent; sizes are from TILES in its cases."""
    return Kernel(
        name="router_descent",
        case=" ".join(f"{size}{axis}" for axis, size in zip("mey", tile, strict=True)),
        build=functools.partial(build_router_descent, tile),
        steps=(5, 10),
        per=128,
        per_name="input",
        programs=1,
    )


def build_mesa(kernel: str, solver: SolverConfig | None, method: int, steps: int, programs: int, cores: int) -> Built:
    """A kernel of mesa_chunk on four tiles a program, each solve one round of so many steps of one method."""
    tiles, size = (programs, 1, 4 * cores), 128

    def array(*shape: int, dtype: str = "float32"):
        return jax.ShapeDtypeStruct((*tiles, *shape), dtype)

    matrix, row = array(size, size), array(1, size)
    starts = array(1, size, dtype="int32")
    arrays = TileArrays(matrix, matrix, row, row, starts, matrix, matrix, row)
    if kernel == "tokens":
        return _always(pallas_tpu_factor.first_half_tiles), (matrix, array(1, 1), arrays)
    if kernel == "rows":
        half = HalfFactor(matrix, matrix, matrix, row)
        return _always(pallas_tpu_factor.second_half_tiles), (matrix, half, arrays)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), MesaState(matrix, matrix))
    if kernel == "states":
        return mesa_tpu.state_and_system_tiles, (matrix, matrix, row, row, starts, row, state)
    if solver is None:
        return mesa_tpu.cotangent_tiles, (matrix, matrix, matrix, matrix, arrays, state)
    factor = Factor(matrix, matrix, array(1, 1), row) if solver.preconditioner == "nested" else None
    function = mesa_tpu.forward_tiles if kernel == "forward" else mesa_tpu.adjoint_tiles
    return _of_steps(steps, pallas_tpu_kernel, functools.partial(function, solver=solver), method), (
        matrix,
        arrays,
        factor,
    )


def build_operator(direction: str, solver: SolverConfig) -> Built:
    """mesa_chunk on 2 sequences of 1,024 tokens, 16 heads of size 128."""
    b, t, h, k = 2, 1024, 16, 128
    array = functools.partial(jax.ShapeDtypeStruct, dtype="float32")
    q, gates, state = array((b, t, h, k)), array((b, t, h)), MesaState(array((b, h, k, k)), array((b, h, k, k)))
    inputs = q, q, gates, gates, array((h, k)), state, jax.ShapeDtypeStruct((b, t), "int32")
    forward = functools.partial(mesa_tpu.forward, solver=solver)
    if direction == "forward":
        return forward, (q, *inputs)
    _, _, x, _, factors = jax.eval_shape(functools.partial(forward, interpret=True), q, *inputs)
    return functools.partial(mesa_tpu.backward, solver=solver), (inputs, x, factors, q, state)


def build_roots(steps: int, programs: int, cores: int) -> Built:
    """The roots of a block of matrices, half as large as those of a tile: the estimate of those takes minutes."""
    return _always(pallas_tpu_roots.inverse_root), (jax.ShapeDtypeStruct((128 * programs * cores, 64, 64), "float32"),)


def _of_steps(steps: int, kernels: ModuleType, function: Callable, method: int = 0) -> Callable:
    """Returns a function whose kernels are traced with loops of known length, the only ones the model counts.

    The look at whether any token goes on, once a turn, is not in them. One method takes a round, and the other has
    nothing to do.
    """

    def traced(*arrays):
        rounds = iter((1 - method, method))

        def counted(_, body, start):
            is_round = not isinstance(start, Steps) and not isinstance(start[0], StepRows)
            return jax.lax.fori_loop(0, next(rounds) if is_round else steps, lambda _, carry: body(carry), start)

        with mock.patch.object(kernels, "while_loop", counted):
            return function(*arrays)

    return traced


def _always(function: Callable) -> Callable:
    """Returns a function whose kernels are traced as if all tiles were worth a factor: else the model counts none."""

    def traced(*arrays):
        with mock.patch.object(pallas_tpu_kernel, "take_if", lambda worth, take, results: take()):
            return function(*arrays)

    return traced


def mesa_row(kernel: str, method: int = 0, chips: tuple[str, ...] = tuple(CHIPS), **choices: str) -> Kernel:
    """A row of a mesa_chunk kernel at the heads of every model of arXiv 2506.05233.

    Rows with the preconditioner "none" count steps on the matrix, rows with "nested" such with the factor, or with
    method 1 such on the matrix. A step of a "mixed" row is one in float32 and one in bfloat16_3x.
    """
    solver = SolverConfig(max_steps=30, tolerance=1e-4, **choices) if choices else None
    return Kernel(
        name=f"mesa_chunk_{kernel}",
        case=" ".join((*choices.values(), *["on A"] * method)),
        build=functools.partial(build_mesa, kernel, solver, method),
        steps=(5, 10) if choices else (1,),
        per=4 * 128,
        per_name="token and head",
        chips=chips,
    )


def operator_row(direction: str, preconditioner: str) -> Operator:
    """A row of what XLA does around the kernels of mesa_chunk."""
    return Operator(
        name="mesa_chunk",
        case=f"around {direction} {preconditioner}",
        build=functools.partial(build_operator, direction, SolverConfig(preconditioner=preconditioner)),
        per=2 * 1024 * 16,
        per_name="token and head",
    )


def build_mesa_step(steps: int, programs: int, cores: int) -> Built:
    """One token of programs full of heads of size 128, the solve one round of so many plain steps."""
    lead, size = (programs, step_tpu.TpuConfig().side_by_side * cores), 128
    function = functools.partial(step_tpu.forward, solver=SolverConfig(preconditioner="none"))
    array = functools.partial(jax.ShapeDtypeStruct, dtype="float32")
    row, gate, matrix = (array((*lead, *axes)) for axes in ((size,), (), (size, size)))
    arguments = (row, row, row, gate, gate, array((lead[1], size)), MesaState(matrix, matrix))
    return _of_steps(steps, solvers, function), arguments


MESA_STEP = Kernel(
    name="mesa_step",
    case="none float32",
    build=build_mesa_step,
    steps=(2, 4),
    per=step_tpu.TpuConfig().side_by_side,
    per_name="token and head",
    programs=1,
    chips=("v5e", "v6e"),  # the matrices are turned in a loop of 64 turns that takes an estimate half a minute
)


MESA = (
    *(mesa_row("forward", preconditioner="none", precision=p) for p in PRECISIONS),
    *(mesa_row("forward", chips=("v5e", "v6e"), preconditioner="nested", precision=p) for p in PRECISIONS),
    *(mesa_row("forward", method=method, preconditioner="nested", precision=MIXED) for method in (0, 1)),
    mesa_row("adjoint", preconditioner="nested", precision=MIXED),
    mesa_row("states"),
    mesa_row("cotangents"),
    Kernel(
        name="mesa_chunk_roots",
        case="64 x 64",
        build=build_roots,
        steps=(1,),
        per=128,
        per_name="matrix",
        programs=1,
        chips=("v5e", "v6e"),  # half a minute each
    ),
    mesa_row("tokens"),
    mesa_row("rows"),
    *(operator_row("forward", preconditioner) for preconditioner in ("none", "nested")),
    operator_row("backward", "nested"),
)
KERNELS = (
    *MESA,
    MESA_STEP,
    router_descent_row(5, 6, 21),
    router_descent_row(16, 8, 32),
    router_descent_row(32, 8, 64),
)
