"""Parameters that the devices of a mesh share: products with them, rows looked up in them, and their gradients.

Without a mesh these are plain products and look-ups.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from mesanet_jax import sharding
from pallas_kernels import dispatch


def product(x: jax.Array, kernel: jax.Array, *axes: str) -> jax.Array:
    """Returns the products [b, t, *out], in the type of x, of x [b, t, *in] with a parameter [*in, *out].

    On TPUs, devices that share the parameter and the batch gather it by name, or else the backward pass may gather it
    twice, and its gradient is scattered by hand; such a product has no derivatives in forward mode.

    Args:
      x: activations.
      kernel: the parameter.
      axes: its logical axes, "embed" the first or the last of them.
    """
    kernel, mesh = kernel.astype(x.dtype), sharding.mesh_in_use()
    batch, time = sharding.batch_and_time(mesh, x.shape)
    embed = sharding.dividing(mesh, dict(sharding.RULES)["embed"], kernel.shape[axes.index("embed")])
    if embed in sharding.axis_names(batch) and dispatch.platform() == "tpu":
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
    mesh, embed = sharding.mesh_in_use(), dict(sharding.RULES)["embed"]
    batch, time = sharding.batch_and_time(mesh, stream.shape)
    rules = [dict(sharding.RULES)[axis] for axis in axes]
    features = [sharding.dividing(mesh, rule, size) for rule, size in zip(rules, inner.shape[2:], strict=True)]
    others = [name for name in sharding.axis_names(batch) + sharding.axis_names(time) if name != embed]

    def own(stream, inner):
        rows = jax.lax.dot_general(stream, inner, (((0, 1), (0, 1)), ((), ())))
        for groups in _hops(mesh.shape[embed]):
            rows = jax.lax.psum_scatter(rows, embed, tiled=True, axis_index_groups=groups)
        return jax.lax.psum(rows, others)

    # by hand along the features too: left to the compiler, they would be gathered before
    by_hand = {embed, *others, *(name for feature in features for name in sharding.axis_names(feature))}
    specs = {"in_specs": (P(batch, time), P(batch, time, *features)), "out_specs": P(embed, *features)}
    return jax.shard_map(own, **specs, axis_names=by_hand, check_vma=False)(stream, inner)


def _whole(kernel: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns the parameter with all of "embed" on every device."""
    return sharding.lay_out(kernel, *(None if axis == "embed" else axis for axis in axes))


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
    mesh = sharding.mesh_in_use()
    batch, time = sharding.batch_and_time(mesh, shape)
    if batch is None and time is None:
        return sharding.lay_out(table, "vocab", None, even=False)
    table = sharding.lay_out(table, "vocab", "embed", even=False)
    embed = sharding.dividing(mesh, dict(sharding.RULES)["embed"], table.shape[1])
    if embed is None or _split_vocab(mesh) or dispatch.platform() != "tpu":
        num_parts = (sharding.num_devices(mesh, axes) for axes in (batch, time))
        parts = jnp.broadcast_to(table, (*num_parts, *table.shape))
    else:
        parts = _gathered_by_hand(table, batch, time, embed)
    return sharding.lay_out(parts, "batch", "time", "vocab", None, even=False)


def _gathered_by_hand(table: jax.Array, batch, time, embed: str) -> jax.Array:
    """[y, d / n] -> [1, 1, y, d] on each device. The gradient is scattered in hops, with d first in memory.

    Along the last axis, compilers for TPUs sum a whole gradient on every device, which sends twice as much.
    """
    hops = _hops(sharding.num_devices(sharding.mesh_in_use(), embed))

    def own(share):
        whole = share.T
        for groups in reversed(hops):  # the gradient goes the other way
            whole = jax.lax.all_gather(whole, embed, tiled=True, axis_index_groups=groups)
        return with_layout_constraint(whole, Layout((0, 1))).T[None, None]

    axes = {*sharding.axis_names(batch), *sharding.axis_names(time), embed}
    gather = jax.shard_map(own, in_specs=P(None, embed), out_specs=P(batch, time), axis_names=axes, check_vma=False)
    return gather(table)


def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the rows [b, t, d] of a `spread` table for tokens [b, t]; NaN for a token that it has no row for.

    Each device looks into the rows that it holds, and zeros stand for all others. XLA's partitioner aborts where it is
    to split this over a vocabulary inside `on_replicas`, or brings the whole table everywhere.
    """
    if table.ndim == 2:
        return jnp.take(table, tokens, axis=0)
    mesh = sharding.mesh_in_use()
    (batch, time), vocab, num_rows = sharding.batch_and_time(mesh, tokens.shape), _split_vocab(mesh), table.shape[2]
    table = jnp.pad(table, ((0, 0), (0, 0), (0, -num_rows % sharding.num_devices(mesh, vocab)), (0, 0)))

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
        axis_names={*sharding.axis_names(batch), *sharding.axis_names(time), *sharding.axis_names(vocab)},
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


def _split_vocab(mesh) -> str | tuple[str, ...] | None:
    """The mesh axes of vocabularies, which they split evenly or not; None if they are whole."""
    return sharding.dividing(mesh, dict(sharding.RULES)["vocab"], 0)
