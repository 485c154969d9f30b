"""The one table from logical axes to mesh axes, and the operators wrapped for a mesh.

A mesh has the axes `data` (replicas), `fsdp` (replicas that share parameters), `sequence` (stretches of every sequence)
and `tensor` (heads and features). Models name logical axes only. Inside `with jax.set_mesh(mesh)` the operators split
themselves by batch, time and heads, because a compiler cannot split a kernel; without a mesh they run as they are.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
from mesanet_jax import convolution
from mesanet_jax.documents import first_document
from mesanet_jax.sequence_parallel import halo, of_last, state_before
from pallas_kernels import MesaState, SolveReport, dispatch, mesa_summary
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
        axes = (_dividing(mesh, axis, size) for axis, size in zip(sharding.spec, parameter.shape, strict=False))
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
    mesh = _mesh_in_use()
    if mesh.empty:
        return x
    rules = [dict(RULES).get(axis) for axis in axes]
    sizes = x.shape if even else [0] * x.ndim  # which everything divides
    spec = [_dividing(mesh, rule, size) for rule, size in zip(rules, sizes, strict=True)]
    return jax.lax.with_sharding_constraint(x, P(*spec))


def whole_in_time(*arrays: jax.Array) -> list[jax.Array]:
    """Returns arrays [b, t, h, k] with all of time on every device, for mixers that do not split it."""
    return [lay_out(x, "batch", None, "heads", None) for x in arrays]


def parts_of_time(shape: tuple[int, int]) -> int:
    """Returns in how many parts the mesh cuts the time of tokens [b, t]."""
    mesh = _mesh_in_use()
    return _size(mesh, _batch_and_time(mesh, shape)[1])


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
    axis = _dividing(_mesh_in_use(), "data", jax.tree.leaves(batch)[0].shape[1])
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


def product(x: jax.Array, kernel: jax.Array, *axes: str) -> jax.Array:
    """Returns the products [b, t, *out], in the type of x, of x [b, t, *in] with a parameter [*in, *out].

    On TPUs, devices that share the parameter and the batch gather it by name, or else the backward pass may gather it
    twice, and its gradient is scattered by hand; such a product has no derivatives in forward mode.

    Args:
      x: activations.
      kernel: the parameter.
      axes: its logical axes, "embed" the first or the last of them.
    """
    kernel, mesh = kernel.astype(x.dtype), _mesh_in_use()
    batch, time = _batch_and_time(mesh, x.shape)
    embed = _dividing(mesh, dict(RULES)["embed"], kernel.shape[axes.index("embed")])
    if embed in _names(batch) and dispatch.platform() == "tpu":
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
        return _scattered_product(x, kernel, axes, precision)
    num_in = _num_in(axes)
    if time is not None:
        return jnp.tensordot(x, kernel, num_in)
    # on CPUs gradients of products with one row axis run twice as fast
    rows = jnp.tensordot(x.reshape(-1, *kernel.shape[:num_in]), kernel, num_in)
    return rows.reshape(*x.shape[:-num_in], *rows.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _scattered_product(x, kernel, axes, precision):
    del precision  # that in use
    return jnp.tensordot(x, _whole(kernel, axes), _num_in(axes))


def _product_forward(x, kernel, axes, precision):
    return _scattered_product(x, kernel, axes, precision), (x, kernel)  # not the whole kernel, which is gathered anew


def _product_backward(axes, precision, residuals, g):
    x, kernel = residuals
    out = tuple(range(2, g.ndim)), tuple(range(_num_in(axes), kernel.ndim))
    with jax.default_matmul_precision(precision):
        of_x = jnp.tensordot(g, _whole(kernel, axes), out)
        if axes[0] == "embed":
            return of_x, _scattered_sum(x, g, axes[1:])
        return of_x, jnp.moveaxis(_scattered_sum(g, x, axes[:-1]), 0, -1)


_scattered_product.defvjp(_product_forward, _product_backward)


def _scattered_sum(stream: jax.Array, inner: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns the products [d, *inner] of a residual stream [b, t, d] with [b, t, *inner], summed over all tokens.

    A device sums over the tokens that it has, and leaves each other the rows of d that are that one's.

    Args:
      stream: activations, or a gradient by them.
      inner: the same of heads or features.
      axes: the logical axes of *inner.
    """
    mesh, embed = _mesh_in_use(), dict(RULES)["embed"]
    batch, time = _batch_and_time(mesh, stream.shape)
    features = [_dividing(mesh, dict(RULES)[axis], size) for axis, size in zip(axes, inner.shape[2:], strict=True)]
    others = [name for name in _names(batch) + _names(time) if name != embed]

    def own(stream, inner):
        rows = jax.lax.dot_general(stream, inner, (((0, 1), (0, 1)), ((), ())))
        for groups in _hops(mesh.shape[embed]):
            rows = jax.lax.psum_scatter(rows, embed, tiled=True, axis_index_groups=groups)
        return jax.lax.psum(rows, others)

    # by hand along the features too: left to the compiler, they would be gathered before
    by_hand = {embed, *others, *(name for feature in features for name in _names(feature))}
    specs = {"in_specs": (P(batch, time), P(batch, time, *features)), "out_specs": P(embed, *features)}
    return jax.shard_map(own, **specs, axis_names=by_hand, check_vma=False)(stream, inner)


