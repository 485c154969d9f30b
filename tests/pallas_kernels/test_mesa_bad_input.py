"""Every complaint is one sentence that names the argument and says what would be right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import MesaState, SolverConfig, mesa_chunk, mesa_step, mesa_summary
from pallas_kernels.mesa_chunk import contract

CHUNK = dict(
    q=jnp.ones((2, 4, 3, 5)),
    k=jnp.ones((2, 4, 3, 5)),
    v=jnp.ones((2, 4, 3, 7)),
    log_decay=jnp.zeros((2, 4, 3)),
    beta=jnp.ones((2, 4, 3)),
    ridge=jnp.ones((3, 5)),
    state=MesaState(jnp.zeros((2, 3, 5, 5)), jnp.zeros((2, 3, 5, 7))),
)
STEP = {name: x[:, 0] if name not in ("ridge", "state") else x for name, x in CHUNK.items()}
state = CHUNK["state"]

SHARED = {
    "rank of q": (dict(q=jnp.ones((2, 5))), ValueError, "q has shape (2, 5); it must be [b, "),
    "heads of ridge": (dict(ridge=jnp.ones((2, 5))), ValueError, "ridge has shape (2, 5); with q of shape "),
    "rank of beta": (dict(beta=jnp.ones(3)), ValueError, "beta has shape (3,); with q of shape "),
    "log_decay": (dict(log_decay=jnp.zeros((2, 9))), ValueError, "log_decay has shape (2, 9); with q of shape "),
    "heads of k": (dict(k=jnp.ones((2, 4, 1, 5))), ValueError, "k has shape (2, 4, 1, 5); with q of shape "),
    "v": (dict(v=jnp.ones((2, 7))), ValueError, "v has shape (2, 7); with q of shape "),
    "integers": (dict(beta=jnp.ones((2, 4, 3), int)), TypeError, "beta has dtype int32; pass a floating-point array."),
    "kk": (
        dict(state=state._replace(kk=state.kv)),
        ValueError,
        "state.kk has shape (2, 3, 5, 7); it must be (2, 3, 5, 5).",
    ),
    "kv": (
        dict(state=state._replace(kv=state.kk)),
        ValueError,
        "state.kv has shape (2, 3, 5, 5); it must be (2, 3, 5, 7).",
    ),
    "integer state": (
        dict(state=state.astype(int)),
        TypeError,
        "state.kk has dtype int32; pass a floating-point array.",
    ),
    "a list": (dict(q=[[1.0]]), TypeError, "q is a list; pass an array."),
    "ridge of 0": (dict(ridge=jnp.zeros((3, 5))), ValueError, "ridge has 0.0; every entry must be positive."),
    "negative ridge": (dict(ridge=CHUNK["ridge"].at[1, 2].set(-2)), ValueError, "ridge has -2.0; every entry must"),
    "ridge of NaN": (
        dict(ridge=CHUNK["ridge"].astype(jnp.bfloat16).at[1, 2].set(jnp.nan)),
        ValueError,
        "ridge has nan; every entry must be positive.",
    ),
    "no solver": (dict(solver=None), TypeError, "solver is a NoneType; pass a SolverConfig."),
    "unknown name": (dict(implementation="cuda"), ValueError, "implementation='cuda' is unknown; use None or one of "),
    "not here": (
        dict(implementation="pallas_gpu"),
        NotImplementedError,
        "implementation='pallas_gpu' cannot run this: programs here are for cpu, not for gpu; use None",
    ),
}
ONLY_CHUNK = {
    "ids in a list": (dict(segment_ids=[[0] * 4] * 2), TypeError, "segment_ids is a list; pass an array."),
    "ids of floats": (dict(segment_ids=jnp.zeros((2, 4))), TypeError, "segment_ids have dtype float32; pass integers."),
    "shape of ids": (
        dict(segment_ids=jnp.zeros(4, int)),
        ValueError,
        "segment_ids have shape (4,); they must be [b, t] = (2, 4)",
    ),
    "ids that fall": (
        dict(segment_ids=jnp.array([[0, 0, 1, 1], [0, 2, -1, 1]])),
        ValueError,
        "segment_ids of row 1 decrease; number the documents of a row in their order.",
    ),
}


@pytest.mark.parametrize("name", [*SHARED, *ONLY_CHUNK])
def test_mesa_chunk_names_what_is_wrong(name):
    expect_sentence(mesa_chunk, CHUNK, *(SHARED | ONLY_CHUNK)[name])


@pytest.mark.parametrize("name", SHARED)
def test_mesa_step_names_what_is_wrong(name):
    expect_sentence(mesa_step, STEP, *SHARED[name])


SUMMARY = {name: CHUNK[name] for name in ("k", "v", "log_decay", "beta")}
ONLY_SUMMARY = {
    "rank of k": (dict(k=jnp.ones((2, 5))), ValueError, "k has shape (2, 5); it must be [b, t, h, k]."),
    "rank of beta": (dict(beta=jnp.ones(3)), ValueError, "beta has shape (3,); with k of shape (2, 4, 3, 5) it "),
    "log_decay": (dict(log_decay=jnp.zeros((2, 9))), ValueError, "log_decay has shape (2, 9); with k of shape "),
    "v": (dict(v=jnp.ones((2, 7))), ValueError, "v has shape (2, 7); with k of shape (2, 4, 3, 5) it must be "),
    "integers": SHARED["integers"],
    "a list": (dict(beta=[1.0]), TypeError, "beta is a list; pass an array."),
}


@pytest.mark.parametrize("name", [*ONLY_SUMMARY, *ONLY_CHUNK])
def test_mesa_summary_names_what_is_wrong(name):
    expect_sentence(mesa_summary, SUMMARY, *(ONLY_SUMMARY | ONLY_CHUNK)[name])


def expect_sentence(operator, arguments: dict, change: dict, error: type, start: str) -> None:
    with pytest.raises(error) as caught:
        operator(**arguments | change)
    message = str(caught.value)
    assert message.startswith(f"{operator.__name__}: {start}")
    assert message.endswith(".") and "\n" not in message
    assert ";" in message, "says what would be right"


def test_shapes_are_checked_under_jit_too():
    with pytest.raises(ValueError, match="ridge has shape"):
        jax.jit(mesa_chunk)(**CHUNK | dict(ridge=jnp.ones((2, 5))))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (dict(max_steps=-1), "SolverConfig: max_steps=-1 is negative; use 0 or more."),
        (dict(max_steps=None), "SolverConfig: max_steps=None must be a whole number up to 10000."),
        (dict(max_steps=2.5), "SolverConfig: max_steps=2.5 must be a whole number up to 10000."),
        (dict(adjoint_max_steps=2**31), f"SolverConfig: adjoint_max_steps={2**31} must be a whole number up to 10000."),
        (
            dict(adjoint_max_steps=0),
            "SolverConfig: max_steps=30 and adjoint_max_steps=0: linear attention has no solve either way, so set both "
            "to 0 or neither.",
        ),
        (dict(tolerance=None), "SolverConfig: tolerance=None is outside [0, 1); 1e-4 is a common choice."),
        (
            dict(preconditioner="jacobi"),
            "SolverConfig: preconditioner='jacobi' is unknown; use one of ('none', 'nested').",
        ),
        (
            dict(precision="half"),
            "SolverConfig: precision='half' is unknown; use one of (None, 'float32', 'bfloat16_3x', 'bfloat16', "
            "'mixed').",
        ),
        (dict(tolerance=-1e-3), "SolverConfig: tolerance=-0.001 is outside [0, 1); 1e-4 is a common choice."),
        (dict(tolerance=1.0), "SolverConfig: tolerance=1.0 is outside [0, 1); 1e-4 is a common choice."),
        (dict(tolerance=float("nan")), "SolverConfig: tolerance=nan is outside [0, 1); 1e-4 is a common choice."),
    ],
)
def test_solver_config_names_the_field(fields, sentence):
    with pytest.raises(ValueError) as caught:
        SolverConfig(**fields)
    assert str(caught.value) == sentence


def test_solver_config_takes_the_numbers_of_numpy():
    config = SolverConfig(max_steps=np.int64(3), tolerance=np.float32(0.5))
    assert config == SolverConfig(max_steps=3, tolerance=0.5)
    assert (type(config.max_steps), type(config.tolerance)) == (int, float)


class _AcrossHosts:
    """What an array looks like of which this process holds only a part."""

    dtype, shape, is_fully_addressable = np.dtype(np.int32), (1, 3), False

    def __array__(self, *args, **kwargs):
        raise RuntimeError("spans non-addressable devices")


def test_values_of_an_array_across_hosts_are_not_asked_for():
    contract.check_segment_ids("mesa_chunk", _AcrossHosts(), (1, 3))
