"""The operators against yardsticks of the same work, how memory and time grow, and what saving costs.

Papers:   arXiv 2506.05233, appendix C (solver) and section 3 (cost); arXiv 2502.20395, section 3 (descent, neighbours).
Command:  python -m experiments.bench        (parts "mesa" and "public" need the extra `bench`: PyTorch, on the CPU)
          python -m experiments.bench --parts gpu        (on a machine with one; beside flash-linear-attention's kernels
          where the extra `bench` is installed too, and without them elsewhere)
Cost:     about half an hour on 2 cores, 4 minutes of it for part "solver", 5 for "public", 13 for "saving"; run it on a
          machine that does nothing else.
Expected: mesa_chunk at least 1.2 times PyTorch on every line, memory that grows with t to the power 1, flat decoding;
          at most 9 nested steps to 1e-4 and 12 to 1e-6, 0.4 times the work of plain ones on the hard half of the rows;
          router_descent at least 100 times a loop over inputs and neighbours, memory that grows with the batch to the
          power 1; nearest neighbours within twice the matrix product alone; a checkpoint a minute costs at most 5 %; no
          mixer more than 1.3 times slower than public code; on a GPU at least the throughput of
          flash-linear-attention's kernels at smaller residuals, and decoding at 70 % of the bandwidth of a copy.
Measured: see the table in README.md. Only ratios taken within one run are written down; part "gpu" has not been run.
"""

import dataclasses
import json
import os
import platform
import shlex
import sys
from pathlib import Path

import jax

from experiments import cli
from experiments.bench import contract, gpu, growth, mixers, router, saving, search, solver, torture
from pallas_kernels.mesa_chunk.cases import EASY, HARD, STUDY
from pallas_kernels.router_descent.cases import BENCHMARK

