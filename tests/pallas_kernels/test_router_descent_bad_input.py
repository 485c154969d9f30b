"""Every complaint is one sentence that names the argument and says what would be right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import router_descent

GOOD = dict(
    log_routing=jnp.zeros((2, 6)),
    readout=jnp.ones((2, 4, 6, 7)),
    offset=jnp.zeros((2, 4, 7)),
    labels=jnp.zeros((2, 4), int),
    weights=jnp.ones((2, 4)),
    learning_rates=jnp.ones(3),
)
ABSENT = GOOD["weights"].at[1, 3].set(0)
BAD = {
    "a list": (dict(offset=[0.0]), TypeError, "offset is a list; pass an array."),
    "integers": (
        dict(readout=jnp.ones((2, 4, 6, 7), int)),
        TypeError,
        "readout has dtype int32; pass a floating-point",
    ),
    "labels of floats": (dict(labels=jnp.zeros((2, 4))), TypeError, "labels has dtype float32; pass integers."),
    "rank of readout": (
        dict(readout=jnp.ones((4, 6, 7))),
        ValueError,
        "readout has shape (4, 6, 7); it must be [b, m,",
    ),
    "no answers": (
        dict(readout=jnp.ones((2, 4, 6, 0))),
        ValueError,
        "readout has shape (2, 4, 6, 0); it must be [b, m,",
    ),
    "log_routing": (
        dict(log_routing=jnp.zeros((2, 5))),
        ValueError,
        "log_routing has shape (2, 5); with readout of shape",
    ),
    "offset": (
        dict(offset=jnp.zeros(7)),
        ValueError,
        "offset has shape (7,); with readout of shape (2, 4, 6, 7) it must",
    ),
    "labels": (dict(labels=jnp.zeros((4, 2), int)), ValueError, "labels has shape (4, 2); with readout of shape"),
    "weights": (dict(weights=jnp.ones(4)), ValueError, "weights has shape (4,); with readout of shape"),
    "learning_rates": (
        dict(learning_rates=jnp.float32(1)),
        ValueError,
        "learning_rates has shape (); it must be [s], ",
    ),
    "groups": (dict(groups=(3, 4)), ValueError, "groups=(3, 4) add up to 7; the axis e has 6 experts."),
    "an empty group": (dict(groups=(6, 0)), ValueError, "groups=(6, 0) must be a tuple of positive sizes; (3, 3) is"),
    "no group": (dict(groups=()), ValueError, "groups=() must be a tuple of positive sizes; (3, 3) is twice three."),
    "not groups": (dict(groups=6), ValueError, "groups=6 must be a tuple of positive sizes; (3, 3) is twice three."),
    "optimizer": (dict(optimizer="adamw"), ValueError, "optimizer='adamw' is unknown; use one of ('sgd', 'adam', "),
    "prox": (dict(prox=-0.1), ValueError, "prox=-0.1 is not a strength; use 0 or a positive number."),
    "prox of NaN": (dict(prox=float("nan")), ValueError, "prox=nan is not a strength; use 0 or a positive number."),
    "negative weight": (dict(weights=-ABSENT), ValueError, "weights has negative or non-finite entries; 0 leaves a "),
    "infinite weight": (
        dict(weights=ABSENT / 0),
        ValueError,
        "weights has negative or non-finite entries; 0 leaves a ",
    ),
    "label": (
        dict(labels=GOOD["labels"].at[1, 2].set(7)),
        ValueError,
        "labels has 7; with 7 answers it must be 0 to 6.",
    ),
    "no label": (dict(labels=GOOD["labels"] - 1), ValueError, "labels has -1; with 7 answers it must be 0 to 6."),
    "unknown name": (dict(implementation="cuda"), ValueError, "implementation='cuda' is unknown; use None or one of "),
    "not there": (dict(implementation="pallas_gpu"), NotImplementedError, "implementation='pallas_gpu' is not one it"),
}


@pytest.mark.parametrize("name", BAD)
def test_router_descent_names_what_is_wrong(name):
    change, error, start = BAD[name]
    with pytest.raises(error) as caught:
        router_descent(**GOOD | change)
    message = str(caught.value)
    assert message.startswith(f"router_descent: {start}")
    assert message.endswith(".") and "\n" not in message
    assert ";" in message, "says what would be right"


def test_what_an_absent_neighbor_is_labelled_is_not_looked_at():
    labels = GOOD["labels"].at[1, 3].set(-1)
    _, loss = router_descent(**GOOD | dict(labels=labels, weights=ABSENT))
    np.testing.assert_allclose(loss, np.log(7) * np.array([4, 3]), rtol=1e-6)


def test_shapes_and_choices_are_checked_under_jit_too():
    for change in (dict(weights=jnp.ones(4)), dict(labels=jnp.zeros((2, 4)))):
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(change))} has"):
            jax.jit(router_descent)(**GOOD | change)
    with pytest.raises(ValueError, match="groups="):
        jax.jit(router_descent, static_argnames="groups")(**GOOD | dict(groups=(3,)))
