"""`router_descent` against the two ways it is written without it, and how its memory grows with the batch.

The yardsticks do the same arithmetic by automatic differentiation: neighbour by neighbour and input by input, as
published code for R2-T2 is built (with what the model computes taken as given, for the yardstick as for us), and all
inputs at once with `vmap` under one `jit`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.clock import ratio, take_turns
from experiments.bench.contract import require_near
from pallas_kernels import router_descent
from pallas_kernels.router_descent.cases import BENCHMARK, CASES, Case, sample
from pallas_kernels.router_descent.contract import Inputs

CHECKED = (("moai", "sgd"), ("mova", "adam"), ("ball", "exponentiated"), ("choices", "adam"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterRow:
    """One line of the table: how many times faster than either yardstick, by the best round, and the quartiles."""

    batch: int
    neighbors: int
    ratio_loop: float
    ratio_loop_quartiles: tuple[float, float]
    ratio_vmap: float
    ratio_vmap_quartiles: tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterMemory:
    """Peak bytes beside inputs and outputs, in units of the read-outs, and the power of the batch they grow with."""

    batches: tuple[int, ...]
    forward: tuple[float, ...]
    forward_exponent: float
    gradient: tuple[float, ...]
    gradient_exponent: float


def check(pairs: tuple[tuple[str, str], ...] = CHECKED) -> None:
    """Raises UserError if the operator is wrong on a (case, optimizer), or a yardstick computes something else."""
    for name, optimizer in pairs:
        operator = functools.partial(router_descent, groups=CASES[name].groups, optimizer=optimizer, prox=0.1)
        reference = functools.partial(operator, implementation="reference")
        with jax.enable_x64(True):
            expected = jax.jit(reference)(*_arrays(sample(CASES[name]), np.float64))
        actual = jax.jit(operator)(*_arrays(sample(CASES[name])))
        require_near(f"router_descent with {optimizer} on {name}", actual, expected)
    inputs = _arrays(sample(dataclasses.replace(BENCHMARK, batch=3)))
    expected = router_descent(*inputs)
    require_near("the loop over inputs and neighbours", _loop(inputs)(), expected)
    require_near("the mapped descent", _mapped(*inputs), expected)


def compare(case: Case, rounds: int, loop_inputs: int = 20) -> RouterRow:
    """Times all three in turns on the same inputs.

    Args:
      case: its batch is what the ratios are about.
      rounds: turns that every contestant takes.
      loop_inputs: inputs that the loop is timed on; its time is proportional to them, so the ratio is scaled.
    """
    inputs = _arrays(sample(case))
    few = inputs._replace(**{name: x[:loop_inputs] for name, x in inputs._asdict().items() if name != "learning_rates"})
    operator = jax.jit(router_descent)
    times = take_turns(
        {
            "ours": lambda: jax.block_until_ready(operator(*inputs)),
            "vmap": lambda: jax.block_until_ready(_mapped(*inputs)),
            "loop": _loop(few),
        },
        rounds,
    )
    scale = case.batch / loop_inputs
    best, low, high = (scale * x for x in ratio(times["loop"], times["ours"]))
    best_vmap, low_vmap, high_vmap = ratio(times["vmap"], times["ours"])
    return RouterRow(
        batch=case.batch,
        neighbors=case.neighbors,
        ratio_loop=best,
        ratio_loop_quartiles=(low, high),
        ratio_vmap=best_vmap,
        ratio_vmap_quartiles=(low_vmap, high_vmap),
    )


def peak_memory(case: Case, batches: tuple[int, ...]) -> RouterMemory:
    """Asks the compiler what each batch needs; nothing is run."""

    def loss(readout, inputs):
        return jnp.sum(router_descent(*inputs._replace(readout=readout))[1])

    one, forward, gradient = _arrays(sample(dataclasses.replace(case, batch=1))), [], []
    for batch in batches:
        inputs = Inputs(*(jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in one))
        inputs = inputs._replace(learning_rates=one.learning_rates)
        readouts = 4 * np.prod(inputs.readout.shape)
        forward.append(_temporary_bytes(router_descent, *inputs) / readouts)
        gradient.append(_temporary_bytes(jax.grad(loss), inputs.readout, inputs) / readouts)
    return RouterMemory(
        batches=batches,
        forward=tuple(forward),
        forward_exponent=_exponent(batches, forward),
        gradient=tuple(gradient),
        gradient_exponent=_exponent(batches, gradient),
    )


def lines(rows: list[RouterRow], memory: RouterMemory) -> list[str]:
    """A Markdown table and two sentences."""
    page = ["| inputs, neighbours | loop over both | quartiles | vmap | quartiles |", "|---" * 5 + "|"]
    for row in rows:
        loop, mapped = ("{:.3g}-{:.3g}".format(*x) for x in (row.ratio_loop_quartiles, row.ratio_vmap_quartiles))
        page.append(
            f"| {row.batch}, {row.neighbors} | {row.ratio_loop:.0f}x | {loop} | {row.ratio_vmap:.1f}x | {mapped} |"
        )
    for what, sizes, exponent in (
        ("the descent", memory.forward, memory.forward_exponent),
        ("its gradient", memory.gradient, memory.gradient_exponent),
    ):
        listed = ", ".join(f"{size:.2f} at {batch}" for size, batch in zip(sizes, memory.batches, strict=True))
        page += ["", f"Peak memory of {what} grows as b^{exponent:.3f}; in units of the read-outs: {listed}."]
    return page


def _arrays(inputs: Inputs, dtype=np.float32) -> Inputs:
    return Inputs(*(jnp.asarray(x, x.dtype if x.dtype == np.int32 else dtype) for x in inputs))


def _loss(logits_of_experts, readout, offset, label, weight):
    """One neighbour's part of the surrogate: readout [e, y], offset [y]."""
    logits = jax.nn.softmax(logits_of_experts) @ readout + offset
    return weight * (jax.nn.logsumexp(logits) - logits[label])


