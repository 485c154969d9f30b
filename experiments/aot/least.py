"""What the devices of a mesh have to send each other in a training step when they share its work as here.

A device multiplies its own rows with whole parameters, or with those of its heads and features; whole they are held
while a layer runs and no longer, which is what fsdp is for, and the embedding alone for as long as a micro-batch takes.
To gather or to reduce-scatter x bytes among n, each sends x (n - 1) / n, and no algorithm gets by with less from every
device; to sum x bytes for all of them is the one after the other, twice that (Patarasuk and Yuan, 2009).
"""

import math
from collections.abc import Mapping

import jax.numpy as jnp

from experiments.runs import RunConfig


def least_bytes(config: RunConfig, mesh_shape: Mapping[str, int], num_parameters: int) -> dict[str, float]:
    """Returns bytes that a device sends along each axis of the mesh, in rings, in one step.

    tensor: sums of the activations, forward after each mixer and each feed-forward layer, backward before them, after
    the embedding and before the read-out; with remat the mixer's once more, which the feed-forward layer reads.
    fsdp: every parameter gathered forward and backward, and its gradient summed straight to who holds it, in the type
    of the activations and for every micro-batch. The embedding is gathered once, and both of its gradients are one sum.
    data: the gradients once, as they are computed or, of several micro-batches, as they were added up in float32.
    sequence: a state per head from device to device in every mesa layer, forward, backward and where it is computed
    again; the inputs that convolutions reach back to; the gradients once. None where other mixers share time.
    """
    model, sizes = config.model, dict(mesh_shape)
    item, remat = jnp.dtype(model.dtype).itemsize, int(model.remat != "nothing")
    rows = config.data.batch_size / (sizes["data"] * sizes["fsdp"])  # of all micro-batches
    heads = model.num_heads / sizes["tensor"]
    sums = model.num_layers * (4 + remat) + 2
    activations = rows * config.data.length / sizes["sequence"] * model.model_dim * item
    of_tensor = num_parameters / sizes["tensor"]
    embedding = model.vocab_size * model.model_dim / sizes["tensor"]
    gradients = min(4, item * config.micro_batches) * of_tensor / sizes["fsdp"]
    state = 4 * model.key_dim * (model.key_dim + model.value_dim)
    reach = 2 * (model.conv_width - 1) * model.key_dim * item
    handed = model.num_layers * rows * heads * (state + reach) * (2 + remat)
    ring = {axis: (size - 1) / size for axis, size in sizes.items()}
    least = {
        "tensor": 2 * ring["tensor"] * sums * activations,
        "fsdp": ring["fsdp"] * (3 * of_tensor - embedding) * item * config.micro_batches,
        "data": 2 * ring["data"] * gradients,
        "sequence": ring["sequence"] * (handed + 2 * gradients),
    }
    if set(model.pattern) != {"mesa"}:
        least["sequence"] = math.nan
    return {axis: size for axis, size in least.items() if sizes[axis] > 1}
