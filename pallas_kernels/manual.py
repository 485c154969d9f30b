"""Inside `jax.shard_map`: along which axes of the mesh values vary from device to device.

JAX keeps track unless told not to (check_vma=False), and wants loops to carry what they begin with.
"""

import jax
import jax.numpy as jnp


def vary_alike(tree):
    """Returns the arrays of a tree, each varying along all axes of a mesh along which any of them does.

    Differentiated, what was the same on all devices gets the sum over them.
    """
    axes = frozenset[str]().union(*(_varying(x) for x in jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(axes - _varying(x)), to="varying"), tree) if axes else tree


def result_like(x: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """Returns what a kernel is to be told of a result that varies as its argument x does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def _varying(x) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
