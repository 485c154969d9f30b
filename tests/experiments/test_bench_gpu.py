"""What is measured on a GPU, on a CPU: which contestants, against what."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.bench import contract, gpu
from experiments.bench.__main__ import BenchConfig, main
from experiments.cli import UserError
from pallas_kernels import SolverConfig, mesa_chunk
from pallas_kernels.mesa_chunk import xla
from pallas_kernels.mesa_chunk.cases import STUDY, Case, sample

SMALL = dataclasses.replace(STUDY["low_rank, 0.95-1"], num_heads=2, key_dim=16, value_dim=16)


def dense_solutions(q, k, v, log_decay, beta, ridge, dout):
    """Solutions of both systems, the matrices A of all tokens, and the adjoint's right-hand sides; token by token."""
    x, y, rhs, matrices = np.zeros_like(q), np.zeros_like(q), np.zeros_like(q), np.zeros((*q.shape, q.shape[-1]))
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        kk, kv = np.zeros(2 * (q.shape[-1],)), np.zeros((q.shape[-1], v.shape[-1]))
        for t in range(q.shape[1]):
            at, gate = (b, t, h), np.exp(log_decay[b, t, h])
            kk = gate * kk + beta[at] * np.outer(k[at], k[at])
            kv = gate * kv + beta[at] * np.outer(k[at], v[at])
            matrices[at], rhs[at] = kk + np.diag(ridge[h]), kv @ dout[at]
            x[at], y[at] = np.linalg.solve(matrices[at], q[at]), np.linalg.solve(matrices[at], rhs[at])
    return x, y, matrices, rhs


def test_residuals_are_those_of_the_recurrence():
    inputs = sample(Case(source="two chunks", batch=2, length=70, key_dim=8, value_dim=5))
    operands = [*inputs[:6], np.random.default_rng(1).normal(size=inputs.v.shape)]
    x, y, matrices, rhs = dense_solutions(*operands)
    assert max(gpu.true_residuals(operands, x, y)) < 1e-13
    x[1, 66, 1] += 1e-3
    y[0, 3, 0] -= 1e-2
    sizes = [np.linalg.norm(matrices[1, 66, 1] @ np.full(8, 1e-3)) / np.linalg.norm(inputs.q[1, 66, 1])]
    sizes += [np.linalg.norm(matrices[0, 3, 0] @ np.full(8, 1e-2)) / np.linalg.norm(rhs[0, 3, 0])]
    np.testing.assert_allclose(gpu.true_residuals(operands, x, y), sizes, rtol=1e-9)


def test_right_hand_sides_are_those_of_the_recurrence():
    inputs = sample(Case(source="two chunks", batch=2, length=70, key_dim=8, value_dim=5))
    operands = [*inputs[:6], np.random.default_rng(1).normal(size=inputs.v.shape)]
    *_, rhs = dense_solutions(*operands)
    np.testing.assert_allclose(gpu.adjoint_rhs(operands), rhs, rtol=1e-9, atol=1e-12)


def test_every_length_is_as_many_tokens_and_solved_to_the_tolerance(capsys):
    few_digits = {"few digits": ("xla", SolverConfig(precision="bfloat16_3x"))}
    rows = gpu.compare((64, 128), rounds=2, kinds={"small": SMALL}, contestants=few_digits)
    assert [(row.length, row.contestant) for row in rows] == [(64, "few digits"), (128, "few digits")]
    for row in rows:
        assert 0 < max(row.residuals) <= 1e-4 and row.milliseconds > 0 and row.faster is None
        assert min(row.errors) > 0 and max(row.errors) < 1e-3
    assert capsys.readouterr().out.splitlines() == list(map(str, rows))  # what is measured is not lost
    layer = gpu.Layer([x.reshape(-1, 64, *x.shape[2:]) if x.ndim > 2 else x for x in _operands(128)], *gpu.OURS["xla"])
    assert layer.train()[0].shape == (2, 64, 2, 16)