_softmax, _jitted_loss = jax.jit(jax.nn.softmax), jax.jit(_loss)


@jax.jit
def _add_gradient(total, theta, *neighbor):
    return total + jax.grad(_loss)(theta, *neighbor)


@jax.jit
def _move(theta, gradient, learning_rate):
    return theta - learning_rate * gradient


def _loop(inputs: Inputs):
    """Returns a function that descends input by input, neighbour by neighbour; what it reads lies ready."""
    log_routing, *neighbors, learning_rates = inputs
    rates, nothing = list(learning_rates), jnp.zeros_like(log_routing[0])
    rows = [
        (theta, [[x[b, m] for x in neighbors] for m in range(neighbors[0].shape[1])])
        for b, theta in enumerate(log_routing)
    ]

    def descend():
        results = []
        for theta, its_neighbors in rows:
            for rate in rates:
                gradient = nothing
                for neighbor in its_neighbors:
                    gradient = _add_gradient(gradient, theta, *neighbor)
                theta = _move(theta, gradient, rate)
            losses = [_jitted_loss(theta, *neighbor) for neighbor in its_neighbors]
            results.append((_softmax(theta), np.sum(losses)))
        return [np.stack(x) for x in zip(*results, strict=True)]

    return descend


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, 0, 0, 0, 0, None))
def _mapped(log_routing, readout, offset, labels, weights, learning_rates):
    def surrogate(theta):
        logits = jnp.einsum("mey,e->my", readout, jax.nn.softmax(theta)) + offset
        of_labels = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=1) - of_labels))

    def step(theta, learning_rate):
        return theta - learning_rate * jax.grad(surrogate)(theta), None

    theta, _ = jax.lax.scan(step, log_routing, learning_rates)
    return jax.nn.softmax(theta), surrogate(theta)


def _temporary_bytes(function, *arguments) -> int:
    analysis = jax.jit(function).lower(*arguments).compile().memory_analysis()
    assert analysis is not None  # CPUs have one
    return analysis.temp_size_in_bytes


def _exponent(batches, readouts_per_input) -> float:
    return float(1 + np.polyfit(np.log(batches), np.log(readouts_per_input), 1)[0])
