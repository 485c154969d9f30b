"""What the layers need of each other's tokens under a mesh axis that splits time: a stretch of them on each device.

All functions run under `jax.shard_map` over that axis. A stretch maps the Mesa state before it linearly to the state
after it, so all that a device needs to know of the tokens before its own is one state. It is handed from device to
device, and every device solves its own tokens. A convolution needs the last inputs of the device before.
"""

import jax
import jax.numpy as jnp

from mesanet_jax.documents import first_document, last_document
from mesanet_jax.shapes import SegmentIds
from pallas_kernels import MesaState, MesaSummary


def state_before(summary: MesaSummary, state: MesaState, segment_ids: SegmentIds | None, axis: str) -> MesaState:
    """Returns the state before this device's stretch.

    Every device but the first receives one state, the least that any scheme can do with, one device after the other. At
    size 128 a state weighs as much as queries, keys and values of 170 tokens in bfloat16: stretches should be longer.

    Args:
      summary: of this device's stretch.
      state: what came before the whole sequence, on every device; the first document's.
      segment_ids: of this stretch, [b, t], not decreasing from device to device either; None is one document.
      axis: the mesh axis that splits time.
    """
    here = jax.lax.axis_index(axis)
    goes_on = None if segment_ids is None else _document_goes_on(segment_ids, axis)

    def entering(state: MesaState) -> MesaState:
        return state if goes_on is None else _where(goes_on[:, None, None, None], state, 0)

    for sender in range(jax.lax.axis_size(axis) - 1):
        received = jax.lax.ppermute(summary.after(entering(state)), axis, [(sender, sender + 1)])
        state = _where(here == sender + 1, received, state)
    return entering(state)


def of_last(tree, axis: str):
    """Returns on every device the arrays of the last one."""
    last = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
    return jax.lax.psum(jax.tree.map(lambda x: jnp.where(last, x, 0), tree), axis)


def halo(x: jax.Array, first: jax.Array, axis: str) -> jax.Array:
    """Returns the last inputs of the device before, as many as `first` [b, w, ...] has, which the first device gets."""
    width, num_devices = first.shape[1], jax.lax.axis_size(axis)
    links = [(i, i + 1) for i in range(num_devices - 1)]
    received = jax.lax.ppermute(x[:, x.shape[1] - width :], axis, links)
    return jnp.where(jax.lax.axis_index(axis) == 0, first, received)


def _document_goes_on(segment_ids: jax.Array, axis: str) -> jax.Array:
    """Returns [b] bool: whether this stretch begins in the document that the devices before it end with.

    True as well where either side holds nothing but padding: the state passes through that.
    """
    first, last = first_document(segment_ids)[:, 0], last_document(segment_ids)[:, 0]
    everywhere = jax.lax.all_gather(last, axis)
    earlier = (jnp.arange(len(everywhere)) < jax.lax.axis_index(axis))[:, None]
    before = jnp.max(jnp.where(earlier, everywhere, -1), axis=0)
    return (before < 0) | (last < 0) | (first == before)


def _where(condition: jax.Array, state: MesaState, otherwise) -> MesaState:
    others = otherwise if isinstance(otherwise, MesaState) else MesaState(otherwise, otherwise)
    return MesaState(*(jnp.where(condition, x, y) for x, y in zip(state, others, strict=True)))
