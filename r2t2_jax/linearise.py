"""Deep models through an affine window: logits and their Jacobian at one routing, computed once per reference."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from r2t2_jax.models.contract import FrozenModel, Inputs, Params
from r2t2_jax.shapes import Readout, Routing


def linearised(model: FrozenModel) -> Callable[[Params, Inputs, Routing], Readout]:
    """Returns the function (params, inputs, routing) -> first-order Readout of the model around that routing.

    Exact in value and slope there; the error grows with the square of the distance, so descent on it needs a trust
    region (StrategyConfig.trust). Costs one forward pass and one forward-mode derivative per expert.
    """

    def readout(params: Params, inputs: Inputs, routing: Routing) -> Readout:
        def logits(routing):
            return model.forward(params, inputs, routing)

        def slope(expert):
            along = jnp.broadcast_to(jax.nn.one_hot(expert, routing.shape[-1], dtype=routing.dtype), routing.shape)
            return jax.jvp(logits, (routing,), (along,))[1]

        weight = jnp.stack([slope(expert) for expert in range(routing.shape[-1])], axis=1)
        return Readout(weight, logits(routing) - (routing[..., None] * weight).sum(1))

    return readout
