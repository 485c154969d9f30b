"""Compile a run for a pod of TPUs before anybody pays for it: does it fit, what do devices send, how long is a step?

  python -m experiments.aot 1b --topology v5p:4x4x4 --mesh.fsdp 16 --mesh.tensor 4
  python -m experiments.aot 400m --topology v5e:4x4 --mesh.fsdp 16 --data.batch-size 64

Takes the options of experiments.mesanet.pretrain, makes its very training step, and prefill and one decoding step of
its model, with the real compiler for TPUs (extra `tpu`) on any host. Cost: three minutes for the 1b model on 64 chips.
It ends with the command to launch. Nothing is run: memory is the compiler's, times are a roofline (roofline.py).
"""

import dataclasses
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from experiments import cli
from experiments.aot.chips import Chip, chip_of, devices_of
from experiments.aot.collectives import read_collectives
from experiments.aot.config import AotConfig
from experiments.aot.least import least_bytes
from experiments.aot.roofline import PASSES, Compiled, Roofline, flops, num_tokens, roofline, step_precision
from experiments.cli import UserError
from experiments.mesanet.pretrain import PRESETS
from experiments.mesh import make_mesh
from experiments.programs import Programs, check_fits
from experiments.runs import RunConfig
from mesanet_jax.model import num_parameters
from mesanet_jax.sharding import batch_sharding

MIB, GIB = 1 << 20, 1 << 30
DEFAULT = "1b"


def main(config: AotConfig) -> None:
    """Compiles and prints one table."""
    jax.config.update("jax_platforms", "cpu")  # a TPU that is here is left alone
    mesh = make_mesh(config.mesh, devices_of(config.topology))
    check_fits(config, mesh)
    chip = chip_of(config.topology, mesh)
    programs = Programs.make(config, mesh)
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    print(
        f"{config.output.name} on {config.topology}: {mesh.size} x {mesh.devices.flat[0].device_kind} ({sizes})",
        flush=True,
    )
    found, parameters = [], num_parameters(programs.state_shapes().params)
    for name, lower in _lowered(config, programs, mesh).items():
        found.append(_compile(name, lower, mesh))
        least = roofline(config, found[-1], chip, mesh.shape, parameters)
        print("\n".join(_program_rows(config, found[-1], least, chip, mesh)), flush=True)
    print("\n".join(_verdict(config, programs, found, chip, mesh)))


def _lowered(config: AotConfig, programs: Programs, mesh: jax.sharding.Mesh) -> dict:
    """Returns what lowers each program."""
    state, data = programs.state_shapes(), config.data
    lowered = {"train": lambda: programs.train.lower(state, programs.batch_shapes(config))}
    if config.prompts:
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if config.prompts % shards:
            raise UserError(
                f"prompts: {config.prompts} cannot be shared evenly by {shards} devices (mesh data x fsdp)."
            )
        prompts, token = (
            jax.ShapeDtypeStruct((config.prompts, t), jnp.int32, sharding=batch_sharding(mesh))
            for t in (data.length, 1)
        )
        lowered["prefill"] = lambda: programs.prefill.lower(state.params, prompts)

        def decode():
            memory = programs.prefill.lower(state.params, prompts).out_info[1]
            return programs.decode.lower(state.params, token, jax.tree.map(_shape, memory))

        lowered["decode"] = decode
    return lowered


def _shape(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _compile(name: str, lower, mesh: jax.sharding.Mesh) -> Compiled:
    begin = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            program = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = next(line for line in str(error).splitlines() if "RESOURCE_EXHAUSTED" in line)
        raise UserError(
            f"mesh: {name} does not fit, because {reason.split('RESOURCE_EXHAUSTED:')[-1].strip()[:200]} "
            f"Raise mesh.fsdp, mesh.tensor, mesh.sequence or micro_batches, or take more chips."
        ) from None
    memory = program.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        name=name,
        seconds=time.perf_counter() - begin,
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        peak=kept + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        collectives=read_collectives(program.as_text(), mesh.shape),
    )


def _program_rows(config: AotConfig, program: Compiled, line: Roofline, chip: Chip, mesh) -> list[str]:
    """The table of one program."""
    tokens = num_tokens(config, program.name)
    rows = [
        "",
        f"{program.name}: {tokens:,} tokens, compiled in {program.seconds:.0f} s",
        f"  memory of a device      {program.peak / GIB:8.2f} GiB at most, of {chip.memory_bytes / GIB:.1f}: arguments "
        f"{program.arguments / GIB:.2f}, temporary {program.temporary / GIB:.2f}, code {program.code / GIB:.2f}",
        f"  computing               {line.computing * 1e3:8.2f} ms",
        f"  reading and writing     {line.memory * 1e3:8.2f} ms, {line.memory * chip.memory_bandwidth / GIB:.2f} GiB",
        f"  sending                 {line.sending * 1e3:8.2f} ms",
        f"  so a call takes at least{line.least * 1e3:8.2f} ms, bound by {line.bound}: at most "
        f"{tokens / line.least:,.0f} tokens per second",
    ]
    totals: dict[tuple[str, str], list[float]] = {}
    for c in program.collectives:
        total = totals.setdefault((c.kind, c.axes), [0, 0.0])
        total[0], total[1] = total[0] + c.times, total[1] + c.total_bytes
    for (kind, axes), (times, size) in sorted(totals.items(), key=lambda row: -row[1][1]):
        gib = size / mesh.size / GIB
        rows.append(
            f"    {kind:18} {axes:14} {times:6,.0f} times {gib:9.3f} GiB {size / tokens:14,.0f} bytes per token"
        )
    return rows


