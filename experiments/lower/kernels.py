"""The rows of the table: which kernels at which sizes. A new kernel is a function that builds it and a row here."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from experiments.lower.chips import CHIPS
from pallas_kernels import router_descent
from pallas_kernels.router_descent.contract import Inputs

Built = tuple[Callable, tuple[Any, ...]]  # a function, and its arguments as trees of jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel at one size.

    Estimates take a second per 36,000 cycles and are linear in the grid, so one block or two say it all. Loops must
    have a length that is known: any other counts as one turn.

    Attributes:
      name: of the pallas_call; no other call in the function has it.
      case: what tells this row from others of the kernel.
      build: from a number of steps to the function that is compiled, and its arguments.
      steps: the numbers of steps to compile with; the difference of two is the cost of one more, one alone has none.
      per: how much of `per_name` the call works on; cycles are divided by it.
      per_name: the unit of work, such as "input".
      chips: what to compile for.
    """

    name: str
    case: str
    build: Callable[[int], Built]
    steps: tuple[int, ...]
    per: int
    per_name: str
    chips: tuple[str, ...] = tuple(CHIPS)


def build_router_descent(tile: tuple[int, int, int], steps: int) -> Built:
    """Descent of 128 inputs, a lane each; tile is (neighbours, experts, answers)."""
    (m, e, y), b = tile, 128
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
    )


KERNELS = (
    router_descent_row(5, 6, 21),
    router_descent_row(16, 8, 32),
    router_descent_row(32, 8, 64),
)
