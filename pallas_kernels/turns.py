"""Like computations side by side, in an order that compilers do well with.

The compiler for TPUs keeps to the order in which operations are written. Where computations are written one after the
other, each waits for its own products; written in turns, the others go on meanwhile.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
from jax.extend.core import ClosedJaxpr, Literal

T = TypeVar("T")

# A product in several passes: operands are split into parts, results are added up.
_IN_PRODUCTS = ("dot_general", "add", "sub", "convert_element_type")


def in_turns(compute: Callable[[int], T], count: int) -> list[T]:
    """Returns [compute(0), ..., compute(count - 1)], written in turns that end with a product each.

    Args:
      compute: takes a number, returns a tree of arrays, and reads and writes references as it likes, as long as no
        computation writes what another one reads.
      count: how many.
    """
    traced = [jax.make_jaxpr(lambda i=i: compute(i), return_shape=True)() for i in range(count)]
    results = [[] for _ in traced]
    running = [_run(jaxpr, found) for (jaxpr, _), found in zip(traced, results, strict=True)]
    while running:
        running = [computation for computation in running if next(computation, "done") != "done"]
    return [
        jax.tree.unflatten(jax.tree.structure(shapes), found)
        for (_, shapes), found in zip(traced, results, strict=True)
    ]


def _run(closed: ClosedJaxpr, results: list) -> Iterator[None]:
    """Runs a program, with a pause after each of its products, and adds what it returns to `results`."""
    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))

    def value(x):
        return x.val if isinstance(x, Literal) else values[x]

    multiplied = False
    for equation in closed.jaxpr.eqns:
        primitive = equation.primitive
        if multiplied and primitive.name not in _IN_PRODUCTS:
            yield
            multiplied = False
        found = primitive.bind(*map(value, equation.invars), **primitive.get_bind_params(equation.params))
        values.update(zip(equation.outvars, found if primitive.multiple_results else [found], strict=True))
        multiplied = multiplied or primitive.name == "dot_general"
    results += map(value, closed.jaxpr.outvars)