def _whole(kernel: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns the parameter with all of "embed" on every device."""
    return lay_out(kernel, *(None if axis == "embed" else axis for axis in axes))


def _num_in(axes: tuple[str, ...]) -> int:
    """Returns how many axes of a parameter with these logical axes are summed over in a product."""
    return axes.index("embed") or 1


def _hops(size: int) -> list[list[list[int]] | None]:
    """Returns the groups of devices along an axis that scatter a sum among each other, in their order.

    Few devices do it in one hop, all together (None). Many do it in two: first devices that are far apart, then
    neighbours. In one hop over all of a slice, or to a few rows for each device, compilers for TPUs sum everything on
    every device; the same over more than 64.
    """
    if size < 16:
        return [None]
    neighbours = next(n for n in range(max(4, -(-size // 64)), size + 1) if size % n == 0)
    if neighbours == size:
        return [None]
    index = np.arange(size).reshape(-1, neighbours)
    return [index.T.tolist(), index.tolist()]


def spread(table: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Returns a table [y, d] once for every part that the mesh makes of tokens [b, t]: [r, s, y, d], d whole on each.

    What the uses of a part's table find for its gradient is added up where the part lies, and all parts are summed
    once. Of a table that is only gathered, every use sums a whole gradient over the devices by itself: the embedding
    and the read-out tied to it, twice. One part takes the table as it is, [y, d].
    """
    mesh = _mesh_in_use()
    batch, time = _batch_and_time(mesh, shape)
    if batch is None and time is None:
        return lay_out(table, "vocab", None, even=False)
    table = lay_out(table, "vocab", "embed", even=False)
    embed = _dividing(mesh, dict(RULES)["embed"], table.shape[1])
    if embed is None or _split_vocab(mesh) or dispatch.platform() != "tpu":
        parts = jnp.broadcast_to(table, (_size(mesh, batch), _size(mesh, time), *table.shape))
    else:
        parts = _gathered_by_hand(table, batch, time, embed)
    return lay_out(parts, "batch", "time", "vocab", None, even=False)


def _gathered_by_hand(table: jax.Array, batch, time, embed: str) -> jax.Array:
    """[y, d / n] -> [1, 1, y, d] on each device. The gradient is scattered in hops, with d first in memory.

    Along the last axis, compilers for TPUs sum a whole gradient on every device, which sends twice as much.
    """

    def own(share):
        whole = share.T
        for groups in reversed(_hops(_size(_mesh_in_use(), embed))):  # whose gradient goes the other way
            whole = jax.lax.all_gather(whole, embed, tiled=True, axis_index_groups=groups)
        return with_layout_constraint(whole, Layout((0, 1))).T[None, None]

    axes = {*_names(batch), *_names(time), embed}
    gather = jax.shard_map(own, in_specs=P(None, embed), out_specs=P(batch, time), axis_names=axes, check_vma=False)
    return gather(table)


def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the rows [b, t, d] of a `spread` table for tokens [b, t]; NaN for a token that it has no row for.

    Each device looks into the rows that it holds, and zeros stand for all others. XLA's partitioner aborts where it is
    to split this over a vocabulary inside `on_replicas`, or brings the whole table everywhere.
    """
    if table.ndim == 2:
        return jnp.take(table, tokens, axis=0)
    mesh = _mesh_in_use()
    (batch, time), vocab, num_rows = _batch_and_time(mesh, tokens.shape), _split_vocab(mesh), table.shape[2]
    table = jnp.pad(table, ((0, 0), (0, 0), (0, -num_rows % _size(mesh, vocab)), (0, 0)))

    def here(table, tokens):
        """[1, 1, y / n, d], [b, t] -> [1, b, t, d]."""
        own = table[0, 0]
        row = tokens if vocab is None else tokens - jax.lax.axis_index(vocab) * len(own)
        has = (row >= 0) & (row < len(own))
        return jnp.where(has[..., None], jnp.take(own, row, axis=0, mode="clip"), 0)[None]

    look = jax.shard_map(
        here,
        in_specs=(P(batch, time, vocab), P(batch, time)),
        out_specs=P(vocab, batch, time),
        axis_names={*_names(batch), *_names(time), *_names(vocab)},
        check_vma=False,
    )
    tokens = tokens.astype(jnp.int32)
    tokens = jnp.where(tokens < 0, tokens + num_rows, tokens)  # from the end, as in `jnp.take`
    known = (tokens >= 0) & (tokens < num_rows)
    return jnp.where(known[..., None], look(table, tokens).sum(0), jnp.nan)


def read_out(x: jax.Array, table: jax.Array) -> jax.Array:
    """Returns the products [b, t, y], in float32, of x [b, t, d] with the rows of a `spread` table."""
    if table.ndim == 2:
        return jnp.einsum("btd,yd->bty", x, table, preferred_element_type=jnp.float32)
    products = jnp.einsum("rbstd,rsyd->rbsty", _in_parts(x, table), table, preferred_element_type=jnp.float32)
    return _joined(products)


def _in_parts(x: jax.Array, table: jax.Array) -> jax.Array:
    """[b, t, ...] -> [r, b / r, s, t / s, ...] for a table [r, s, y, d]."""
    rows, stretches = table.shape[:2]
    return x.reshape(rows, -1, stretches, x.shape[1] // stretches, *x.shape[2:])


def _joined(x: jax.Array) -> jax.Array:
    """[r, b / r, s, t / s, y] -> [b, t, y]."""
    return x.reshape(x.shape[0] * x.shape[1], -1, x.shape[4])


def short_convolution(x, taps, history, segment_ids):
    """Runs `convolution.short_convolution`, the inputs before a stretch from the device that has them."""
    mesh = _mesh_in_use()
    batch, time = _batch_and_time(mesh, x.shape)
    if time is None or x.shape[1] < mesh.shape[time] * history.shape[1]:
        return convolution.short_convolution(x, taps, history, segment_ids)
    heads = _dividing(mesh, dict(RULES)["heads"], x.shape[2])

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
    mesh = _mesh_in_use()
    if segment_ids is not None:
        check_segment_ids("mesa", segment_ids, q.shape[:2])  # before devices tell each other of them
        if jnp.issubdtype(segment_ids.dtype, jnp.unsignedinteger):
            segment_ids = segment_ids.astype(jnp.int32)  # -1 is what none has
    batch, time = _batch_and_time(mesh, q.shape)
    if q.shape[1] == 1 and segment_ids is None and state is not None:
        operator = functools.partial(_one_token, **choices)
    elif time is None:
        operator = functools.partial(_sequence, **choices)
    else:
        operator = functools.partial(_stretch, axis=time, **choices)
    if mesh.empty:
        return operator(q, k, v, log_decay, beta, ridge, state, segment_ids)
    heads = _dividing(mesh, dict(RULES)["heads"], q.shape[2])
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


def _mesh_in_use() -> jax.sharding.AbstractMesh:
    """Returns the mesh of `jax.set_mesh`, an empty one if there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    _refuse_explicit(mesh)
    return mesh


def _refuse_explicit(mesh) -> None:
    explicit = tuple(
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit
    )
    if explicit:
        raise ValueError(
            f"mesh: axes {explicit} are explicit, as jax.make_mesh makes them, but layouts here are the compiler's to "
            f"complete; pass it axis_types=(AxisType.Auto,) * {len(mesh.axis_names)}."
        )


def _split_vocab(mesh) -> str | tuple[str, ...] | None:
    """The mesh axes of vocabularies, which they split evenly or not; None if they are whole."""
    return _dividing(mesh, dict(RULES)["vocab"], 0)


def _batch_and_time(mesh, shape: tuple[int, ...]):
    """The mesh axes of arrays [b, t, ...]."""
    return tuple(_dividing(mesh, dict(RULES)[name], size) for name, size in zip(("batch", "time"), shape, strict=False))


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def _size(mesh, axes: str | tuple[str, ...] | None) -> int:
    """How many devices these mesh axes have together."""
    return math.prod(mesh.shape[name] for name in _names(axes))


def _dividing(mesh, axes: str | tuple[str, ...] | None, size: int) -> str | tuple[str, ...] | None:
    """Those of the axes that split anything here, or None where they do not divide the size (a batch of one, say)."""
    names = tuple(name for name in _names(axes) if mesh.shape.get(name, 1) > 1 and name not in mesh.manual_axes)
    if not names or size % math.prod(mesh.shape[name] for name in names):
        return None
    return names[0] if len(names) == 1 else names
