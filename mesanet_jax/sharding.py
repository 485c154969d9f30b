"""The one table from logical axes to mesh axes, and the operators wrapped for a mesh.

A mesh has the axes `data` (replicas), `fsdp` (replicas that share parameters) and `tensor` (heads and features). Models
name logical axes only. Inside `with jax.set_mesh(mesh)` the operators split themselves by batch and heads, because a
compiler cannot split a kernel; without a mesh they run as they are.
"""

import functools
import math

import jax
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels import MesaState, SolveReport

MESH_AXES = ("data", "fsdp", "tensor")

RULES = (
    ("batch", ("data", "fsdp")),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("head", None),
    ("taps", None),
    ("layers", None),
)


def parameter_shardings(boxed_parameters, mesh: jax.sharding.Mesh):
    """Returns a NamedSharding for each parameter (or shape) from the logical axes that its box names.

    An axis that its mesh axes do not divide, such as a vocabulary of 50,257, stays whole.
    """
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed_parameters), mesh, RULES)

    def fit(parameter, sharding: NamedSharding) -> NamedSharding:
        axes = (_dividing(mesh, axis, size) for axis, size in zip(sharding.spec, parameter.shape, strict=False))
        return NamedSharding(mesh, P(*axes))

    return jax.tree.map(fit, nn.unbox(boxed_parameters), shardings)


def batch_sharding(mesh: jax.sharding.Mesh, leading_axes: int = 0) -> NamedSharding:
    """Returns the sharding of [..., b, t] arrays with some unsharded axes before the batch."""
    return NamedSharding(mesh, P(*[None] * leading_axes, dict(RULES)["batch"]))


def mesa(q, k, v, log_decay, beta, ridge, state, *, segment_ids, solver, with_report, implementation=None):
    """Runs `pallas_kernels.mesa_chunk`, or `mesa_step` for a single token, split over the mesh in use, if any.

    Arguments and results are those of `mesa_chunk`.
    """
    choices = {"solver": solver, "with_report": with_report, "implementation": implementation}
    if q.shape[1] == 1 and segment_ids is None and state is not None:
        operator = functools.partial(_one_token, **choices)
    else:
        operator = functools.partial(_sequence, **choices)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return operator(q, k, v, log_decay, beta, ridge, state, segment_ids)
    batch = _dividing(mesh, dict(RULES)["batch"], q.shape[0])
    heads = _dividing(mesh, dict(RULES)["heads"], q.shape[2])
    sequence, gates = P(batch, None, heads, None), P(batch, None, heads)
    states = MesaState(P(batch, heads, None, None), P(batch, heads, None, None))
    out_specs = (sequence, states, SolveReport(gates, gates)) if with_report else (sequence, states)
    inputs = (sequence, sequence, sequence, gates, gates, P(heads, None))
    in_specs = (*inputs, None if state is None else states, None if segment_ids is None else P(batch, None))
    split = jax.shard_map(operator, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return split(q, k, v, log_decay, beta, ridge, state, segment_ids)


def _sequence(q, k, v, log_decay, beta, ridge, state, segment_ids, **choices):
    return pallas_kernels.mesa_chunk(q, k, v, log_decay, beta, ridge, state, segment_ids=segment_ids, **choices)


def _one_token(q, k, v, log_decay, beta, ridge, state, _, **choices):
    q, k, v, log_decay, beta = (x[:, 0] for x in (q, k, v, log_decay, beta))
    out, state, *report = pallas_kernels.mesa_step(q, k, v, log_decay, beta, ridge, state, **choices)
    return (out[:, None], state, *jax.tree.map(lambda x: x[:, None], report))


def _dividing(mesh, axes: str | tuple[str, ...] | None, size: int) -> str | tuple[str, ...] | None:
    """The mesh axes, or None where they do not divide the size (a batch of one while decoding, say)."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return axes if size % math.prod(mesh.shape[name] for name in names) == 0 else None
