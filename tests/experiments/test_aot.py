"""What a compiled program says of collectives, and the command that compiles a run for a pod."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import P

from experiments.aot.__main__ import against_least, launch_options
from experiments.aot.chips import Chip, devices_of
from experiments.aot.collectives import Collective, read_collectives
from experiments.aot.config import AotConfig
from experiments.aot.least import least_bytes
from experiments.aot.roofline import Compiled, flops, roofline
from experiments.mesanet.pretrain import PRESETS
from experiments.mesh import MeshConfig, make_mesh
from experiments.programs import Programs
from experiments.runs import RunConfig
from mesanet_jax.model import num_parameters
from mesanet_jax.sharding import MESH_AXES
from tests.pallas_kernels.ahead_of_time import needs_libtpu

MESH = {"data": 1, "fsdp": 2, "sequence": 1, "tensor": 4}

PROGRAM = """HloModule jit_step, is_scheduled=true

%condition (i: (s32[], f32[8,4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(28), metadata={stack_frame_id=1}
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%piece (p: bf16[4,2]) -> bf16[8,2] {
  ROOT %gathered.1 = bf16[8,2]{1,0} all-gather(%p), channel_id=7, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

%all-reduce-scatter.3 (p: f32[8,4]) -> f32[4,4] {
  %sum = f32[8,4]{1,0} all-reduce(%p), channel_id=9, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%f
  ROOT %slice = f32[4,4]{1,0} dynamic-slice(%sum, %zero), dynamic_slice_sizes={4,4}
}

%body (i: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %first = bf16[8,2]{1,0} fusion(%q), kind=kCustom, calls=%piece
  %gathered.2 = bf16[8,2]{1,0} all-gather(%q), channel_id=7, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %both = (f32[8]{0}, bf16[3]{0}) all-reduce(%a, %b), channel_id=8, replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%f
  %scattered = f32[4,4]{1,0} fusion(%x), kind=kOutput, calls=%all-reduce-scatter.3
  %inner = (f32[2], u32[]) while(%t), condition=%window.until, body=%window
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %both.2 = (s32[], f32[8,4]) tuple(%next, %x)
}

%window (w: (f32[2], u32[])) -> (f32[2], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %turn = u32[]{:T(128)} get-tuple-element(%w), index=1
  %handed = f32[2]{0} collective-permute(%h), channel_id=3, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %turn.2 = u32[]{:T(128)} add(%turn, %two)
  ROOT %w.2 = (f32[2]{0}, u32[]{:T(128)}) tuple(%handed, /*index=1*/%turn.2)
}

%window.until (w: (f32[2], u32[])) -> pred[] {
  %turns = u32[]{:T(128)} constant(7)
  %turn.1 = u32[]{:T(128)} get-tuple-element(%w), index=1
  ROOT %lt.2 = pred[]{:T(512)} compare(%turn.1, %turns), direction=LT
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %loop = (s32[], f32[8,4]) while(%start), condition=%condition, body=%body
  %hop = (bf16[10]{0}, bf16[10]{0}, u32[]{:S(2)}) collective-permute-start(%y), source_target_pairs={{0,4},{1,5}}
  %all = f32[2]{0} all-reduce(%z), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a','b'}, to_apply=%f
  %here = f32[2]{0} all-gather(%z), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}
  %odd = f32[2]{0} all-reduce(%z), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, to_apply=%f
}
"""


def test_collectives_are_counted_once_per_turn_with_axes_and_bytes_however_they_are_written():
    assert sorted(read_collectives(PROGRAM, MESH)) == sorted(
        [
            Collective("all-gather", "fsdp", 28, 32 / 2, 8),
            Collective("all-reduce", "tensor", 28, (32 + 6) * 2 * 3 / 4, 8),
            Collective("reduce-scatter", "fsdp", 28, 128 / 2, 8),
            Collective("collective-permute", "tensor", 28 * 4, 8, 4),
            Collective("collective-permute", "fsdp", 1, 20, 2),
            Collective("all-reduce", "fsdp x tensor", 1, 8 * 2 * 7 / 8, 8),
            Collective("all-reduce", "fsdp", 1, 8 * 2 / 2, 8),
        ]
    )


BYTES = 3 * 100 * 4  # of a device's half


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: jax.lax.psum(jnp.sin(x), "data"), Collective("all-reduce", "data", 5, BYTES, 2)),
        (lambda x: jax.lax.ppermute(x, "data", [(0, 1)]), Collective("collective-permute", "data", 5, BYTES, 1)),
        (
            lambda x: jax.lax.all_gather(
                jax.lax.psum_scatter(x, "data", scatter_dimension=1, tiled=True), "data", tiled=True, axis=1
            ),
            Collective("all-gather", "data", 5, BYTES / 2, 2),
        ),
    ],
)
def test_programs_that_were_really_compiled_are_read(function, expected):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def turns(x):
        return jax.lax.scan(lambda x, _: (function(x), None), x, length=5)[0]

    split = jax.shard_map(turns, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    program = jax.jit(split).lower(jax.ShapeDtypeStruct((6, 100), jnp.float32)).compile().as_text()
    found = read_collectives(program, {"data": 2})
    assert expected in found
    assert all(c == Collective("reduce-scatter", "data", 5, BYTES / 2, 2) for c in found if c != expected)


def test_shards_that_say_the_same_thing_twice_are_counted_twice():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def hops(x):
        return jax.lax.ppermute(jnp.sin(jax.lax.ppermute(x, "data", [(0, 1)])), "data", [(0, 1)])

    split = jax.shard_map(hops, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    program = jax.jit(split).lower(jax.ShapeDtypeStruct((6, 100), jnp.float32)).compile().as_text()
    assert [c.total_bytes for c in read_collectives(program, {"data": 2})] == [BYTES, BYTES]


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ("tiny --topology v5e:2x2 --mesh.fsdp 2", "tiny --mesh.fsdp 2"),
        ("--mesh.fsdp 2 --topology=v5e:2x2", "1b --mesh.fsdp 2"),
        ("145m --solver_steps 4 --solver-steps=5 --prompts 0 --data.batch-size 8", "145m --data.batch-size 8"),
    ],
)
def test_the_command_to_launch_is_that_of_the_run(words, kept):
    assert launch_options(words.split()) == kept.split()


TINY = PRESETS["tiny"][1]  # 16 sequences of 256, width 128, 4 heads of 32, two layers, float32, no remat


@pytest.mark.parametrize(
    ("mesh", "least"),
    [
        ({"data": 4}, {"data": 2 * 3 / 4 * 4 * 100_000}),
        # all three times but the table of 257 rows, which is gathered once
        ({"fsdp": 4}, {"fsdp": 3 / 4 * 4 * (3 * 100_000 - 257 * 128)}),
        ({"tensor": 2}, {"tensor": 2 * 1 / 2 * (2 * 4 + 2) * 16 * 256 * 128 * 4}),
        # a state of 32 x 64 numbers and 3 inputs of queries and keys, for 16 rows, 4 heads and 2 layers, there and back
        ({"sequence": 2}, {"sequence": (2 * 2 * 16 * 4 * 4 * (32 * 64 + 2 * 3 * 32) + 2 * 4 * 100_000) / 2}),
        ({"data": 2, "tensor": 2}, {"data": 4 * 50_000, "tensor": 2 * 1 / 2 * 10 * 8 * 256 * 128 * 4}),
    ],
    ids=str,
)
def test_the_least_that_a_step_has_to_send_is_what_the_layers_ask_for(mesh, least):
    found = least_bytes(TINY, dict.fromkeys(MESH_AXES, 1) | mesh, num_parameters=100_000)
    assert found == pytest.approx(least)


CHIP = Chip(memory_bytes=0, memory_bandwidth=1e3, flops=1e6, ring_bytes=10.0)
SENT = [Collective("all-gather", "fsdp", 3, 40.0, 2), Collective("all-reduce", "tensor", 1, 80.0, 2)]
POD = AotConfig(model=TINY.model, data=TINY.data, prompts=8)


def compiled(name: str) -> Compiled:
    return Compiled(name, 0.0, arguments=900, results=500, temporary=50, code=7, peak=0, collectives=SENT)


@pytest.mark.parametrize(
    ("name", "mesh", "matrices"),
    [
        ("decode", {}, 0),  # an argument that is read once
        ("decode", {"tensor": 4}, 0),
        ("decode", {"fsdp": 2}, 2),  # gathered and read
        ("train", {}, 1),  # read for the gradient of an input, too
        ("train", {"fsdp": 2, "tensor": 4}, 4 / 4),
    ],
    ids=str,
)
def test_a_call_is_charged_with_all_that_passes_through_the_memory_of_a_device(name, mesh, matrices):
    found = roofline(POD, compiled(name), CHIP, dict.fromkeys(MESH_AXES, 1) | mesh, num_parameters=1000)
    assert found.memory == pytest.approx((900 + 500 + 2 * 50 + 4 * 1000 * matrices) / 1e3)


def test_a_call_takes_as_long_as_the_slowest_of_arithmetic_memory_and_links():
    found = roofline(POD, compiled("decode"), CHIP, dict.fromkeys(MESH_AXES, 1) | {"data": 2}, num_parameters=1000)
    assert found.computing == pytest.approx(8 / 2 * charged(POD) / 1e6)
    assert found.sending == pytest.approx((3 * 40 + 80) / 10) and found.bound == "sending"
    assert found.least == found.sending and found.unhidden == found.sending + found.computing
    assert found._replace(memory=50.0).bound == "memory" and found._replace(memory=50.0).unhidden == 70


@pytest.mark.parametrize(
    ("solver", "passes"),
    [
        ({}, 3),
        ({"preconditioner": "none"}, 6),
        ({"preconditioner": "none", "precision": "bfloat16"}, 1),
        ({"precision": "float32"}, 6),
    ],
    ids=str,
)
def test_a_training_step_is_charged_with_the_passes_of_its_solves(solver, passes):
    solver = dataclasses.replace(POD.model.solver, **solver)
    config = dataclasses.replace(POD, model=dataclasses.replace(POD.model, solver=solver, remat="nothing"))
    found = roofline(config, compiled("train"), CHIP, dict.fromkeys(MESH_AXES, 1), num_parameters=1000)
    dense = flops(config, "train", 0)
    solves = flops(config, "train", config.solver_steps) - dense
    tokens = config.data.batch_size * config.data.length
    assert found.computing == pytest.approx(tokens * (dense + passes * solves) / 1e6)


def charged(config: AotConfig) -> float:
    """FLOPs of a decoded token, its solve in float32, six times as long."""
    return 6 * flops(config, "decode", config.solver_steps) - 5 * flops(config, "decode", 0)


@pytest.mark.parametrize(("pattern", "seen"), [("attention", 257), ("sliding_window", 100)])
def test_a_token_that_is_decoded_looks_back_at_the_context_asked_for(pattern, seen):
    config = dataclasses.replace(POD, model=dataclasses.replace(POD.model, pattern=(pattern,), window=100))
    alone = dataclasses.replace(config, data=dataclasses.replace(config.data, length=2))
    looked_at = 2 * 2 * 4 * (32 + 32)  # FLOPs per token of the context: 2 layers, 4 heads, scores and values
    assert flops(config, "decode", 0) - flops(alone, "decode", 0) == looked_at * (seen - 3)


def test_what_is_sent_along_two_axes_at_once_is_counted_with_what_is_sent_along_each():
    shape = dict.fromkeys(MESH_AXES, 1) | {"data": 2, "fsdp": 2}
    least = least_bytes(POD, shape, num_parameters=1_000_000)
    sent = [
        Collective("all-gather", "fsdp", 1, least["fsdp"], 4),
        Collective("all-reduce", "data x fsdp", 1, 2 * sum(least.values()) - least["fsdp"], 4),
    ]
    rows = against_least(POD, compiled("train")._replace(collectives=sent), 1_000_000, shape)
    assert [row.split(", ")[1] for row in rows[:2]] == [f"{x} times the least of this mesh" for x in ("1.00", "0.00")]
    assert rows[2].endswith("GiB along data x fsdp at once, with those before 2.00 times the least")


@needs_libtpu
def test_a_mesh_whose_sizes_are_no_products_of_those_of_the_torus_is_laid_out_all_the_same():
    mesh = make_mesh(MeshConfig(fsdp=8, tensor=2), devices_of("v6e:4x4"))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 2} and len(set(mesh.devices.flat)) == 16


def run(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.aot", *options], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--topology", "v4:2x2"), "topology: 'v4:2x2' is no slice of TPUs; give one of "),
        (("--topology", "v5p"), "topology: 'v5p' is no slice of TPUs; give one of "),
    ],
)
def test_nonsense_is_refused_in_one_sentence(options, complaint):
    done = run("tiny", *options)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {complaint}")


@needs_libtpu
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--topology", "v5p:3x3x3"), "topology: v5p:3x3x3 cannot be had ("),
        (
            ("--topology", "v5e:2x2", "--mesh.fsdp", "3"),
            "mesh: data=1 x fsdp=3 x sequence=1 x tensor=1 needs 3 devices",
        ),
        (("--topology", "v5e:2x4", "--mesh.tensor", "8"), "mesh.tensor: 4 heads cannot be shared evenly by 8 devices"),
        (
            ("--topology", "v5e:2x2", "--mesh.sequence", "4", "--data.length", "30"),
            "data.length: 30 tokens cannot be shared evenly by mesh.sequence=4 devices",
        ),
        (("--topology", "v5e:2x2", "--prompts", "3"), "prompts: 3 cannot be shared evenly by 4 devices"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_is_compiled(options, complaint):
    done = run("tiny", *options)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"error: {complaint}")


@needs_libtpu
def test_a_run_is_compiled_for_a_pod_and_the_command_to_launch_it_printed():
    layout = ("--mesh.fsdp", "2", "--mesh.sequence", "2")
    done = run("tiny", "--topology", "v5e:2x2", "--prompts", "4", *layout, "--solver-steps=4", "--data.length", "64")
    assert not done.returncode, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "tiny on v5e:2x2: 4 x TPU v5 lite (fsdp 2, sequence 2)"
    assert [line.split(":")[0] for line in lines if ", compiled in" in line] == ["train", "prefill", "decode"]
    assert any("collective-permute sequence" in line for line in lines)
    handed = next(int(line.split()[-4].replace(",", "")) for line in lines if "collective-permute sequence" in line)
    states = 2 * 2 * 4 * 32 * 64 * 4 / 64  # bytes per token: there and back, 2 layers, 4 heads, one hop for 64 tokens
    assert states <= handed <= 1.3 * states
    assert [line.split()[6].rstrip(",") for line in lines if line.startswith("a step sends")] == ["fsdp", "sequence"]
    assert sum(line.startswith("  so a call takes at least") and "bound by" in line for line in lines) == 3
    assert lines[-1] == "python -m experiments.mesanet.pretrain tiny --mesh.fsdp 2 --mesh.sequence 2 --data.length 64"
    assert any(line.startswith("fits: train leaves 1") for line in lines)


def train_program(config: RunConfig, mesh: jax.sharding.Mesh) -> tuple[str, int]:
    """Returns the compiled training step, and the number of parameters."""
    programs = Programs.make(config, mesh)
    state = programs.state_shapes()
    with jax.set_mesh(mesh):
        program = programs.train.lower(state, programs.batch_shapes(config)).compile().as_text()
    return program, num_parameters(state.params)


def test_replicas_tell_each_other_of_a_gradient_once_however_many_micro_batches_it_took():
    config, mesh = dataclasses.replace(TINY, micro_batches=4), make_mesh(MeshConfig(data=2), jax.devices()[:2])
    program, parameters = train_program(config, mesh)
    sent = sum(c.total_bytes / mesh.size for c in read_collectives(program, mesh.shape))
    assert 1 <= sent / least_bytes(config, mesh.shape, parameters)["data"] <= 1.001  # losses and counts are sent, too


@pytest.mark.parametrize("axis", MESH_AXES)
def test_a_step_in_bfloat16_is_compiled_for_two_cpus_along_any_axis(axis):
    config = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, dtype="bfloat16"))
    assert train_program(config, make_mesh(MeshConfig(**{axis: 2}), jax.devices()[:2]))[0]


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "data", "fsdp", "most"),
    [
        ("v5e:2x2", 1, 4, 1.05),  # 1.16 with one more gather and one more sum
        ("v5e:2x2", 2, 2, 1.05),
        ("v5e:4x4", 1, 16, 1.1),  # 1.35 with one hop over all of the slice
    ],
)
def test_devices_gather_a_parameter_twice_a_step_and_sum_its_gradient_once(topology, data, fsdp, most):
    model = ("--model.dtype", "bfloat16", "--model.remat", "all_but_solutions", "--data.batch-size", "16")
    mesh = ("--mesh.data", str(data), "--mesh.fsdp", str(fsdp))
    done = run("tiny", "--topology", topology, "--prompts", "0", *mesh, *model)
    assert not done.returncode, done.stderr
    sent = [line.split() for line in done.stdout.splitlines() if line.startswith("a step sends")]
    assert [line[6].rstrip(",") for line in sent] == (["fsdp", "data"] if data > 1 else ["fsdp"])
    assert all(1 <= float(line[7]) <= most for line in sent)
