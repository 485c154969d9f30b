"""Next-token loss over packed documents."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mesanet_jax.shapes import Logits, SegmentIds, Tokens


class Batch(NamedTuple):
    """Packed tokens [b, t + 1]: the model reads all but the last and predicts all but the first."""

    tokens: Tokens
    segment_ids: SegmentIds


def targets_and_weights(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns targets [b, t] and weights [b, t] that are 1 where the target belongs to the input's document.

    The first token of a document (BOS) is therefore never a target, nor is padding.
    """
    ids = batch.segment_ids
    weights = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    return batch.tokens[:, 1:], weights.astype(jnp.float32)


def total_loss(logits: Logits, targets: Tokens, weights: jax.Array) -> jax.Array:
    """Returns the weighted sum of -log p(target) in nats, in float32.

    A target that is no token of the vocabulary gives NaN; a weight of 0 silences even that.
    """
    logits = logits.astype(jnp.float32)
    targets, classes = targets.astype(jnp.int32), logits.shape[-1]
    # compared, not gathered: devices that share a vocabulary each look through what they have of it
    is_target = jnp.arange(classes) == targets[..., None]
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    nll = jnp.where((targets >= 0) & (targets < classes), nll, jnp.nan)
    return jnp.sum(jnp.where(weights > 0, nll * weights, 0))
