"""The operators against a yardstick in PyTorch, and how their memory and decoding time grow.

Paper:    arXiv 2506.05233, appendix C (solver) and section 3 (cost).
Command:  python -m experiments.bench        (needs the extra `bench`: PyTorch, on the CPU)
Cost:     about 5 minutes on 2 cores; run it on a machine that does nothing else.
Expected: at least 1.2 times the yardstick on every line, memory that grows with t to the power 1, flat decoding time.
Measured: see the table in README.md. Only ratios taken within one run are written down.
"""

import dataclasses
import json
import platform
import shlex
import sys
from pathlib import Path

import jax

from experiments import cli
from experiments.bench import contract, growth
from pallas_kernels.mesa_chunk.cases import EASY, HARD


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure.

    Attributes:
      output: folder for bench.json and bench.md.
      dims: head sizes.
      length: tokens of a sequence.
      num_heads: heads; the CPU devices share them evenly.
      num_devices: CPU devices, one per core.
      rounds: turns that every contestant takes.
      memory_lengths: lengths whose peak memory is asked for.
      contexts: contexts after which decoding is timed.
    """

    output: Path = Path("runs/bench")
    dims: tuple[int, ...] = (64, 128)
    length: int = 2048
    num_heads: int = 4
    num_devices: int = 2
    rounds: int = 15
    memory_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    contexts: tuple[int, ...] = (128, 512, 2048, 8192, 32768)

    def __post_init__(self):
        if self.num_heads % self.num_devices:
            raise cli.UserError(
                f"num_devices={self.num_devices} does not divide num_heads={self.num_heads}; choose a divisor of it."
            )
        if self.length % 256:
            raise cli.UserError(
                f"length={self.length} is not a multiple of 256, the yardstick's longest chunk; round it."
            )
        if self.rounds < 2:
            raise cli.UserError(f"rounds={self.rounds} leaves no spread to report; use 2 or more.")


def main(config: BenchConfig) -> None:
    """Checks the contract, measures, prints one table and writes it to the output folder."""
    try:
        from experiments.bench import throughput
    except ModuleNotFoundError as error:
        raise cli.UserError(
            f"{error.name} is not installed, and it is the yardstick; pip install 'mesanet-jax[bench]' brings it."
        ) from error
    jax.config.update("jax_num_cpu_devices", config.num_devices)
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cli.UserError(
            f"output={config.output} cannot be written ({error.strerror}); name another folder."
        ) from error
    contract.check()
    contract.check_yardstick()
    print("contract holds; measuring", flush=True)
    rows = []
    for name, kind in {"easy": EASY, "hard": HARD}.items():
        for dim in config.dims:
            sizes = dict(length=config.length, num_heads=config.num_heads, key_dim=dim, value_dim=dim)
            rows += throughput.compare(name, dataclasses.replace(kind, **sizes), config.rounds)
            print(f"{name}, dim {dim}: done", flush=True)
    case = dataclasses.replace(HARD, num_heads=config.num_heads)
    memory = growth.peak_memory(case, config.memory_lengths)
    decoding = growth.decoding_time(case, config.contexts, 2 * config.rounds)
    write(config, rows, memory, decoding)


def write(config: BenchConfig, rows, memory: growth.Memory, decoding: growth.Decoding) -> None:
    """Writes bench.json and bench.md, and prints the latter."""
    record = {
        "command": f"python -m experiments.bench {shlex.join(sys.argv[1:])}".strip(),
        "machine": f"{platform.machine()}, {config.num_devices} CPU devices",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "rows": [dataclasses.asdict(row) for row in rows],
        "memory": dataclasses.asdict(memory),
        "decoding": dataclasses.asdict(decoding),
    }
    (config.output / "bench.json").write_text(json.dumps(record, indent=1))
    page = "\n".join([*throughput_table(rows), "", *growth_lines(memory, decoding), "", f"`{record['command']}`", ""])
    (config.output / "bench.md").write_text(page)
    print(f"\n{page}\nwrote {config.output / 'bench.json'} and {config.output / 'bench.md'}")


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