def against_least(config: AotConfig, train: Compiled, parameters: int, mesh_shape: Mapping[str, int]) -> list[str]:
    """What a step sends along each axis, in multiples of what it has to; some gradients are summed along several."""
    sent: dict[str, float] = {}
    for c in train.collectives:
        sent[c.axes] = sent.get(c.axes, 0) + c.total_bytes / math.prod(mesh_shape.values())
    least = least_bytes(config, mesh_shape, parameters)
    rows = []
    for axis, size in least.items():
        along = sent.setdefault(axis, 0.0)
        rows.append(f"a step sends {along / GIB:.3f} GiB along {axis}, {along / size:.2f} times the least of this mesh")
    for axes in [axes for axes in sent if " x " in axes and sent[axes] >= MIB]:
        each = axes.split(" x ")
        times = (sent[axes] + sum(sent[axis] for axis in each)) / sum(least[axis] for axis in each)
        rows.append(
            f"and {sent[axes] / GIB:.3f} GiB along {axes} at once, with those before {times:.2f} times the least"
        )
    return rows


def _verdict(config: AotConfig, programs: Programs, found: list[Compiled], chip: Chip, mesh) -> list[str]:
    """Whether it fits, how long a step is, and the command to launch."""
    shapes = programs.state_shapes()
    params, moments = _bytes_of(shapes.params), _bytes_of(shapes.opt_state)
    train, worst = found[0], max(found, key=lambda program: program.peak)
    times = roofline(config, train, chip, mesh.shape, num_parameters(shapes.params))
    precision = step_precision(config.model.solver)
    model = flops(config, "train", config.solver_steps) * num_tokens(config, "train") / mesh.size / chip.flops
    return [
        "",
        *against_least(config, train, num_parameters(shapes.params), mesh.shape),
        f"parameters {params / GIB:.2f} GiB and optimizer {moments / GIB:.2f} GiB a device",
        f"a step between {times.least:.3f} s (sending hidden behind the rest) and {times.unhidden:.3f} s (not hidden): "
        f"MFU {model / times.unhidden:.0%} to {model / times.least:.0%}",
        f"a roofline, not measured: {chip.flops / 1e12:.0f} TFLOP/s in bfloat16, {chip.memory_bandwidth / 1e9:,.0f} "
        f"GB/s of memory and {chip.ring_bytes / 1e9:.0f} GB/s along a ring; {config.solver_steps:g} solver steps a "
        f"token, their {precision} products in {PASSES[precision]} passes",
        _fits(worst, chip),
        "",
        f"python -m experiments.mesanet.pretrain {shlex.join(launch_options(sys.argv[1:]))}",
    ]


def _fits(worst: Compiled, chip: Chip) -> str:
    if worst.peak <= chip.memory_bytes:
        return f"fits: {worst.name} leaves {(chip.memory_bytes - worst.peak) / GIB:.1f} GiB of every device free"
    return (
        f"does not fit, because {worst.name} takes {worst.peak / GIB:.1f} GiB of a device that has "
        f"{chip.memory_bytes / GIB:.1f}"
    )


def _bytes_of(tree) -> int:
    """Bytes of a device."""
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


def launch_options(words: Sequence[str]) -> list[str]:
    """Returns the options of this command that are those of a run, the preset first."""
    own = {f"--{field.name}" for field in dataclasses.fields(AotConfig)} - {
        f"--{field.name}" for field in dataclasses.fields(RunConfig)
    }
    words = list(words)
    kept = [words.pop(0)] if words and not words[0].startswith("-") else [DEFAULT]
    while words:
        word = words.pop(0)
        if word.split("=")[0].replace("-", "_").replace("__", "--", 1) not in own:
            kept.append(word)
        elif "=" not in word:
            words.pop(0)
    return kept


def _with_pod(run: RunConfig) -> AotConfig:
    return AotConfig(**{field.name: getattr(run, field.name) for field in dataclasses.fields(run)})


if __name__ == "__main__":
    presets = {name: (text, _with_pod(run)) for name, (text, run) in PRESETS.items()}
    cli.run_preset(main, presets, default=DEFAULT)