def _operands(length: int) -> list[np.ndarray]:
    inputs = sample(dataclasses.replace(SMALL, length=length))
    return [np.float32(x) for x in (*inputs[:6], inputs.v)]


def test_a_yardstick_takes_its_turns_and_the_table_says_how_much_faster_and_how_right():
    class Theirs(gpu.Layer):
        def __init__(self, operands):
            super().__init__(operands, *gpu.OURS["xla"])

        def results(self):
            out, *grads = super().results()
            return [1.25 * out, *grads]

    theirs = SimpleNamespace(
        NAME="theirs",
        Layer=Theirs,
        solutions=lambda operands, rhs: (np.zeros_like(operands[0]), np.zeros_like(rhs)),
        decoder=lambda tokens, kk, kv: lambda: np.zeros(tokens[0][2].shape, np.float32),
    )
    ours = {"xla": gpu.OURS["xla"]}
    training = gpu.compare((64,), 2, theirs, kinds={"small": SMALL}, contestants=ours)
    decoding = gpu.decode(2, theirs, num_heads=16, kinds={"small": SMALL}, implementations=("xla",))
    assert [row.contestant for row in training] == ["xla", "theirs"]
    assert training[1].faster == (1, 1, 1) and training[0].faster is not None and training[0].faster.best > 0
    assert training[1].residuals == (1, 1) and training[0].errors[1] == training[1].errors[1]
    assert training[1].errors[0] == pytest.approx(0.25, rel=1e-3)
    assert [row.contestant for row in decoding] == ["copy", "xla", "theirs"] and decoding[0].share == 1
    assert [row.steps for row in decoding][::2] == [None, 30] and decoding[1].steps > 1
    assert decoding[1].error < 1e-4 and decoding[2].error == 1
    page = gpu.lines(training, decoding, "No yardstick here.")
    assert page[0].startswith("cpu, ") and page[0].endswith("No yardstick here.")
    assert page[-1] == str(decoding[-1]) and str(training[0]) in page


def test_tokens_are_decoded_one_after_the_other_from_what_was_remembered():
    tokens, state = gpu._remembered(SMALL, 16)
    assert len(tokens) == gpu.DECODED and state.kk.shape == (8, 2, 16, 16)
    inputs = sample(dataclasses.replace(SMALL, batch=gpu.DIFFERENT, length=gpu.REMEMBERED + gpu.DECODED))
    whole, _ = mesa_chunk(*map(np.float32, inputs[:6]), solver=contract.TO_ROUNDING, implementation="xla")
    out = gpu._decoder(tokens, state, "xla", contract.TO_ROUNDING)()
    np.testing.assert_allclose(out[4:], whole[:, -1], atol=1e-4 * np.abs(whole).max())


def test_a_wrong_back_end_is_not_timed(monkeypatch):
    monkeypatch.setattr(gpu, "BACK_ENDS", {"xla": xla})
    gpu.check(("one_token",))
    right = contract.mesa_step

    def slightly_wrong(*arguments, **choices):
        out, state = right(*arguments, **choices)
        return out * (1 + 1e-4 * ("solver" in choices)), state

    monkeypatch.setattr(contract, "mesa_step", slightly_wrong)
    with pytest.raises(
        UserError, match=r'mesa_step on one_token by "xla" is off by 1.0e-04 .* nothing is timed before'
    ):
        gpu.check(("one_token",))


def test_without_a_gpu_one_sentence_says_so_before_anything_is_measured(tmp_path):
    with pytest.raises(UserError, match=r'^parts: "gpu" needs a GPU, and jax has found none, only cpu; .*cuda'):
        main(BenchConfig(output=tmp_path / "bench", parts=("solver", "gpu")))
    assert not (tmp_path / "bench").exists()


def test_lengths_that_share_no_tokens_are_refused():
    with pytest.raises(UserError, match=r"^gpu_lengths=\(100, 2048\) must be divisors of the longest"):
        BenchConfig(gpu_lengths=(100, 2048))
