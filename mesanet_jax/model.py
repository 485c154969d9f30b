"""The stack: embedding, residual blocks, read-out. A hybrid is a pattern, a size is a row of SIZES."""

from typing import TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mesanet_jax import layers, sharding, weights
from mesanet_jax.config import MesaNetConfig
from mesanet_jax.mixers import MIXERS
from mesanet_jax.shapes import Activations, SegmentIds, Tokens
from pallas_kernels import SolveReport
from pallas_kernels.mesa_chunk.contract import check_array, check_segment_ids

Watched = TypeVar("Watched")

REMAT_POLICIES = {
    "all_but_solutions": jax.checkpoint_policies.save_only_these_names("mesa_solution"),
    "everything": jax.checkpoint_policies.nothing_saveable,
}


class Block(nn.Module):
    """x += mixer(norm(x)); x += feed-forward(norm(x))."""

    config: MesaNetConfig
    mixer: str

    @nn.compact
    def __call__(self, x: Activations, state, segment_ids: SegmentIds | None):
        """Returns (x [b, t, d], state of the mixer)."""
        mixed = layers.rms_norm(self.config, "mixer_norm")(x)
        mixed, state = MIXERS[self.mixer](self.config, name="mixer")(mixed, state, segment_ids)
        x += mixed
        x += layers.SwiGLU(self.config, name="mlp")(layers.rms_norm(self.config, "mlp_norm")(x))
        return x, state


class Period(nn.Module):
    """One repetition of the config's pattern of mixers."""

    config: MesaNetConfig

    @nn.compact
    def __call__(self, x: Activations, states: tuple, segment_ids: SegmentIds | None):
        """Returns (x [b, t, d], states), one state per mixer of the pattern."""
        after = []
        for place, (mixer, state) in enumerate(zip(self.config.pattern, states, strict=True)):
            x, state = Block(self.config, mixer, name=f"{mixer}_{place}")(x, state, segment_ids)
            after.append(state)
        return x, tuple(after)


class MesaNet(nn.Module):
    """Decoder-only language model with any pattern of mixers (arXiv 2506.05233, figure 1 and appendix G.2).

    `model.init(key, tokens)` gives parameters (boxed with their logical axes; `flax.linen.unbox` takes the boxes off),
    `model.apply(params, tokens, state)` gives `(logits [b, t, y] float32, state)`. However a sequence is cut into
    calls, down to single tokens, the logits are the same as long as the state is carried.
    """

    config: MesaNetConfig

    @nn.compact
    def __call__(self, tokens: Tokens, state=None, segment_ids: SegmentIds | None = None):
        """Predicts the token after each given one.

        Args:
          tokens: ids in [0, vocab_size).
          state: what the last call returned; None starts an empty context.
          segment_ids: number of the document each token belongs to, not decreasing along t; documents do not see each
            other, and `state` belongs to the first. Negative ids mark padding: on the right of rows that are not gone
            on with, or on the left where there is no state yet.

        Raises:
          TypeError, ValueError: tokens or segment_ids are not integers [b, t], or ids decrease (seen outside jit only);
            the state is of another pattern or of other rows.
        """
        c = self.config
        _check(tokens, segment_ids)
        x, table = embed(c, tokens)
        states = (None,) * len(c.pattern) if state is None else state
        _check_states(c, states, tokens.shape[0])
        x, states = stack(c)(x, states, segment_ids)
        x = layers.rms_norm(c, "out_norm")(x)
        if not c.tied_embedding:
            init = layers.named(nn.initializers.normal(c.model_dim**-0.5), ("vocab", "embed"))
            kernel = layers.Kernel(name="read_out")((c.vocab_size, c.model_dim), init)
            table = weights.spread(kernel.astype(c.dtype), tokens.shape)
        logits = weights.read_out(x, table)
        return (c.logit_cap * jnp.tanh(logits / c.logit_cap) if c.logit_cap else logits), states


def apply_with_report(model: MesaNet, params, tokens: Tokens, state=None, segment_ids: SegmentIds | None = None):
    """Applies the model and also returns how well its systems were solved.

    Returns:
      (logits, state, SolveReport of arrays [l, b, t, h] with a row per mesa layer from the bottom up, or None if the
      model has no mesa layer).
    """
    (logits, state), watched = model.apply(params, tokens, state, segment_ids, mutable=["intermediates"])
    return logits, state, by_layer(watched, SolveReport)


def num_parameters(params) -> int:
    """Returns how many numbers the parameters (or their shapes) hold."""
    return sum(x.size for x in jax.tree.leaves(params))


def _check_states(config: MesaNetConfig, states: tuple, num_rows: int) -> None:
    found = {x.shape[1] for x in jax.tree.leaves(states) if x.ndim > 1}  # [layers, b, ...]
    if len(states) != len(config.pattern) or found - {num_rows}:
        raise ValueError(
            f"state: it is of {len(states)} mixers and {sorted(found)} rows; pass what a call of this model, of "
            f"{len(config.pattern)}, returned for {num_rows}."
        )


def embed(config: MesaNetConfig, tokens: Tokens) -> tuple[Activations, jax.Array]:
    """Makes the parameter `embedding` of the module that calls; returns its rows for the tokens, and it, spread."""
    init = layers.named(nn.initializers.normal(config.model_dim**-0.5), ("vocab", "embed"))
    embedding = nn.Embed(config.vocab_size, config.model_dim, dtype=config.dtype, embedding_init=init, name="embedding")
    table = weights.spread(embedding.embedding.astype(config.dtype), tokens.shape)
    x = weights.look_up(table, tokens) * jnp.asarray(config.model_dim**0.5, config.dtype)
    return sharding.lay_out(x, "batch", "time", None), table


def stack(config: MesaNetConfig) -> nn.Module:
    """Returns all blocks, as one scan over periods of the pattern: compile time does not grow with depth."""
    period = Period
    if config.remat in REMAT_POLICIES:
        period = nn.remat(Period, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
    return nn.scan(
        period,
        variable_axes={"params": 0, "intermediates": 0, "solves": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=config.num_layers // len(config.pattern),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(config, name="layers")


def by_layer(watched, kind: type[Watched]) -> Watched | None:
    """Returns what mixers left of this kind, with an axis for layers from the bottom up; None if they left nothing."""

    def is_one(x) -> bool:
        return isinstance(x, kind)

    leaves = jax.tree_util.tree_leaves_with_path(watched, is_leaf=is_one)
    # {collection: {"layers": {"mesa_10": ...}}}, whose order is that of words; the pattern's is that of numbers
    placed = [(int(path[2].key.rpartition("_")[2]), x) for path, x in leaves if is_one(x)]
    if not placed:
        return None
    found = [x for _, x in sorted(placed, key=lambda one: one[0])]
    # [periods, ...] for each such mixer of the pattern -> [periods, mixers, ...] -> [l, ...]
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *found)


def _check(tokens, segment_ids) -> None:
    check_array("MesaNet", "tokens", tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"MesaNet: tokens have dtype {tokens.dtype}; pass integers.")
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"MesaNet: tokens have shape {tokens.shape}; they must be [b, t] with at least one token.")
    if segment_ids is not None:
        check_segment_ids("MesaNet", segment_ids, tokens.shape)
