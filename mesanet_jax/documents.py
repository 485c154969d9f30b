"""Where documents begin and end in a call; ids do not decrease along time, and negative ones mark padding."""

import jax
import jax.numpy as jnp

from mesanet_jax.shapes import SegmentIds


def first_document(segment_ids: SegmentIds) -> jax.Array:
    """Returns the id [b, 1] of the first token that is no padding, 0 where all is: the one that a state belongs to."""
    first = jnp.argmax(segment_ids >= 0, axis=1, keepdims=True)
    return jnp.maximum(jnp.take_along_axis(segment_ids, first, axis=1), 0)


def last_document(segment_ids: SegmentIds) -> jax.Array:
    """Returns the id [b, 1] of the last token that is no padding, negative where all is."""
    return jnp.max(segment_ids, axis=1, keepdims=True)
