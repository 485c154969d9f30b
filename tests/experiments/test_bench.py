"""The benchmark refuses to time what is wrong, and says in one sentence what it lacks."""

import sys
import time

import numpy as np
import pytest

from experiments.bench import contract, mixers, saving, search
from experiments.bench.__main__ import BenchConfig, main
from experiments.bench.clock import Timing, ratio, take_turns
from experiments.cli import UserError
from mesanet_jax import MesaNetConfig
from mesanet_jax.mixers import MIXERS


def test_contestants_take_turns_and_the_first_call_is_not_counted():
    calls = []
    times = take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3)
    assert "".join(calls) == "abababab"
    assert times["a"].seconds.shape == (3,)


def test_ratio_is_that_of_the_least_disturbed_rounds():
    assert ratio(Timing(np.array([9.0, 2.0, 4.0])), Timing(np.array([1.0, 1.0, 2.0]))) == (2.0, 2.0, 5.5)


def test_a_wrong_operator_is_not_timed(monkeypatch):
    contract.check(("one_token",))
    right = contract.mesa_chunk

    def slightly_wrong(*arguments, **choices):
        out, state = right(*arguments, **choices)
        return out * (1 + 1e-4 * ("solver" in choices)), state

    monkeypatch.setattr(contract, "mesa_chunk", slightly_wrong)
    with pytest.raises(UserError, match=r"mesa_chunk on one_token is off by 1.0e-04 .* nothing is timed before"):
        contract.check(("one_token",))


@pytest.mark.parametrize("part", ["mesa", "public"])
def test_without_torch_one_sentence_says_how_to_get_it(part, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("public", "public_mixers", "throughput", "yardstick"):
        monkeypatch.delitem(sys.modules, f"experiments.bench.{name}", raising=False)
    with pytest.raises(UserError) as caught:
        main(BenchConfig(output=tmp_path, parts=("router", part)))
    assert str(caught.value).startswith("torch is not installed") and "mesanet-jax[bench]" in str(caught.value)


def test_public_code_that_computes_something_else_is_not_timed(monkeypatch):
    pytest.importorskip("transformers", reason="needs the extra bench")
    from experiments.bench import public, public_mixers

    shape = MesaNetConfig(model_dim=32, num_heads=2, key_dim=16, value_dim=16)
    rows = public.compare(256, rounds=2, shape=shape)
    assert [row.mixer for row in rows] == list(MIXERS) and min(row.training[0] for row in rows) > 0
    assert public.lines(rows, 256)[4].startswith("| mesa | ")
    monkeypatch.setitem(public_mixers.LAYERS, "gla", public_mixers.LAYERS["mamba2"])
    with pytest.raises(UserError, match=r"gla is \d.\de.* off public code; it is not timed before it agrees"):
        public.compare(256, rounds=2, shape=shape)


@pytest.mark.parametrize("field", [dict(num_devices=3), dict(length=1000), dict(rounds=1)])
def test_a_config_that_cannot_be_measured_names_its_field(field):
    with pytest.raises(UserError, match=f"^{next(iter(field))}={next(iter(field.values()))} "):
        BenchConfig(**field)


def test_a_wrong_search_is_not_timed(monkeypatch):
    row = search.compare(8, rounds=2, references=3000, queries=8, k=2)
    assert row.ratio > 0 and "2 nearest of 3,000 in 8 dimensions" in search.lines([row])[0]
    right = search.nearest
    monkeypatch.setattr(search, "nearest", lambda *call: [x[:, ::-1] for x in right(*call)])
    with pytest.raises(UserError, match="no time is worth printing"):
        search.compare(8, rounds=2, references=3000, queries=8, k=2)


def test_a_part_that_does_not_exist_is_named():
    with pytest.raises(UserError, match=r"^parts=\('memory',\) must be some of"):
        BenchConfig(parts=("memory",))


def test_the_cost_of_saving_is_what_a_checkpoint_adds_to_steps(monkeypatch):
    class Slow(saving.Checkpoints):
        def save(self, *args, **kwargs):
            time.sleep(1)
            super().save(*args, **kwargs)

    monkeypatch.setattr(saving, "Checkpoints", Slow)
    stall = saving.measure(rounds=2, size="tiny", length=32, seconds=0.2)
    assert stall.steps >= 1 and len(stall.ratios) == 2 and min(stall.ratios) > 1 + 0.5 / 0.2
    parameters_and_two_moments = 3 * 4 * 473_000 / 1e9  # in float32
    assert stall.gigabytes == pytest.approx(parameters_and_two_moments, rel=0.02)
    assert "a minute of the tiny model" in saving.lines(stall)[0]


def test_every_mixer_is_timed_beside_attention_and_none_that_decodes_something_else(monkeypatch):
    shape = MesaNetConfig(model_dim=16, num_heads=2, key_dim=8, value_dim=8)
    monkeypatch.setattr(mixers, "MIXERS", {name: MIXERS[name] for name in ("gla", "attention")})
    rows = mixers.compare(32, rounds=2, shape=shape)
    assert [row.mixer for row in rows] == ["gla", "attention"]
    assert rows[1].training[0] == rows[1].decoding[0] == 1 and rows[0].training[0] > 0
    assert mixers.lines(rows, 32)[-1].startswith("| attention | 1.00 (1.00 to 1.00) |")
    monkeypatch.setattr(mixers.Layer, "decoded", lambda self: self._apply(self.params, self.x[:, -1:], None)[0])
    with pytest.raises(UserError, match=r"gla decodes what is \d.\de.* off its sequence; nothing is timed before"):
        mixers.compare(32, rounds=2, shape=shape)
