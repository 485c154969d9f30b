"""Sampling: one call for the prompt, then token by token with a state of constant size."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mesanet_jax.model import MesaNet, apply_with_report
from mesanet_jax.shapes import Tokens
from pallas_kernels import SolverConfig, SolveReport


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn.

    Attributes:
      temperature: divides the logits; 0 always takes the most likely token.
      top_k: draw among the k most likely tokens; 0 means all.
      top_p: draw among the fewest tokens whose probabilities add up to top_p; 1 means all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"SamplingConfig: temperature={self.temperature} must be finite and at least 0, greedy.")
        if not isinstance(self.top_k, int | np.integer) or self.top_k < 0:
            raise ValueError(f"SamplingConfig: top_k={self.top_k} must be a whole number; 0 means all tokens.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"SamplingConfig: top_p={self.top_p} must lie in (0, 1]; 1 means all tokens.")


def generate(
    model: MesaNet,
    params,
    prompt: Tokens,
    *,
    num_tokens: int,
    key: jax.Array,
    sampling: SamplingConfig = SamplingConfig(),
    solver: SolverConfig | None = None,
    stop_token: int | None = None,
) -> Tokens:
    """Continues each prompt by num_tokens tokens.

    Memory does not grow with num_tokens unless the pattern has full attention, which gets a cache of exactly the length
    needed.

    Args:
      model, params: the model and its parameters.
      prompt: [b, t]; shorter prompts are padded on the left with -1.
      num_tokens: tokens to draw, at least 1.
      key: PRNG key; the same key gives the same text.
      sampling: how tokens are drawn.
      solver: solver settings while generating, its max_steps the budget of a token in every layer and head; None keeps
        the model's.
      stop_token: once drawn, the rest of that row is filled with it.

    Returns:
      [b, num_tokens] int32.

    Raises:
      ValueError: num_tokens is below 1; the prompt is empty, not [b, t], or padded on the right; a token of it, or the
        stop token, is none of the model's. Under jit the tokens of a prompt are not known, and not checked.
    """
    return _generate(model, params, prompt, num_tokens, key, sampling, solver, stop_token, watched=False)[0]


def generate_with_report(
    model: MesaNet,
    params,
    prompt: Tokens,
    *,
    num_tokens: int,
    key: jax.Array,
    sampling: SamplingConfig = SamplingConfig(),
    solver: SolverConfig | None = None,
    stop_token: int | None = None,
) -> tuple[Tokens, SolveReport | None]:
    """Generates, and says what it took; arguments are those of `generate`.

    Returns:
      (tokens [b, num_tokens], SolveReport of arrays [l, b, num_tokens, h]: of the solves that each was predicted
      from, or None if the model has no mesa layer).
    """
    return _generate(model, params, prompt, num_tokens, key, sampling, solver, stop_token, watched=True)


def _generate(model: MesaNet, params, prompt, num_tokens: int, key, sampling, solver, stop_token, *, watched: bool):
    """Checks, and compiles for a cache of the length needed."""
    prompt, vocab_size = jnp.asarray(prompt), model.config.vocab_size
    if not isinstance(num_tokens, int | np.integer) or num_tokens < 1:
        raise ValueError(f"generate: num_tokens={num_tokens} must be a whole number of at least 1.")
    if stop_token is not None and not 0 <= stop_token < vocab_size:
        raise ValueError(f"generate: stop_token={stop_token} is no token of a model that knows {vocab_size}.")
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"generate: prompt has shape {prompt.shape}; it must be [b, t] with at least one token.")
    if not isinstance(prompt, Tracer) and prompt.is_fully_addressable:
        _check_tokens(np.asarray(prompt), vocab_size)
    # parameters do not depend on these two, so the same weights serve; a shorter cache saves memory, not context
    max_context = min(model.config.max_context, prompt.shape[1] + num_tokens)
    config = dataclasses.replace(
        model.config, solver=model.config.solver if solver is None else solver, max_context=max_context
    )
    return _sample(MesaNet(config), params, prompt, key, num_tokens, sampling, stop_token, watched)


def _check_tokens(prompt: np.ndarray, vocab_size: int) -> None:
    """What is predicted from a token that does not exist, or from padding, is nothing, and looks like a text."""
    if prompt.max(initial=-1) >= vocab_size:
        raise ValueError(f"generate: the prompt holds token {prompt.max()}; the model knows 0 to {vocab_size - 1}.")
    if (prompt[:, -1] < 0).any():
        row = int(np.argmax(prompt[:, -1] < 0))
        raise ValueError(
            f"generate: row {row} of the prompt ends with padding; pad on the left, with at least a token."
        )


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6, 7))
def _sample(model: MesaNet, params, prompt, key, num_tokens: int, sampling, stop_token: int | None, watched: bool):
    def read(*inputs):
        # unwatched there are no reports, which would be kept for every token
        return apply_with_report(model, params, *inputs) if watched else (*model.apply(params, *inputs), None)

    logits, state, report = read(jnp.maximum(prompt, 0), None, jnp.where(prompt < 0, -1, 0))

    def draw_and_advance(carry, key):
        logits, state, report, stopped = carry
        token = draw(key, logits, sampling)
        if stop_token is not None:
            token = jnp.where(stopped, stop_token, token)
            stopped = token == stop_token
        logits, state, new_report = read(token[:, None], state)
        return (logits[:, -1], state, _of_last(new_report), stopped), (token, report)

    start = (logits[:, -1], state, _of_last(report), jnp.zeros_like(prompt[:, 0], bool))
    _, (tokens, reports) = jax.lax.scan(draw_and_advance, start, jax.random.split(key, num_tokens))
    return tokens.T, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), reports)


def _of_last(report: SolveReport | None) -> SolveReport | None:
    """The report [l, b, h] of the last token."""
    return jax.tree.map(lambda x: x[:, :, -1], report)


def draw(key: jax.Array, logits: jax.Array, sampling: SamplingConfig) -> jax.Array:
    """Draws a token [b] for each row of logits [b, y]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # by rank, so that tokens of equal probability do not slip in together
    ids = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(logits, ids, axis=-1)
    ranked = (ranked - ranked[:, :1]) / sampling.temperature  # the largest is 0 at any temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        ranked = ranked.at[:, sampling.top_k :].set(-jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)  # the mass before this token was not enough
    rank = jax.random.categorical(key, ranked)
    return jnp.take_along_axis(ids, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
