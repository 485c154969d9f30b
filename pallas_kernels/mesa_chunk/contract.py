"""What goes in and what comes out, shared by `mesa_chunk` and `mesa_step`.

Axis letters: `b` batch, `t` time, `h` heads, `k` key, `v` value; inside a tile `n` chunks, `c` place in the chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

# exp(-80) is 2e-35: nothing of the past is left in float32, while sums over a chunk stay finite even for a gate of 0.
LOWEST_LOG_DECAY = -80.0


class MesaState(NamedTuple):
    """All that a head remembers: the key Gram matrix H_t and the key-value memory G_t (arXiv 2506.05233, section 2).

    `kk` is symmetric positive semi-definite. Both are float32 (float64 for float64 inputs), whatever the inputs are.
    """

    kk: Float[Array, "b h k k"]
    kv: Float[Array, "b h k v"]

    def astype(self, dtype) -> "MesaState":
        """Returns the state in another dtype."""
        return MesaState(self.kk.astype(dtype), self.kv.astype(dtype))


class SolveReport(NamedTuple):
    """How well each token was solved: steps taken, and the true ||q - A x|| / ||q|| computed after the last one."""

    num_steps: Int[Array, "b *t h"]
    residual: Float[Array, "b *t h"]


def solver_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Returns the type that states and solver use: float32, or float64 if an input is float64."""
    return jnp.result_type(jnp.float32, *arrays)


def check_inputs(operator: str, q, k, v, log_decay, beta, ridge, state, *, time_axis: bool) -> None:
    """Raises one sentence that names the offending argument.

    Raises:
      TypeError: an argument is not of a floating-point type.
      ValueError: a rank or an axis does not fit, or ridge is not positive where its values are known.
    """
    named = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta, "ridge": ridge}
    if state is not None:
        if not isinstance(state, MesaState):
            raise TypeError(f"{operator}: state is a {type(state).__name__}; pass a MesaState.")
        named |= {"state.kk": state.kk, "state.kv": state.kv}
    check_sequences(operator, named, first="q", time_axis=time_axis)
    _check_ridge(operator, ridge)
    if state is not None:
        heads = (q.shape[0], *q.shape[-2:])
        for name, shape in {"state.kk": (*heads, q.shape[-1]), "state.kv": (*heads, v.shape[-1])}.items():
            if named[name].shape != shape:
                raise ValueError(f"{operator}: {name} has shape {named[name].shape}; it must be {shape}.")


def check_sequences(operator: str, named: dict, *, first: str, time_axis: bool) -> None:
    """Raises the sentences of `check_inputs` for some of its arguments, `v` among them; `first` has the shape of keys.

    Raises:
      TypeError: an argument is not of a floating-point type.
      ValueError: a rank or an axis does not fit that of the first.
    """
    _check_floating(operator, named)
    keys, v = named[first].shape, named["v"].shape
    gates = keys[:-1]
    layout = "[b, t, h, k]" if time_axis else "[b, h, k]"
    rank = 4 if time_axis else 3
    if len(keys) != rank:
        raise ValueError(f"{operator}: {first} has shape {keys}; it must be {layout}.")
    if 0 in keys or 0 in v:
        raise ValueError(f"{operator}: {first} of shape {keys} and v of shape {v} must have no empty axis.")
    expected = {"k": keys, "log_decay": gates, "beta": gates, "ridge": keys[-2:]}
    for name, shape in expected.items():
        if name in named and named[name].shape != shape:
            raise ValueError(
                f"{operator}: {name} has shape {named[name].shape}; with {first} of shape {keys} it must be {shape}."
            )
    if len(v) != rank or v[:-1] != gates:
        raise ValueError(
            f"{operator}: v has shape {v}; with {first} of shape {keys} it must be {gates} and one axis of any size."
        )


def _check_ridge(operator: str, ridge) -> None:
    """A system that is not positive definite has no solve, and the zeros it leaves look like an answer."""
    if (values := _known(ridge)) is None:
        return
    wrong = ~(values.astype(np.float64) > 0)  # of smaller types numpy warns when it compares NaN
    if wrong.any():
        raise ValueError(f"{operator}: ridge has {values[wrong][0]}; every entry must be positive.")


def _known(array) -> np.ndarray | None:
    """Returns the values, or None: under jit only shapes are known, of an array across hosts only a part."""
    known = not isinstance(array, Tracer) and getattr(array, "is_fully_addressable", True)
    return np.asarray(array) if known else None


def _check_floating(operator: str, named: dict) -> None:
    for name, array in named.items():
        check_array(operator, name, array)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{operator}: {name} has dtype {array.dtype}; pass a floating-point array.")


def check_array(operator: str, name: str, array) -> None:
    """Raises TypeError if it is no array, a list for example."""
    if not hasattr(array, "dtype"):
        raise TypeError(f"{operator}: {name} is a {type(array).__name__}; pass an array.")


def check_segment_ids(operator: str, segment_ids, shape: tuple[int, ...]) -> None:
    """Raises if segment_ids are not integers of the shape [b, t] or, where their values are known, decrease.

    Raises:
      TypeError: segment_ids are not integers.
      ValueError: their shape is wrong, or an id is smaller than one before it in the same row.
    """
    check_array(operator, "segment_ids", segment_ids)
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(f"{operator}: segment_ids have dtype {segment_ids.dtype}; pass integers.")
    if segment_ids.shape != shape:
        raise ValueError(f"{operator}: segment_ids have shape {segment_ids.shape}; they must be [b, t] = {shape}.")
    if (values := _known(segment_ids)) is None:
        return
    for row, ids in enumerate(values):
        ids = ids[ids >= 0]
        if (np.diff(ids) < 0).any():
            raise ValueError(
                f"{operator}: segment_ids of row {row} decrease; number the documents of a row in their order."
            )


def zero_state(q: jax.Array, v: jax.Array) -> MesaState:
    """Returns the state before the first token, for q [b, ..., h, k] and v [b, ..., h, v]."""
    dtype = solver_dtype(q, v)
    batch, num_heads, key_dim = q.shape[0], q.shape[-2], q.shape[-1]
    return MesaState(
        kk=jnp.zeros((batch, num_heads, key_dim, key_dim), dtype),
        kv=jnp.zeros((batch, num_heads, key_dim, v.shape[-1]), dtype),
    )
