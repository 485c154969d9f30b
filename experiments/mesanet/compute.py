"""Ask what test-time compute buys: loss, recall and speed of a trained run under other solver settings.

  python -m experiments.mesanet.compute runs/mesa                           one page; a few minutes for a small model
  python -m experiments.mesanet.compute runs/mesa runs/transformer runs/gla     other runs as points of comparison
  python -m experiments.mesanet.compute runs/mesa --bearable 0.001              a tolerance for that much extra loss

The first run is read with every step budget and every tolerance, by the same weights. The page names the loosest
tolerance whose extra loss is bearable, draws quality against compute, and says which heads hardly forget and how their
systems grow harder along the context.
"""

import dataclasses
import sys
from pathlib import Path

import tyro

from experiments import cli
from experiments.cli import UserError
from experiments.compute.measure import efforts, heads, texts
from experiments.compute.page import MARK, findings, write_page
from experiments.compute.worth import Measured, choose, weigh
from experiments.curves import solver
from experiments.curves.bands import Bands
from experiments.curves.material import Progress, check_output, drafted, gather, open_runs, room_in
from experiments.pictures import COLORS
from experiments.webpage import provenance
from pallas_kernels.mesa_chunk.solver import MOST_STEPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """What is tried on which texts.

    Attributes:
      runs: folders of trained runs with one tokenizer; the first has mesa layers, the others are points of comparison.
      output: folder of the page and its files, new or with an earlier page in it; empty means "compute" in the folder
        of the first run.
      step_budgets: solver steps to spend on every token.
      tolerances: relative residuals to stop at, within the run's own budget.
      bearable: extra loss in nats per token that the chosen tolerance may cost.
      length: tokens read of each document; 0 means twice the trained length, or the longest document if that is less.
      num_documents: held-out documents, drawn at random; 0 takes all.
      batch_size: documents the model reads at once.
      rounds: how often a batch is timed under each setting.
      bands: resamples of the documents behind a band.
      seed: draw of the documents and of the resamples.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    output: str = ""
    step_budgets: tuple[int, ...] = (0, 1, 2, 3, 5, 10, 30)
    tolerances: tuple[float, ...] = (0.5, 0.2, 0.1, 0.03, 0.01, 1e-3, 1e-4)
    bearable: float = 0.005
    length: int = 0
    num_documents: int = 64
    batch_size: int = 8
    rounds: int = 5
    bands: int = 1000
    seed: int = 0

    def __post_init__(self):
        least = {"length": 0, "num_documents": 0, "batch_size": 1, "rounds": 1, "bands": 100, "seed": 0}
        for field, low in least.items():
            if getattr(self, field) < low:
                raise ValueError(f"ComputeConfig: {field}={getattr(self, field)} must be at least {low}.")
        most = len(COLORS) - 1  # two colours are those of the settings
        if not 1 <= len(self.runs) <= most:
            raise ValueError(f"ComputeConfig: name 1 to {most} folders of trained runs, not {len(self.runs)}.")
        if any(not 0 <= n <= MOST_STEPS for n in self.step_budgets) or not all(0 < t < 1 for t in self.tolerances):
            raise ValueError(f"ComputeConfig: step_budgets must lie in 0 to {MOST_STEPS}, tolerances between 0 and 1.")
        if not self.step_budgets and not self.tolerances:
            raise ValueError("ComputeConfig: step_budgets and tolerances are both empty; name a setting to try.")
        if self.bearable <= 0:
            raise ValueError(f"ComputeConfig: bearable={self.bearable} must be positive.")


def main(config: ComputeConfig) -> None:
    """Tries the settings, writes the page, prints what it says."""
    output = Path(config.output or config.runs[0] / "compute")
    check_output(output, MARK)
    runs = open_runs(config.runs)
    (name, run), *_ = runs.items()
    if not solver.has_solver(run.config.model):
        raise UserError(f"runs: {name} has no mesa layer; name a run that has one first.")
    draw = {"length": config.length, "num_documents": config.num_documents, "seed": config.seed}
    material = gather(runs, **draw, any_tokens=False)
    tried = {"step_budgets": config.step_budgets, "tolerances": config.tolerances}
    with drafted(output) as draft:
        read, bands = texts(run, material.documents[name], material.length), Bands(config.bands, seed=config.seed)
        sizes = {"batch_size": config.batch_size, "rounds": config.rounds, "progress": Progress()}
        found = efforts(runs, read, **tried, **sizes)
        choice = choose(found, config.bearable, bands)
        measured = Measured(run, read, weigh(found, read, bands), heads(run, read), choice, config.bearable)
        facts = provenance(["python", "-m", "experiments.mesanet.compute", *sys.argv[1:]], config.seed)
        with room_in(output):
            write_page(draft, measured, bands, material.notes, facts)
    print("\n".join(findings(measured)) + f"\n\npage: {output / 'report.html'}")


if __name__ == "__main__":
    cli.run(main, ComputeConfig)
