"""Train a frozen mixture of experts, re-route it, replay a decision, and draw what that gained and broke.

Takes four minutes on two CPU cores and downloads nothing: the pictures are rendered around scikit-learn's handwritten
digits. By hand: experiments.r2t2.train, .references, .reroute and .evaluate.
"""

import dataclasses
import time
from pathlib import Path

import numpy as np

from experiments import cli
from experiments.r2t2 import evaluate, references, reroute, train
from r2t2_jax import ledger

METHODS = ("amortised, guarded", "descent, all references", "descent", "descent, paper's settings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo does.

    Attributes:
      output: folder for model, references, ledger and page; a demo in it is replaced.
      seed: of scenes and training.
      expert_epochs: passes in which the experts learn.
      num_references, num_dev, num_test: scenes of each kind.
    """

    output: Path = Path("demo/r2t2")
    seed: int = 0
    expert_epochs: int = 8
    num_references: int = 6000
    num_dev: int = 1500
    num_test: int = 3000


def main(config: DemoConfig) -> None:
    """Runs the four commands one after the other."""
    begin = time.monotonic()
    cli.start_anew(config.output)
    run = config.output / "run"
    train.main(
        train.TrainConfig(output=run, seed=config.seed, expert_epochs=config.expert_epochs, readouts=("affine",))
    )
    print("\nReferences", flush=True)
    references.main(references.ReferencesConfig(run=run, num_examples=config.num_references, store_inputs=True))
    print("\nRe-routing", flush=True)
    decisions = reroute.DecideConfig(run=run)
    reroute.main(decisions)
    entries = ledger.read(run / "decisions-affine" / "ledger.jsonl")
    name = entries[np.random.default_rng().integers(len(entries))]["input"]["id"]
    print(f"\nReplaying {name}, drawn at random", flush=True)
    reroute.main(dataclasses.replace(decisions, replay=name))
    print("\nEvaluation", flush=True)
    evaluate.main(
        evaluate.EvaluateConfig(
            runs=(run,),
            output=config.output / "report",
            methods=METHODS,
            ablate=False,
            num_references=config.num_references,
            num_dev=config.num_dev,
            num_test=config.num_test,
        )
    )
    print(f"\nDone in {(time.monotonic() - begin) / 60:.1f} minutes. Open {config.output / 'report' / 'report.html'}")


if __name__ == "__main__":
    cli.run(main, DemoConfig)
