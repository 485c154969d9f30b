"""What is measured on a GPU, on a CPU: which contestants, against what."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.bench import contract, gpu
from experiments.bench.__main__ import BenchConfig, main
from experiments.cli import UserError
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


def test_every_length_is_as_many_tokens_and_solved_to_the_tolerance():
    rows = gpu.compare((64, 128), rounds=2, kinds={"small": SMALL}, contestants=(("xla", "bfloat16_3x"),))
    assert [(row.length, row.contestant) for row in rows] == [(n, "xla, bfloat16_3x") for n in (64, 128)]
    assert all(0 < max(row.residuals) <= 1e-4 and row.milliseconds > 0 and row.faster is None for row in rows)
    layer = gpu.Layer([x.reshape(-1, 64, *x.shape[2:]) if x.ndim > 2 else x for x in _operands(128)], "xla", None)
    assert layer.train()[0].shape == (2, 64, 2, 16)


def _operands(length: int) -> list[np.ndarray]:
    inputs = sample(dataclasses.replace(SMALL, length=length))
    return [np.float32(x) for x in (*inputs[:6], inputs.v)]


def test_a_yardstick_takes_its_turns_and_the_table_says_how_much_faster():
    theirs = SimpleNamespace(
        NAME="theirs",
        Layer=lambda operands: gpu.Layer(operands, "xla", None),
        decoder=lambda *token: lambda: None,
    )
    training = gpu.compare((64,), 2, theirs, kinds={"small": SMALL}, contestants=(("xla", None),))
    decoding = gpu.decode(2, theirs, num_heads=32, dim=8, implementations=("xla",))
    assert [row.contestant for row in training] == ["xla", "theirs"]
    assert training[1].faster == (1, 1, 1) and training[0].faster is not None and training[0].faster.best > 0
    assert [row.contestant for row in decoding] == ["copy", "xla", "theirs"] and decoding[0].share == 1
    page = gpu.lines(training, decoding, "No yardstick here.")
    assert page[0].startswith("cpu, ") and page[0].endswith("No yardstick here.")
    assert page[-1].startswith("| theirs | ") and any(line.startswith("| small | 64 | xla | ") for line in page)


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
