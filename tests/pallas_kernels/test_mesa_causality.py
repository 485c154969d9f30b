"""What the nested preconditioner must not let show: later tokens and other documents, in what is left unsolved."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import MesaState, SolverConfig, mesa_chunk
from pallas_kernels.mesa_chunk.cases import STUDY, Inputs, sample

LOOSE = SolverConfig(tolerance=1e-1)  # leaves enough unsolved to see on what the way there depends


def few_steps(inputs: Inputs, segment_ids: np.ndarray, config: SolverConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns outputs and steps taken."""
    arrays, state = [jnp.asarray(x, jnp.float32) for x in inputs[:6]], MesaState(*map(jnp.float32, inputs[6:]))
    out, _, report = mesa_chunk(*arrays, state, segment_ids=segment_ids, solver=config, with_report=True)
    return np.asarray(out), np.asarray(report.num_steps)


def disturbed(inputs: Inputs, name: str, tokens: slice) -> Inputs:
    """The same with other values in one array at these tokens."""
    changed = getattr(inputs, name).copy()
    changed[:, tokens] = -2.0 if name == "log_decay" else 3 * changed[:, tokens] + 1
    return inputs._replace(**{name: changed})


HISTORY = sample(dataclasses.replace(STUDY["low_rank, 0.95-1"], length=160, key_dim=32, value_dim=32))
# steps of both levels, after which more is left unsolved than rounding
MIXED = SolverConfig(tolerance=1e-5, max_steps=5, precision="mixed")
precisions = pytest.mark.parametrize(
    "config", [LOOSE, dataclasses.replace(LOOSE, precision="bfloat16"), MIXED], ids=str
)
sequences = pytest.mark.parametrize("name", ["k", "v", "log_decay", "beta"])


@precisions
@sequences
def test_no_output_depends_on_later_tokens_not_even_in_what_is_left_unsolved(name, config):
    ids, last = np.zeros((1, 160), np.int32), 107  # of the tokens before, in the middle of the second of three chunks
    before, num_steps = few_steps(HISTORY, ids, config)
    after, same_steps = few_steps(disturbed(HISTORY, name, slice(last, None)), ids, config)
    np.testing.assert_array_equal(before[:, :last], after[:, :last])
    np.testing.assert_array_equal(num_steps[:, :last], same_steps[:, :last])
    assert (before[:, last:] != after[:, last:]).any()
    assert (num_steps[:, :last] < 6).all(), "converged, so that nothing could have been seen"
    converged, _ = few_steps(HISTORY, ids, SolverConfig(max_steps=100, tolerance=0.0))
    left = np.abs(before - converged)[:, 64:last].max() / np.abs(converged).max()  # in the chunk of what changes
    assert left > 1e-5, "converged, so that nothing could have been seen"


def test_a_memory_that_cannot_be_factored_changes_nothing_in_the_next_document():
    ids = np.repeat([[0, 1]], [10, 150], axis=1)
    hopeless = HISTORY._replace(kk=-1e3 * np.eye(32)[None, None] * np.ones_like(HISTORY.kk))
    (before, _), (after, _) = (few_steps(x, ids, LOOSE) for x in (HISTORY, hopeless))
    np.testing.assert_array_equal(before[:, 10:], after[:, 10:])


@precisions
@sequences
def test_no_output_depends_on_other_documents_not_even_in_what_is_left_unsolved(name, config):
    ids = np.repeat([[0, 1, 2]], [50, 60, 50], axis=1)
    before, _ = few_steps(HISTORY, ids, config)
    after, _ = few_steps(disturbed(HISTORY, name, slice(0, 50)), ids, config)
    np.testing.assert_array_equal(before[:, 50:], after[:, 50:])
    assert (before[:, :50] != after[:, :50]).any()
