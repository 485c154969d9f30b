"""What a prediction leans on: the weights with which a mesa layer reads the values of the context."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mesanet_jax.mixers.mesa import SolveInputs
from mesanet_jax.model import MesaNet, by_layer
from mesanet_jax.shapes import Logits, Tokens
from pallas_kernels import SolveReport, mesa_chunk


class Explanation(NamedTuple):
    """How every token of some texts was predicted; layers are the mesa layers from the bottom up."""

    logits: Logits
    report: SolveReport  # arrays [l, b, t, h]
    weights: jax.Array  # [l, b, h, t, s]: o_t is the sum over s of weights[..., t, s] v_s


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
