"""What a mesa layer solves: the weights with which it reads the values of the context, and how hard that is."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mesanet_jax.mixers.mesa import SolveInputs
from mesanet_jax.model import MesaNet, by_layer
from mesanet_jax.shapes import Logits, Tokens
from pallas_kernels import SolveReport, mesa_chunk


class Explanation(NamedTuple):
    """How every token of some texts was predicted; layers are the mesa layers from the bottom up."""

    logits: Logits
    report: SolveReport  # arrays [l, b, t, h]
    weights: jax.Array  # [l, b, h, t, s]: o_t is the sum over s of weights[..., t, s] v_s


class Systems(NamedTuple):
    """What makes the systems of each head easy or hard; layers are the mesa layers from the bottom up."""

    log_decay: jax.Array  # [l, b, t, h] logarithm of the forget gate
    condition: jax.Array  # [l, b, p, h] largest over smallest eigenvalue of H_t + Lambda at the places p


def systems(model: MesaNet, params, tokens: Tokens, places: Sequence[int]) -> Systems:
    """Applies the model to texts that stand alone, and says what their systems are like.

    The number of conjugate-gradient steps to a given residual grows at most with the square root of the condition
    number. Time and memory grow with the number of places.

    Args:
      model: what reads.
      params: its weights.
      tokens: ids [b, t].
      places: tokens whose systems are looked at, each in [0, t).

    Raises:
      ValueError: the model has no mesa layer, or a place is not in the texts.
    """
    if not all(0 <= place < tokens.shape[1] for place in places):
        raise ValueError(f"systems: places={tuple(places)} must lie in [0, {tokens.shape[1]}).")
    inputs = by_layer(model.apply(params, tokens, mutable=["solves"])[1], SolveInputs)
    if inputs is None:
        raise ValueError(f"systems: pattern={model.config.pattern} has no mesa layer; take a model that has one.")
    at = jnp.asarray(places, jnp.int32)
    before = np.arange(tokens.shape[1]) <= np.asarray(places)[:, None]  # [p, t]

    def condition(layer: SolveInputs) -> jax.Array:
        total = jnp.cumsum(layer.log_decay, axis=1)  # [b, t, h]
        held = jnp.where(before[..., None], total[:, at][:, :, None] - total[:, None], -jnp.inf)  # [b, p, s, h]
        weights = jnp.exp(held) * layer.beta[:, None]
        gram = jnp.einsum("bpsh,bshi,bshj->bphij", weights, layer.k, layer.k, precision="highest")
        values = jnp.linalg.eigvalsh(gram + layer.ridge[..., None] * jnp.eye(gram.shape[-1]))
        return values[..., -1] / values[..., 0]

    return Systems(inputs.log_decay, jax.lax.map(condition, inputs))


def explain(model: MesaNet, params, tokens: Tokens) -> Explanation:
    """Applies the model to texts that stand alone, and says what each of their tokens was read from.

    The output of a head is G_t^T x_t with the solution x_t of the token's system, so value s enters it with the weight
    zeta_ts beta_s k_s . x_t (arXiv 2506.05233, eq. 8). Local optimisation makes them what they are: without it, x_t
    would be q_t. They are found as the layer's own output, by its own solver, where the values of the tokens are the
    unit vectors. Memory grows with the square of t.

    Raises:
      ValueError: the model has no mesa layer.
    """
    (logits, _), watched = model.apply(params, tokens, mutable=["intermediates", "solves"])
    inputs, report = by_layer(watched, SolveInputs), by_layer(watched, SolveReport)
    if inputs is None or report is None:
        raise ValueError(f"explain: pattern={model.config.pattern} has no mesa layer; take a model that has one.")
    batch, length = tokens.shape
    units = jnp.broadcast_to(
        jnp.eye(length, dtype=jnp.float32)[:, None], (batch, length, model.config.num_heads, length)
    )

    def read(layer: SolveInputs) -> jax.Array:
        q, k, *rest = layer
        out, _ = mesa_chunk(q, k, units, *rest, solver=model.config.solver, implementation="xla")
        return jnp.moveaxis(out, 1, 2)

    return Explanation(logits, report, jax.lax.map(read, inputs))
