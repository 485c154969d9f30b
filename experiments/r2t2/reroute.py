"""Answer questions about scenes with re-routing on, write every decision to a ledger, and replay any of them.

python -m experiments.r2t2.reroute --run runs/r2t2/seed0                    decides, explains, watches itself
python -m experiments.r2t2.reroute --run runs/r2t2/seed0 --replay scene-17  makes that decision again, bit for bit
"""

import dataclasses
from pathlib import Path

import numpy as np

from experiments import cli
from experiments.cli import UserError
from experiments.r2t2 import scenes
from experiments.r2t2.desk import Desk, load_desk, save_desk
from experiments.r2t2.folder import Trained, open_model, write
from experiments.r2t2.references import Opened, open_references
from r2t2_jax import ledger, monitor, records
from r2t2_jax.budget import fit_budget
from r2t2_jax.calibrate import prepare
from r2t2_jax.decision import STATUSES, TURNED_OFF
from r2t2_jax.neighbors import NeighborConfig
from r2t2_jax.reroute import RerouteConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecideConfig:
    """What is decided, and how.

    Attributes:
      run: folder of a trained model.
      readout: which of its models.
      references: folder of its reference set; by default references-<readout> in the run.
      output: folder for the ledger, the memory it rests on and the monitor's state; by default decisions-<readout>.
      config: how inputs are re-routed.
      num_scenes: test scenes to answer.
      batch_size: scenes that arrive at a time.
      budget_ms: milliseconds for 256 scenes; steps or strategy give way to it. 0 sets no limit.
      replay: name of a scene in the ledger; decides it again instead, and says whether every bit is the same.
    """

    run: Path = Path("runs/r2t2/seed0")
    readout: str = "affine"
    references: Path | None = None
    output: Path | None = None
    config: RerouteConfig = RerouteConfig(strategy="amortised", neighbors=NeighborConfig(k=20))
    num_scenes: int = 500
    batch_size: int = 100
    budget_ms: float = 0.0
    replay: str = ""

    def __post_init__(self):
        for field in ("num_scenes", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"DecideConfig: {field}={getattr(self, field)} must be at least 1.")
        if self.config.strategy == "oracle":
            raise ValueError("DecideConfig: config.strategy='oracle' needs the answers; it is for evaluation alone.")
        if self.budget_ms < 0:
            raise ValueError(f"DecideConfig: budget_ms={self.budget_ms} must not be negative.")


def main(config: DecideConfig) -> None:
    """Decides, or replays."""
    trained = open_model(config.run, config.readout)
    opened = open_references(trained, config.references or config.run / f"references-{config.readout}")
    output = config.output or config.run / f"decisions-{config.readout}"
    test = scenes.make("test", config.num_scenes, trained.settings["seed"])
    if config.replay:
        replay(trained, opened, output, config.replay)
    else:
        decide(config, trained, opened, output, test)


def decide(config: DecideConfig, trained: Trained, opened: Opened, output: Path, test: scenes.Scenes) -> None:
    """Answers the scenes batch by batch; an alarm turns re-routing off for those that follow."""
    if output.exists():
        raise UserError(f"output: {output} exists; give another folder, a ledger is never written over.")
    try:
        memory, forecast = prepare(opened.references, config.config)
        desk = Desk(trained, opened, memory, config.config)
        if config.budget_ms:
            desk = within_budget(desk, test, config.budget_ms)
            if desk.config != config.config:  # another strategy has other thresholds
                memory, forecast = prepare(opened.references, desk.config)
                desk = desk._replace(memory=memory)
        watch = monitor.start(monitor.MonitorConfig(), monitor.baseline(forecast.distances))
    except ValueError as error:
        raise UserError(f"references: {error}") from None
    output.mkdir(parents=True)
    save_desk(output, desk, config.num_scenes)
    right = []
    with ledger.Ledger(output / "ledger.jsonl") as book:
        for start in range(0, len(test), config.batch_size):
            batch = test.take(slice(start, start + config.batch_size))
            decisions = desk.decide(batch.inputs, active=watch.alarm is None)
            book.append(desk.record(decisions, batch.inputs, _names(start, len(batch))))
            answers = np.stack([decisions.base_answers, decisions.answers]) == batch.label
            watch = monitor.feedback(monitor.update(watch, decisions), *answers)
            right.append(answers)
    write(output / "monitor.json", monitor.to_json(watch).encode())
    _tell(output, forecast, np.concatenate(right, axis=1), watch)


def _tell(output: Path, forecast, right: np.ndarray, watch) -> None:
    """Prints what happened, with one decision to read."""
    entries = ledger.read(output / "ledger.jsonl")
    for status in STATUSES.values():
        if count := sum(entry["status"] == status for entry in entries):
            print(f"{count:>6}  {status}")
    before, after = right.mean(axis=1)
    print(f"right before {before:.1%}, after {after:.1%}; forecast of the gain {forecast.gain:+.1%}")
    print(f"monitor: {monitor.alarm(watch) or 'nothing to report'}")
    changed = [entry for entry in entries if entry["answer"]["before"] != entry["answer"]["after"]]
    example = (changed or entries)[0]
    print(f"for example {example['input']['id']}: {records.sentence(example)}\nledger: {output / 'ledger.jsonl'}")


def within_budget(desk: Desk, test: scenes.Scenes, budget_ms: float) -> Desk:
    """Returns the desk with what fits into the budget, and says what that is."""
    model, params = desk.trained.model, desk.trained.params
    plan = fit_budget(model, params, desk.memory, test.inputs, desk.config, budget_ms, embedder=desk.opened.embedder)
    if 1000 * plan.expected > budget_ms:
        print(f"budget: {budget_ms:g} ms are less than the frozen model alone takes; it answers without re-routing")
    print(f"budget: {plan.config.strategy}, {plan.config.settings.steps} steps; p95 {1000 * plan.expected:.0f} ms")
    return desk._replace(config=plan.config)


def replay(trained: Trained, opened: Opened, output: Path, name: str) -> None:
    """Makes one decision again.

    Raises:
      UserError: there is no such decision, or what it rests on has changed.
    """
    path = output / "ledger.jsonl"
    try:
        entries = ledger.read(path)
        record = next((entry for entry in entries if entry.get("input", {}).get("id") == name), None)
        if record is None:
            raise UserError(f"replay: {path} has no decision about {name}; it knows {_known(entries)}.")
        desk, num_scenes = load_desk(trained, opened, output)
        row = int(name.removeprefix("scene-"))
        scene = scenes.make("test", num_scenes, trained.settings["seed"]).take(slice(row, row + 1))
        active = record["status"] != STATUSES[TURNED_OFF]
        again = records.replay(
            record, lambda inputs: desk.record(desk.decide(inputs, active), inputs, [name])[0], scene.inputs
        )
    except (ValueError, OSError) as error:
        raise UserError(f"replay: {error}") from None
    print(records.sentence(record))
    print("replayed: every bit is the same" if again.same else "replayed: " + "; ".join(again.differences))
    if again.software:
        print(again.software)


def _names(start: int, count: int) -> list[str]:
    return [f"scene-{i}" for i in range(start, start + count)]


def _known(entries) -> str:
    kept = [entry["input"]["id"] for entry in entries if "input" in entry]
    return f"{kept[0]} to {kept[-1]}" if kept else "none"


if __name__ == "__main__":
    cli.run(main, DecideConfig)
