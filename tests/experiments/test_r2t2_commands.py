"""The commands of R2-T2 as their user meets them: what they make, what they replay and what they refuse."""

import dataclasses
import json
import random

import numpy as np
import pytest

from experiments.cli import UserError
from experiments.r2t2 import demo, evaluate, references, reroute, train
from experiments.r2t2.desk import load_desk
from experiments.r2t2.folder import open_model
from experiments.r2t2.references import open_references
from r2t2_jax import ledger, records
from r2t2_jax.budget import Plan
from r2t2_jax.decision import REROUTED, STATUSES, TURNED_OFF
from r2t2_jax.monitor import Alarm
from r2t2_jax.neighbors import NeighborConfig
from r2t2_jax.reroute import RerouteConfig

SMALL = dict(num_scenes=256, batch_size=64, expert_epochs=1, warm_epochs=1, router_epochs=1)
DESCENT = RerouteConfig(strategy="descent", neighbors=NeighborConfig(k=8), guarded=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run with both models, references of both and a ledger."""
    folder = tmp_path_factory.mktemp("r2t2") / "run"
    train.main(train.TrainConfig(output=folder, **SMALL))
    for readout in ("affine", "deep"):
        references.main(references.ReferencesConfig(run=folder, readout=readout, num_examples=200))
    reroute.main(reroute.DecideConfig(run=folder, config=DESCENT, num_scenes=40, batch_size=16))
    return folder


def entries(run):
    return ledger.read(run / "decisions-affine" / "ledger.jsonl")


def test_every_scene_has_a_record_and_the_chain_holds(run):
    assert [entry["input"]["id"] for entry in entries(run)] == [f"scene-{i}" for i in range(40)]
    ledger.verify(run / "decisions-affine" / "ledger.jsonl")
    assert {entry["status"] for entry in entries(run)} == {STATUSES[REROUTED]}


def test_any_decision_is_replayed_bit_for_bit(run, capsys):
    for name in random.Random(0).sample([entry["input"]["id"] for entry in entries(run)], 3):
        reroute.main(reroute.DecideConfig(run=run, replay=name))
        assert "replayed: every bit is the same" in capsys.readouterr().out


def test_a_replay_notices_one_changed_bit(run):
    trained = open_model(run)
    opened = open_references(trained, run / "references-affine")
    desk, num_scenes = load_desk(trained, opened, run / "decisions-affine")
    record = entries(run)[3]
    scene = reroute.scenes.make("test", num_scenes, 0).take([3])
    again = lambda inputs: desk.record(desk.decide(inputs), inputs, ["scene-3"])[0]  # noqa: E731
    assert records.replay(record, again, scene.inputs).same
    changed = json.loads(json.dumps(record))
    value = changed["routing"]["after"][0]
    changed["routing"]["after"][0] = float(np.nextafter(np.float32(value), np.float32(2)))
    (difference,) = records.replay(changed, again, scene.inputs).differences
    assert difference.startswith("routing.after")


def test_replay_refuses_what_is_not_in_the_ledger(run):
    with pytest.raises(UserError, match=r"has no decision about scene-99; it knows scene-0 to scene-39"):
        reroute.main(reroute.DecideConfig(run=run, replay="scene-99"))


def test_an_alarm_turns_rerouting_off_and_that_too_is_replayed(run, tmp_path, monkeypatch, capsys):
    alarm = Alarm(cause="far", after=16, lately=10, share=0.6)
    monkeypatch.setattr(reroute.monitor, "update", lambda watch, decisions: watch._replace(alarm=alarm))
    reroute.main(reroute.DecideConfig(run=run, config=DESCENT, num_scenes=40, batch_size=16, output=tmp_path / "off"))
    found = [entry["status"] for entry in ledger.read(tmp_path / "off" / "ledger.jsonl")]
    assert found == [STATUSES[REROUTED]] * 16 + [STATUSES[TURNED_OFF]] * 24
    reroute.main(reroute.DecideConfig(run=run, output=tmp_path / "off", replay="scene-20"))
    assert "replayed: every bit is the same" in capsys.readouterr().out


def test_ledger_on_or_off_gives_the_same_answers(run):
    trained = open_model(run)
    desk, num_scenes = load_desk(trained, open_references(trained, run / "references-affine"), run / "decisions-affine")
    decisions = desk.decide(reroute.scenes.make("test", num_scenes, 0).inputs)
    written = np.float32([entry["logits"]["after"] for entry in entries(run)])
    np.testing.assert_array_equal(written, decisions.logits)


def test_the_deep_model_is_rerouted_through_its_linearisation(run, tmp_path):
    trusted = dataclasses.replace(DESCENT, settings=dataclasses.replace(DESCENT.settings, trust=0.1))
    config = reroute.DecideConfig(run=run, readout="deep", config=trusted, num_scenes=20, output=tmp_path / "deep")
    reroute.main(config)
    routings = [entry["routing"] for entry in ledger.read(tmp_path / "deep" / "ledger.jsonl")]
    assert max(np.abs(np.subtract(r["before"], r["after"])).max() for r in routings) > 1e-3


def test_a_budget_gives_way_to_fewer_steps_or_a_cheaper_strategy(run, tmp_path, capsys, monkeypatch):
    quick = dataclasses.replace(DESCENT, strategy="router")
    monkeypatch.setattr(reroute, "fit_budget", lambda *_, **__: Plan(quick, 0.01, 0.002, 0.01))
    config = reroute.DecideConfig(run=run, config=DESCENT, num_scenes=20, output=tmp_path / "fast", budget_ms=1.0)
    reroute.main(config)
    said = capsys.readouterr().out
    assert "1 ms are less than the frozen model alone takes" in said
    assert "budget: router, 10 steps; p95 10 ms" in said
    assert {entry["strategy"] for entry in ledger.read(tmp_path / "fast" / "ledger.jsonl")} == {"router"}


REFUSED = {
    "no run": (lambda run, tmp: reroute.main(reroute.DecideConfig(run=tmp / "none")), r"run: .*none.* does not exist"),
    "no references": (
        lambda run, tmp: reroute.main(reroute.DecideConfig(run=run, references=tmp / "none")),
        r"references: .*none does not exist; build it: .*--run RUN --readout affine",
    ),
    "a ledger": (lambda run, tmp: reroute.main(reroute.DecideConfig(run=run)), r"output: .*decisions-affine exists"),
    "a set": (
        lambda run, tmp: references.main(references.ReferencesConfig(run=run, num_examples=20)),
        r"output: .*references-affine exists; give another folder, or --overwrite",
    ),
    "a run": (lambda run, tmp: train.main(train.TrainConfig(output=run)), r"output: .* is not an empty folder"),
    "a report": (
        lambda run, tmp: evaluate.main(evaluate.EvaluateConfig(runs=(run,), output=run)),
        r"output: .* is not an empty folder",
    ),
    "the same seed twice": (
        lambda run, tmp: evaluate.main(evaluate.EvaluateConfig(runs=(run, run), output=tmp / "new")),
        r"runs: two of them have the same seed",
    ),
    "references of another model": (
        lambda run, tmp: reroute.main(
            reroute.DecideConfig(run=run, readout="deep", references=run / "references-affine")
        ),
        r"references: .*this is the reference set of another model",
    ),
}


@pytest.mark.parametrize("case", REFUSED, ids=REFUSED.keys())
def test_what_would_be_lost_or_makes_no_sense_is_refused(run, tmp_path, case):
    call, message = REFUSED[case]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        call(run, tmp_path)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_damaged_model_is_named(run, tmp_path):
    (tmp_path / "affine.safetensors").write_bytes((run / "affine.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"affine\.safetensors cannot be read .*train again into a new folder"):
        open_model(tmp_path)


def test_training_again_gives_the_same_bits(run, tmp_path):
    train.main(train.TrainConfig(output=tmp_path / "again", readouts=("affine",), **SMALL))
    assert open_model(tmp_path / "again").fingerprint == open_model(run).fingerprint


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (train.TrainConfig, dict(expert_epochs=0), "expert_epochs=0"),
        (train.TrainConfig, dict(readouts=("wide",)), "readouts="),
        (references.ReferencesConfig, dict(num_examples=1), "num_examples=1"),
        (reroute.DecideConfig, dict(budget_ms=-1.0), "budget_ms=-1.0"),
        (evaluate.EvaluateConfig, dict(methods=("guess",)), "methods="),
        (evaluate.EvaluateConfig, dict(runs=()), "runs is empty"),
    ],
)
def test_a_config_that_makes_no_sense_names_its_field(config, fields, message):
    with pytest.raises(ValueError, match=f"^{config.__name__}: {message}"):
        config(**fields)


def test_the_demo_runs_to_its_end_and_only_replaces_itself(tmp_path, monkeypatch, capsys):
    trained = train.TrainConfig
    monkeypatch.setattr(demo.train, "TrainConfig", lambda **fields: trained(**SMALL | fields | {"expert_epochs": 1}))
    small = demo.DemoConfig(output=tmp_path / "demo", num_references=200, num_dev=40, num_test=60)
    monkeypatch.setattr(demo, "METHODS", ("descent", "descent, paper's settings"))
    few = tuple(method._replace(candidates=method.candidates[:1]) for method in evaluate.METHODS)
    monkeypatch.setattr(evaluate, "METHODS", few)
    monkeypatch.setattr(evaluate, "ALL_DESCENT", few[3])
    demo.main(small)
    assert (tmp_path / "demo" / "report" / "report.html").stat().st_size > 10_000
    assert "every bit is the same" in capsys.readouterr().out
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(UserError, match="is not empty and holds no earlier demo"):
        demo.main(dataclasses.replace(small, output=tmp_path / "mine"))
