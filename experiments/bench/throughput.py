"""`mesa_chunk` on CPU devices against the yardstick, on the same threads and inputs, at a stated residual."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.bench import yardstick
from experiments.bench.clock import Timing, ratio, take_turns
from pallas_kernels import SolverConfig, mesa_chunk
from pallas_kernels.mesa_chunk import xla
from pallas_kernels.mesa_chunk.cases import Case, sample
from pallas_kernels.mesa_chunk.contract import zero_state

STEPS = 30
CHUNK_LENGTHS = (32, 64, 128, 256)  # the yardstick is shown at its best
FRACTIONS = (1.0, 0.5, 0.25, 0.125, 0.06)
PEAK_SIZE = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: ratios of times and relative residuals of the worst token."""

    inputs: str
    dim: int
    work: str
    chunk_length_torch: int
    residual_torch: float
    steps: int
    residual_plain: float
    ratio_plain: float
    ratio_plain_quartiles: tuple[float, float]
    tolerance: float
    residual_stop: float
    ratio_stop: float
    ratio_one_device: float
    peak_share: float


class Operator:
    """`mesa_chunk` jitted with its heads split over all CPU devices, and on one of them."""

    def __init__(self, arrays, dout):
        mesh = jax.make_mesh((jax.device_count(),), ("heads",), axis_types=(AxisType.Auto,))
        self.by_head = PartitionSpec(None, None, "heads")
        self.specs = (*[self.by_head] * 5, PartitionSpec("heads"), self.by_head)
        self.mesh = mesh
        self.operands = [jnp.asarray(x, jnp.float32) for x in (*arrays, dout)]
        place = [NamedSharding(mesh, spec) for spec in self.specs]
        self.split_operands = [jax.device_put(x, at) for x, at in zip(self.operands, place, strict=True)]

    def caller(self, function, outputs: int, split: bool = True):
        """Returns a function without arguments that runs `function` on the operands and waits."""
        if not split:
            jitted, operands = jax.jit(function), self.operands
        else:
            gradients = (*[self.by_head] * 5, PartitionSpec("heads"))
            specs = (self.by_head, gradients) if outputs == 2 else self.by_head
            mapped = jax.shard_map(function, mesh=self.mesh, in_specs=self.specs, out_specs=specs, check_vma=False)
            jitted, operands = jax.jit(mapped), self.split_operands
        return lambda: jax.block_until_ready(jitted(*operands))


def forward(*operands, solver: SolverConfig):
    """Outputs of operands (q, k, v, log_decay, beta, ridge, dout)."""
    return mesa_chunk(*operands[:6], solver=solver)[0]


def forward_backward(*operands, solver: SolverConfig):
    """Outputs and the gradients of the six inputs."""
    out, pull = jax.vjp(lambda *x: mesa_chunk(*x, solver=solver)[0], *operands[:6])
    return out, pull(operands[6])


def solutions(*operands, solver: SolverConfig):
    """Solutions of the forward and of the adjoint systems, [t, h, k] each."""
    q, k, v, log_decay, beta, ridge, dout = operands
    inputs = (k, v, log_decay, beta, ridge, zero_state(q, v), jnp.zeros(q.shape[:2], jnp.int32))
    _, final, x, _, factors = xla.forward(q, *inputs, solver=solver)
    y, *_ = xla.backward(inputs, x, factors, dout, jax.tree.map(jnp.zeros_like, final), solver=solver)
    return x[0], y[0]


def residuals(arrays, dout, x, y) -> np.ndarray:
    """True relative residuals [2, t, h] of both solves, in float64 from the recurrence."""
    q, k, v, log_decay, beta, ridge, dout, x, y = (np.asarray(a, np.float64) for a in (*arrays, dout, x, y))
    found = np.zeros((2, *x.shape[:2]))
    for h in range(x.shape[1]):
        kk, kv = np.zeros((k.shape[-1], k.shape[-1])), np.zeros((k.shape[-1], v.shape[-1]))
        for t in range(len(x)):
            gate, strength, key = np.exp(log_decay[0, t, h]), beta[0, t, h], k[0, t, h]
            kk = gate * kk + strength * np.outer(key, key)
            kv = gate * kv + strength * np.outer(key, v[0, t, h])
            for solve, (rhs, solution) in enumerate([(q[0, t, h], x[t, h]), (kv @ dout[0, t, h], y[t, h])]):
                error = rhs - kk @ solution - ridge[h] * solution
                found[solve, t, h] = np.linalg.norm(error) / np.linalg.norm(rhs)
    return found


