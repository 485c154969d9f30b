"""The causal depthwise convolution of queries and keys, as pure functions (arXiv 2506.05233, appendix G.2)."""

import jax
import jax.numpy as jnp

from mesanet_jax.documents import first_document, last_document
from mesanet_jax.shapes import SegmentIds


def short_convolution(
    x: jax.Array,
    taps: jax.Array,
    history: jax.Array,
    segment_ids: SegmentIds | None = None,
    history_ids: SegmentIds | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns sum_j taps[j] * x_{t-j} [b, t, h, c] over those j that reach into the same document.

    Args:
      x: inputs [b, t, h, c].
      taps: [w, h, c], the current token's first.
      history: the inputs before them [b, w-1, h, c].
      segment_ids: documents of the inputs; None is one for all.
      history_ids: documents of the history [b, w-1]; None is the first document of the inputs.

    Returns:
      (the sums, the history for what comes next).
    """
    width, length = taps.shape[0], x.shape[1]
    padded, documents = jnp.concatenate([history, x], axis=1), None
    if segment_ids is not None:
        first = jnp.repeat(first_document(segment_ids), width - 1, axis=1)
        documents = jnp.concatenate([first if history_ids is None else history_ids, segment_ids], axis=1)
    total = jnp.zeros_like(x)
    for lag in range(width):
        start = width - 1 - lag
        shifted = padded[:, start : start + length]
        if documents is not None:
            same = documents[:, start : start + length] == documents[:, width - 1 :]
            shifted = jnp.where(same[..., None, None], shifted, 0)
        total += taps[lag] * shifted
    return total, _last_inputs(padded, documents, width - 1)


def _last_inputs(padded: jax.Array, documents: SegmentIds | None, count: int) -> jax.Array:
    """The last `count` inputs, 0 where they are padding or of another document than the last."""
    last = padded[:, padded.shape[1] - count :]
    if documents is None:
        return last
    ids = documents[:, documents.shape[1] - count :]
    return jnp.where(((ids == last_document(documents)) & (ids >= 0))[..., None, None], last, 0)