ON_CPUS = ("mesa", "solver", "mixers", "public", "router", "search", "saving")
PARTS = (*ON_CPUS, "gpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure.

    Attributes:
      output: folder for bench.json and bench.md.
      parts: "mesa" (solver layer), "solver" (its steps and work by preconditioner), "mixers" (layers of every kind),
        "public" (these layers against other people's code), "router" (descent on routings), "search" (nearest
        neighbours), "saving" (checkpoints of a training), "gpu" (the solver layer there, training and decoding).
      dims: head sizes.
      length: tokens of a sequence.
      num_heads: heads; the CPU devices share them evenly.
      num_devices: CPU devices, one per core.
      rounds: turns that every contestant takes; a third of them in parts "solver", "mixers", "public" and "saving".
      num_adversaries: heads at the edge of what may be asked, of which none may give a number that is not finite.
      memory_lengths: lengths whose peak memory is asked for.
      contexts: contexts after which decoding is timed.
      neighbors: neighbours per input that descent is timed with.
      widths: embeddings that search is timed with.
      gpu_lengths: sequences that part "gpu" is timed with, as many tokens of each length.
    """

    output: Path = Path("runs/bench")
    parts: tuple[str, ...] = ON_CPUS
    dims: tuple[int, ...] = (64, 128)
    length: int = 2048
    num_heads: int = 4
    num_devices: int = 2
    rounds: int = 15
    num_adversaries: int = 100_000
    memory_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    contexts: tuple[int, ...] = (128, 512, 2048, 8192, 32768)
    neighbors: tuple[int, ...] = (5, 20)
    widths: tuple[int, ...] = (384, 4096)
    gpu_lengths: tuple[int, ...] = (2048, 8192, 32768)

    def __post_init__(self):
        if not self.parts or set(self.parts) - set(PARTS):
            raise cli.UserError(f"parts={self.parts} must be some of {PARTS}.")
        if self.num_heads % self.num_devices:
            raise cli.UserError(
                f"num_devices={self.num_devices} does not divide num_heads={self.num_heads}; choose a divisor of it."
            )
        if self.length % 256:
            raise cli.UserError(
                f"length={self.length} is not a multiple of 256, the yardstick's longest chunk; round it."
            )
        if not self.gpu_lengths or any(n < 1 or max(self.gpu_lengths) % n for n in self.gpu_lengths):
            raise cli.UserError(
                f"gpu_lengths={self.gpu_lengths} must be divisors of the longest; powers of two always are."
            )
        if self.num_adversaries < 1:
            raise cli.UserError(f"num_adversaries={self.num_adversaries} tests nothing; use 1 or more.")
        if self.rounds < 2:
            raise cli.UserError(f"rounds={self.rounds} leaves no spread to report; use 2 or more.")


def main(config: BenchConfig) -> None:
    """Checks the contracts, measures, prints one table per part and writes them to the output folder."""
    measures = {
        "mesa": measure_mesa,
        "solver": measure_solver,
        "mixers": measure_mixers,
        "public": measure_public,
        "router": measure_router,
        "search": measure_search,
        "saving": measure_saving,
        "gpu": measure_gpu,
    }
    if {"mesa", "public"} & set(config.parts):
        _require_torch()
    jax.config.update("jax_num_cpu_devices", config.num_devices)
    if "gpu" in config.parts:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants memory of the same device
        _require_gpu()
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cli.UserError(
            f"output={config.output} cannot be written ({error.strerror}); name another folder."
        ) from error
    record = {
        "command": f"python -m experiments.bench {shlex.join(sys.argv[1:])}".strip(),
        "machine": f"{platform.machine()}, {config.num_devices} CPU devices",
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    page = []
    for part in config.parts:
        measured, lines = measures[part](config)
        record |= measured
        page += [*lines, ""]
        print(f"{part}: done", flush=True)
    (config.output / "bench.json").write_text(json.dumps(record, indent=1))
    text = "\n".join([*page, f"`{record['command']}`", ""])
    (config.output / "bench.md").write_text(text)
    print(f"\n{text}\nwrote {config.output / 'bench.json'} and {config.output / 'bench.md'}")


def _require_torch() -> None:
    try:
        from experiments.bench import public, throughput  # noqa: F401
    except ModuleNotFoundError as error:
        raise cli.UserError(
            f"{error.name} is not installed, and it is the yardstick; pip install 'mesanet-jax[bench]' brings it."
        ) from error


def _require_gpu() -> None:
    if jax.default_backend() != "gpu":
        raise cli.UserError(
            f'parts: "gpu" needs a GPU, and jax has found none, only {jax.default_backend()}; '
            "where there is one, install the extra `cuda`."
        )


def measure_mesa(config: BenchConfig) -> tuple[dict, list[str]]:
    """Returns numbers and lines about mesa_chunk and mesa_step."""
    from experiments.bench import throughput

    contract.check()
    contract.check_yardstick()
    rows = []
    for name, kind in {"easy": EASY, "hard": HARD}.items():
        for dim in config.dims:
            sizes = dict(length=config.length, num_heads=config.num_heads, key_dim=dim, value_dim=dim)
            rows += throughput.compare(name, dataclasses.replace(kind, **sizes), config.rounds)
            print(f"{name}, dim {dim}: done", flush=True)
    case = dataclasses.replace(HARD, num_heads=config.num_heads)
    memory = growth.peak_memory(case, config.memory_lengths)
    decoding = growth.decoding_time(case, config.contexts, 2 * config.rounds)
    numbers = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "memory": dataclasses.asdict(memory),
        "decoding": dataclasses.asdict(decoding),
    }
    return numbers, [*throughput_table(rows), "", *growth_lines(memory, decoding)]


def measure_solver(config: BenchConfig) -> tuple[dict, list[str]]:
    """Returns numbers and lines about preconditioners."""
    contract.check(("paper_head",))
    rows, times = solver.study(), []
    print("steps and work: done", flush=True)
    for name in solver.TIMED:
        times += solver.compare(
            name, dataclasses.replace(STUDY[name], num_heads=6, length=2048), -(-config.rounds // 3)
        )
    print("times: done", flush=True)
    not_finite = torture.count(config.num_adversaries)
    numbers = {
        "solver": [dataclasses.asdict(row) for row in rows],
        "solver_times": [dataclasses.asdict(row) for row in times],
        "solver_not_finite": not_finite,
    }
    return numbers, solver.lines(rows, times, not_finite)


def measure_mixers(config: BenchConfig) -> tuple[dict, list[str]]:
    """Returns numbers and lines about the mixers of mesanet_jax."""
    rows = mixers.compare(config.length, -(-config.rounds // 3))
    return {"mixers": [row._asdict() for row in rows]}, mixers.lines(rows, config.length)


def measure_public(config: BenchConfig) -> tuple[dict, list[str]]:
    """Returns numbers and lines about the mixers of mesanet_jax against other people's code."""
    from experiments.bench import public

    rows = public.compare(config.length, -(-config.rounds // 3))
    return {"public": [row._asdict() for row in rows]}, public.lines(rows, config.length)


def measure_router(config: BenchConfig) -> tuple[dict, list[str]]:
    """Returns numbers and lines about router_descent."""
    router.check()
    rows = [router.compare(dataclasses.replace(BENCHMARK, neighbors=m), config.rounds) for m in config.neighbors]
    memory = router.peak_memory(BENCHMARK, (750, 1500, 3000, 6000, 12_000))
    numbers = {"router": [dataclasses.asdict(row) for row in rows], "router_memory": dataclasses.asdict(memory)}
    return numbers, router.lines(rows, memory)


def measure_search(config: BenchConfig) -> tuple[dict, list[str]]:
    """Returns numbers and lines about nearest neighbours."""
    rows = [search.compare(width, config.rounds) for width in config.widths]
    return {"search": [dataclasses.asdict(row) for row in rows]}, search.lines(rows)


def measure_saving(config: BenchConfig) -> tuple[dict, list[str]]:
    """Returns numbers and lines about checkpoints."""
    stall = saving.measure(-(-config.rounds // 3))
    return {"saving": stall._asdict()}, saving.lines(stall)


def measure_gpu(config: BenchConfig) -> tuple[dict, list[str]]:
    """Returns numbers and lines about mesa_chunk and mesa_step on a GPU."""
    gpu.check()
    print("contract: done", flush=True)
    found = gpu.yardstick()
    theirs = None if isinstance(found, str) else found
    training = gpu.compare(config.gpu_lengths, config.rounds, theirs)
    decoding = gpu.decode(config.rounds, theirs)
    numbers = {
        "device": jax.devices()[0].device_kind,
        "yardstick": gpu.versus(found),
        "training": [row._asdict() for row in training],
        "decoding": [row._asdict() for row in decoding],
    }
    return {"gpu": numbers}, gpu.lines(training, decoding, found)


def throughput_table(rows) -> list[str]:
    """Markdown lines: times faster than the yardstick, with steps or chunk length and the worst true residual."""
    titles = ["inputs, dim", "work", "torch, 30 steps", "fixed steps", "quartiles", "stops", "one device", "of peak"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        low, high = row.ratio_plain_quartiles
        lines.append(
            f"| {row.inputs}, {row.dim} | {row.work} | 1 ({row.residual_torch:.1e}; {row.chunk_length_torch}) "
            f"| {row.ratio_plain:.2f}x, {row.steps} ({row.residual_plain:.1e}) | {low:.2f}-{high:.2f} "
            f"| {row.ratio_stop:.2f}x ({row.residual_stop:.1e}) | {row.ratio_one_device:.2f}x | {row.peak_share:.0%} |"
        )
    return lines


def growth_lines(memory: growth.Memory, decoding: growth.Decoding) -> list[str]:
    """Two sentences."""
    vectors = ", ".join(f"{x:.1f} at {n}" for n, x in zip(memory.lengths, memory.vectors_per_token, strict=True))
    times = ", ".join(f"{x:.3f} at {n}" for n, x in zip(decoding.contexts, decoding.relative_time, strict=True))
    return [
        f"Peak memory of forward + backward grows as t^{memory.exponent:.3f}; vectors per token and head: {vectors}.",
        "",
        f"Time per decoded token changes by {decoding.slope_per_doubling:+.2%} +- {decoding.standard_error:.2%} per "
        f"doubling of the context; relative: {times}.",
    ]


if __name__ == "__main__":
    cli.run(main, BenchConfig)
