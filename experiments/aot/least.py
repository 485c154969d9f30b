"""What the devices of a mesh have to send each other in a training step, whatever the compiler does."""

import math
from collections.abc import Mapping

import jax.numpy as jnp

from experiments.runs import RunConfig


def least_bytes(config: RunConfig, mesh_shape: Mapping[str, int], num_parameters: int) -> dict[str, float]:
    """Returns bytes that a device sends along each axis of the mesh, in rings, in one step.

    tensor: sums of the activations, forward after each mixer and each feed-forward layer, backward before them, after
    the embedding and before the read-out; with remat the mixer's once more.
    fsdp: every parameter gathered forward and backward, and its gradient summed, in the type of the activations.
    data: the gradients once, in float32.
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
    gradients = 4 * of_tensor / sizes["fsdp"]
    state = 4 * model.key_dim * (model.key_dim + model.value_dim)
    reach = 2 * (model.conv_width - 1) * model.key_dim * item
    handed = model.num_layers * rows * heads * (state + reach) * (2 + remat)
    ring = {axis: (size - 1) / size for axis, size in sizes.items()}
    least = {
        "tensor": 2 * ring["tensor"] * sums * activations,
        "fsdp": 3 * ring["fsdp"] * of_tensor * item * config.micro_batches,
        "data": 2 * ring["data"] * gradients,
        "sequence": ring["sequence"] * (handed + 2 * gradients),
    }
    if set(model.pattern) != {"mesa"}:
        least["sequence"] = math.nan
    return {axis: size for axis, size in least.items() if sizes[axis] > 1}
