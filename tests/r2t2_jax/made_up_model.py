"""A mixture of linear experts whose router prefers the wrong ones, so that its references have something to teach."""

import jax
import jax.numpy as jnp
import numpy as np

from r2t2_jax.models.contract import FrozenModel
from r2t2_jax.reference_build import build
from r2t2_jax.references import ReferenceSet
from r2t2_jax.shapes import Readout

GROUPS, EXPERTS, ANSWERS, WIDTH = (2, 3), ("near", "far", "red", "green", "blue"), ("one", "two", "three", "four"), 6
RIGHT = np.array([[1, 0, 1, 0, 0], [0, 1, 0, 0, 1]], np.float32)  # the experts to ask, by the sign of the first input


def _weights(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    router = 0.3 * rng.normal(size=(WIDTH, 5))
    router[0] = [-0.5, 0.5, 0, 0, 0]
    experts = rng.normal(size=(WIDTH, 5, 4))
    experts[0] *= 0.1  # which side an input is on says who is right, not what
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), {"router": router, "experts": experts, "bias": 0.1 * rng.normal(size=4)}
    )


PARAMS = _weights(0)


def router(params, inputs):
    first, second = jnp.split(inputs["x"] @ params["router"], [2], axis=-1)
    return jnp.concatenate([jax.nn.softmax(first), jax.nn.softmax(second)], axis=-1)


def readout(params, inputs) -> Readout:
    weight = 2 * jnp.einsum("bf,fey->bey", inputs["x"], params["experts"], precision="highest")
    return Readout(weight, jnp.broadcast_to(params["bias"], (len(weight), 4)))


def embed(params, inputs):
    return inputs["x"] / jnp.linalg.norm(inputs["x"], axis=-1, keepdims=True)


def deep_forward(params, inputs, routing):
    """Not affine in the routing."""
    logits = readout(params, inputs)(routing)
    return logits + jnp.tanh(logits[:, ::-1]) * (routing[:, :1] + jnp.square(routing[:, 2:3]))


def _frozen(forward, exact) -> FrozenModel:
    return FrozenModel(
        forward=forward,
        router=router,
        embed=embed,
        features=lambda params, inputs: inputs["x"],
        readout=exact,
        groups=GROUPS,
        experts=EXPERTS,
        answers=ANSWERS,
    )


AFFINE = _frozen(lambda params, inputs, routing: readout(params, inputs)(routing), readout)
DEEP = _frozen(deep_forward, None)


def inputs(count: int, seed: int) -> dict[str, np.ndarray]:
    """Inputs far to one of two sides of the first axis."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, WIDTH))
    x[:, 0] = np.where(rng.random(count) < 0.5, 3, -3)
    return {"x": x.astype(np.float32)}


def right_answers(given: dict[str, np.ndarray], model: FrozenModel = AFFINE) -> np.ndarray:
    """What the right experts answer."""
    side = (given["x"][:, 0] > 0).astype(int)
    return np.asarray(model.forward(PARAMS, given, jnp.asarray(RIGHT)[side]).argmax(-1), np.int32)


def references(
    count: int = 200, *, seed: int = 1, model: FrozenModel = AFFINE, per_source: int = 2, **choices
) -> ReferenceSet:
    """What the model makes of labelled inputs, some from each source."""
    given = inputs(count, seed)
    ids = [f"r{i}" for i in range(count)]
    sources = [f"image{i // per_source}" for i in range(count)]
    return build(model, PARAMS, given, right_answers(given, model), ids, sources, **choices)