def compare(name: str, case: Case, rounds: int) -> list[Row]:
    """Measures one kind of input at one size, forward and forward + backward."""
    arrays = [np.float32(x) for x in sample(case)[:6]]
    dout = np.random.default_rng(1).normal(size=arrays[2].shape).astype(np.float32)
    operator = Operator(arrays, dout)
    tensors = yardstick.tensors((*arrays, dout))
    theirs = _yardstick_residuals(arrays, dout, tensors)
    solve = functools.partial(_residuals, operator, arrays, dout)
    plain, ours = _first_as_good(
        solve,
        theirs,
        [SolverConfig(max_steps=n, tolerance=0.0, preconditioner="none") for n in range(STEPS, STEPS + 6)],
    )
    worst = float(theirs.max(axis=(1, 2)).min())
    loosest_first = [SolverConfig(max_steps=STEPS, tolerance=worst * f, preconditioner="nested") for f in FRACTIONS]
    stop, stopped = _first_as_good(solve, theirs, [*loosest_first, plain])
    rows = []
    for work, function, outputs in (("forward", forward, 1), ("forward + backward", forward_backward, 2)):
        solves = slice(0, outputs)
        contestants = {f"torch {c}": _yardstick_call(work, tensors, c) for c in CHUNK_LENGTHS}
        contestants["plain"] = operator.caller(functools.partial(function, solver=plain), outputs)
        contestants["stop"] = operator.caller(functools.partial(function, solver=stop), outputs)
        contestants["one device"] = operator.caller(functools.partial(function, solver=plain), outputs, split=False)
        contestants |= _peaks()
        times = take_turns(contestants, rounds)
        chunk_length = min(CHUNK_LENGTHS, key=lambda c: times[f"torch {c}"].best)
        torch_time = times[f"torch {chunk_length}"]
        plain_ratio, *quartiles = ratio(torch_time, times["plain"])
        rows.append(
            Row(
                inputs=name,
                dim=case.key_dim,
                work=work,
                chunk_length_torch=chunk_length,
                residual_torch=float(theirs[solves].max()),
                steps=plain.max_steps,
                residual_plain=float(ours[solves].max()),
                ratio_plain=plain_ratio,
                ratio_plain_quartiles=(quartiles[0], quartiles[1]),
                tolerance=stop.tolerance,
                residual_stop=float(stopped[solves].max()),
                ratio_stop=ratio(torch_time, times["stop"])[0],
                ratio_one_device=ratio(torch_time, times["one device"])[0],
                peak_share=_flops(case, outputs, plain.max_steps) / times["plain"].best / _peak(times),
            )
        )
    return rows


def _residuals(operator: Operator, arrays, dout, solver: SolverConfig) -> np.ndarray:
    x, y = jax.jit(functools.partial(solutions, solver=solver))(*operator.operands)
    return residuals(arrays, dout, x, y)


def _first_as_good(solve, theirs: np.ndarray, solvers: list[SolverConfig]) -> tuple[SolverConfig, np.ndarray]:
    """The first solver whose worst residuals, of either solve, are no worse than the yardstick's; else the last."""
    ours = np.empty(0)
    for solver in solvers:
        ours = solve(solver)
        if (ours.max(axis=(1, 2)) <= theirs.max(axis=(1, 2))).all():
            return solver, ours
    return solvers[-1], ours


def _yardstick_residuals(arrays, dout, tensors) -> np.ndarray:
    heads = arrays[0].shape[2]
    _, x = yardstick.forward(*tensors[:6], chunk_length=64, steps=STEPS)
    _, (y, *_) = yardstick.forward_backward(*tensors, chunk_length=64, steps=STEPS)
    return residuals(arrays, dout, yardstick.sequence(x, heads), yardstick.sequence(y, heads))


def _yardstick_call(work: str, tensors, chunk_length: int):
    if work == "forward":
        return functools.partial(yardstick.forward, *tensors[:6], chunk_length=chunk_length, steps=STEPS)
    return functools.partial(yardstick.forward_backward, *tensors, chunk_length=chunk_length, steps=STEPS)


def _peaks() -> dict:
    """One large product in both libraries: what this machine can do at this moment."""
    x = np.random.default_rng(0).normal(size=(PEAK_SIZE, PEAK_SIZE)).astype(np.float32)
    (tensor,), array, product = yardstick.tensors([x]), jnp.asarray(x), jax.jit(jnp.matmul)
    return {
        "torch peak": lambda: yardstick.matmul(tensor, tensor),
        "jax peak": lambda: product(array, array).block_until_ready(),
    }


def _peak(times: dict[str, Timing]) -> float:
    """Operations per second of the faster library."""
    return 2 * PEAK_SIZE**3 / min(times["torch peak"].best, times["jax peak"].best)


def _flops(case: Case, solves: int, steps: int) -> float:
    """Operations of the solves alone: 4 C K + 2 K^2 per token, head and step."""
    tokens = case.batch * case.length * case.num_heads
    per_step = 4 * xla.XlaConfig().chunk_length * case.key_dim + 2 * case.key_dim**2
    return solves * steps * tokens * per_step
