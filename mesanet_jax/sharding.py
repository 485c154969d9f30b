"""The one table from logical axes to mesh axes, and the operators wrapped for a mesh.

A mesh has the axes `data` (replicas), `fsdp` (replicas that share parameters), `sequence` (stretches of every sequence)
and `tensor` (heads and features). Models name logical axes only. Inside `with jax.set_mesh(mesh)` the operators split
themselves by batch, time and heads, because a compiler cannot split a kernel; without a mesh they run as they are.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
from mesanet_jax import convolution
from mesanet_jax.documents import first_document
from mesanet_jax.sequence_parallel import halo, of_last, state_before
from pallas_kernels import MesaState, SolveReport, mesa_summary
from pallas_kernels.mesa_chunk.contract import check_segment_ids, solver_dtype

MESH_AXES = ("data", "fsdp", "sequence", "tensor")

RULES = (
    ("batch", ("data", "fsdp")),
    ("time", "sequence"),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("gates", None),
    ("head", None),
    ("taps", None),
    ("layers", None),
)


def parameter_shardings(boxed_parameters, mesh: jax.sharding.Mesh):
    """Returns a NamedSharding for each parameter (or shape) from the logical axes that its box names.

    An axis that its mesh axes do not divide, such as a vocabulary of 50,257, stays whole.

    Raises:
      ValueError: the mesh has explicit axes.
    """
    _refuse_explicit(mesh)
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed_parameters), mesh, RULES)

    def fit(parameter, sharding: NamedSharding) -> NamedSharding:
        axes = (dividing(mesh, axis, size) for axis, size in zip(sharding.spec, parameter.shape, strict=False))
        return NamedSharding(mesh, P(*axes))

    return jax.tree.map(fit, nn.unbox(boxed_parameters), shardings)


def batch_sharding(mesh: jax.sharding.Mesh, leading_axes: int = 0) -> NamedSharding:
    """Returns the sharding of [..., b, t] arrays with some unsharded axes before the batch.

    Raises:
      ValueError: the mesh has explicit axes.
    """
    _refuse_explicit(mesh)
    return NamedSharding(mesh, P(*[None] * leading_axes, dict(RULES)["batch"]))


def lay_out(x: jax.Array, *axes: str | None, even: bool = True) -> jax.Array:
    """Returns x laid out over the mesh in use, if any.

    Args:
      x: any array inside a program.
      axes: a logical axis for each of its own; None stays whole.
      even: leave whole what the mesh does not divide; else devices at the end hold less.

    Raises:
      ValueError: the mesh has explicit axes.
    """
    mesh = mesh_in_use()
    if mesh.empty:
        return x
    rules = [dict(RULES).get(axis) for axis in axes]
    sizes = x.shape if even else [0] * x.ndim  # which everything divides
    spec = [dividing(mesh, rule, size) for rule, size in zip(rules, sizes, strict=True)]
    return jax.lax.with_sharding_constraint(x, P(*spec))


def whole_in_time(*arrays: jax.Array) -> list[jax.Array]:
    """Returns arrays [b, t, h, k] with all of time on every device, for mixers that do not split it."""
    return [lay_out(x, "batch", None, "heads", None) for x in arrays]


def parts_of_time(shape: tuple[int, int]) -> int:
    """Returns in how many parts the mesh cuts the time of tokens [b, t]."""
    mesh = mesh_in_use()
    return num_devices(mesh, batch_and_time(mesh, shape)[1])


def on_replicas(function, combine, params, batch):
    """Returns function(params, batch of arrays [a, b, ...]), done by every replica with its own rows, then combined.

    Inside, the axis `data` is not there: what is laid out, summed or gathered stays within a replica. A batch that
    `data` does not divide, or a mesh without replicas, is left to the function as it is.

    Args:
      function: (params, batch) -> a tree.
      combine: (tree of a replica, name of the axis) -> the tree of all, the same on each; say `jax.lax.psum`.
      params: the same for all replicas.
      batch: arrays whose second axis replicas share.
    """
    axis = dividing(mesh_in_use(), "data", jax.tree.leaves(batch)[0].shape[1])
    if axis is None:
        return function(params, batch)
    replica = jax.shard_map(
        lambda params, batch: combine(function(params, batch), axis),
        in_specs=(P(), P(None, axis)),
        out_specs=P(),
        axis_names={axis},
        check_vma=False,
    )
    return replica(params, batch)


def short_convolution(x, taps, history, segment_ids):
    """Runs `convolution.short_convolution`, the inputs before a stretch from the device that has them."""
    mesh = mesh_in_use()
    batch, time = batch_and_time(mesh, x.shape)
    if time is None or x.shape[1] < mesh.shape[time] * history.shape[1]:
        return convolution.short_convolution(x, taps, history, segment_ids)
    heads = dividing(mesh, dict(RULES)["heads"], x.shape[2])

    def stretch(x, taps, history, segment_ids):
        ids = None
        if segment_ids is not None:
            ids = halo(segment_ids, jnp.repeat(first_document(segment_ids), history.shape[1], axis=1), time)
        y, last = convolution.short_convolution(x, taps, halo(x, history, time), segment_ids, ids)
        return y, of_last(last, time)

    before, sequence = P(batch, None, heads, None), P(batch, time, heads, None)
    in_specs = (sequence, P(None, heads, None), before, None if segment_ids is None else P(batch, time))
    split = jax.shard_map(stretch, in_specs=in_specs, out_specs=(sequence, before), check_vma=False)
    return split(x, taps, history, segment_ids)


def mesa(q, k, v, log_decay, beta, ridge, state, *, segment_ids, solver, with_report, implementation=None):
    """Runs `pallas_kernels.mesa_chunk`, or `mesa_step` for a single token, split over the mesh in use, if any.

    Arguments and results are those of `mesa_chunk`.
    """
    choices = {"solver": solver, "with_report": with_report, "implementation": implementation}
    mesh = mesh_in_use()
    if segment_ids is not None:
        check_segment_ids("mesa", segment_ids, q.shape[:2])  # before devices tell each other of them
        if jnp.issubdtype(segment_ids.dtype, jnp.unsignedinteger):
            segment_ids = segment_ids.astype(jnp.int32)  # -1 is what none has
    batch, time = batch_and_time(mesh, q.shape)
    if q.shape[1] == 1 and segment_ids is None and state is not None:
        operator = functools.partial(_one_token, **choices)
    elif time is None:
        operator = functools.partial(_sequence, **choices)
    else:
        operator = functools.partial(_stretch, axis=time, **choices)
    if mesh.empty:
        return operator(q, k, v, log_decay, beta, ridge, state, segment_ids)
    heads = dividing(mesh, dict(RULES)["heads"], q.shape[2])
    sequence, gates = P(batch, time, heads, None), P(batch, time, heads)
    states = MesaState(P(batch, heads, None, None), P(batch, heads, None, None))
    out_specs = (sequence, states, SolveReport(gates, gates)) if with_report else (sequence, states)
    inputs = (sequence, sequence, sequence, gates, gates, P(heads, None))
    in_specs = (*inputs, None if state is None else states, None if segment_ids is None else P(batch, time))
    split = jax.shard_map(operator, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return split(q, k, v, log_decay, beta, ridge, state, segment_ids)


def _sequence(q, k, v, log_decay, beta, ridge, state, segment_ids, **choices):
    return pallas_kernels.mesa_chunk(q, k, v, log_decay, beta, ridge, state, segment_ids=segment_ids, **choices)


def _stretch(q, k, v, log_decay, beta, ridge, state, segment_ids, *, axis: str, **choices):
    dtype = solver_dtype(q, k, v, log_decay, beta, ridge)
    summary = mesa_summary(*(x.astype(dtype) for x in (k, v, log_decay, beta)), segment_ids=segment_ids)
    state = jax.tree.map(jnp.zeros_like, summary.added) if state is None else state
    state = state_before(summary, state, segment_ids, axis)
    out, final, *report = _sequence(q, k, v, log_decay, beta, ridge, state, segment_ids, **choices)
    return out, of_last(final, axis), *report


def _one_token(q, k, v, log_decay, beta, ridge, state, _, **choices):
    q, k, v, log_decay, beta = (x[:, 0] for x in (q, k, v, log_decay, beta))
    out, state, *report = pallas_kernels.mesa_step(q, k, v, log_decay, beta, ridge, state, **choices)
    return (out[:, None], state, *jax.tree.map(lambda x: x[:, None], report))


def mesh_in_use() -> jax.sharding.AbstractMesh:
    """Returns the mesh of `jax.set_mesh`, an empty one if there is none or all of it has been split by hand."""
    mesh = jax.sharding.get_abstract_mesh()
    _refuse_explicit(mesh)
    return mesh if set(mesh.axis_names) - set(mesh.manual_axes) else AbstractMesh((), ())


def _refuse_explicit(mesh) -> None:
    explicit = tuple(
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit
    )
    if explicit:
        raise ValueError(
            f"mesh: axes {explicit} are explicit, as jax.make_mesh makes them, but layouts here are the compiler's to "
            f"complete; pass it axis_types=(AxisType.Auto,) * {len(mesh.axis_names)}."
        )


def batch_and_time(mesh, shape: tuple[int, ...]):
    """The mesh axes of arrays [b, t, ...]."""
    return tuple(dividing(mesh, dict(RULES)[name], size) for name, size in zip(("batch", "time"), shape, strict=False))


def axis_names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """None, one or several mesh axes as a tuple."""
    return (axes,) if isinstance(axes, str) else axes or ()


def num_devices(mesh, axes: str | tuple[str, ...] | None) -> int:
    """How many devices these mesh axes have together."""
    return math.prod(mesh.shape[name] for name in axis_names(axes))


def dividing(mesh, axes: str | tuple[str, ...] | None, size: int) -> str | tuple[str, ...] | None:
    """Those of the axes that split anything here, or None where they do not divide the size (a batch of one, say)."""
    names = tuple(name for name in axis_names(axes) if mesh.shape.get(name, 1) > 1 and name not in mesh.manual_axes)
    if not names or size % math.prod(mesh.shape[name] for name in names):
        return None
    return names[0] if len(names) == 1 else names
