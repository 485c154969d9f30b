"""Draw the next-token log-likelihood of trained runs by position: where in the context does which model win?

  python -m experiments.mesanet.curves runs/mesa runs/transformer         mesa against transformer, one HTML page
  python -m experiments.mesanet.curves runs/mesa --rulers 16 64 256       how much does mesa need the far past?
  python -m experiments.mesanet.curves runs/a runs/b --bits-per-byte      two tokenizers

Every held-out document is read alone, from its start, up to twice the length the runs were trained on. The page opens
with the sentences the numbers support; under them the curves with bootstrap bands, their paired difference and, for
mesa layers, the solver: its steps and residual by position, and the loss under other step budgets and tolerances.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import tyro

from experiments import cli
from experiments.cli import UserError
from experiments.curves import solver
from experiments.curves.bands import Bands, Grid, log_edges, shared_text
from experiments.curves.material import Material, Progress, check_output, drafted, gather, open_runs, room_in, stretched
from experiments.curves.page import MARK, Results, runs_table, write_page
from experiments.curves.scores import Scores, score
from experiments.mesh import compiler_options
from experiments.pictures import COLORS
from experiments.runs import Run
from experiments.webpage import Table, provenance
from mesanet_jax import MesaNet
from pallas_kernels.mesa_chunk.solver import MOST_STEPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvesConfig:
    """What is scored and how it is drawn.

    Attributes:
      runs: folders of trained runs; the first is compared with each of the others.
      output: folder of the page and its files, new or with an earlier page in it; empty means "curves" in the folder of
        the first run.
      length: tokens read of each document; 0 means twice the trained length, or the longest document if that is less.
      num_documents: held-out documents, drawn at random; 0 takes all.
      batch_size: documents the model reads at once.
      rulers: how the first run fares with only the last so many tokens in view; none draws no such line.
      bits_per_byte: measure in bits per byte of text, which compares different tokenizers.
      step_budgets: solver steps to try on runs with mesa layers.
      tolerances: relative residuals to stop the solver at.
      sweep_documents: documents, the longest of those drawn, that the solver is tried on; 0 leaves the solver out.
      bands: resamples of the documents behind a band.
      seed: draw of the documents and of the resamples.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    output: str = ""
    length: int = 0
    num_documents: int = 200
    batch_size: int = 8
    rulers: tuple[int, ...] = (64,)
    bits_per_byte: bool = False
    step_budgets: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 30)
    tolerances: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    sweep_documents: int = 16
    bands: int = 1000
    seed: int = 0

    def __post_init__(self):
        least = {"length": 0, "num_documents": 0, "batch_size": 1, "sweep_documents": 0, "bands": 100, "seed": 0}
        for field, low in least.items():
            if getattr(self, field) < low:
                raise ValueError(f"CurvesConfig: {field}={getattr(self, field)} must be at least {low}.")
        if not 1 <= len(self.runs) <= len(COLORS):
            raise ValueError(f"CurvesConfig: name 1 to {len(COLORS)} folders of trained runs, not {len(self.runs)}.")
        if any(ruler < 2 for ruler in self.rulers):
            raise ValueError(f"CurvesConfig: rulers={self.rulers} must be at least 2, BOS and one token.")
        if any(not 0 <= n <= MOST_STEPS for n in self.step_budgets) or not all(0 < t < 1 for t in self.tolerances):
            raise ValueError(f"CurvesConfig: step_budgets must lie in 0 to {MOST_STEPS}, tolerances between 0 and 1.")


def main(config: CurvesConfig) -> None:
    """Scores the runs, writes the page, prints one table and what was drawn."""
    output = Path(config.output or config.runs[0] / "curves")
    check_output(output, MARK)
    runs = open_runs(config.runs)
    draw = {"length": config.length, "num_documents": config.num_documents, "seed": config.seed}
    material = gather(runs, **draw, any_tokens=config.bits_per_byte)
    count = len(next(iter(material.documents.values())))
    print(
        f"reads {count:,} held-out documents, up to {material.length:,} tokens each, with {', '.join(runs)}", flush=True
    )
    with drafted(output) as draft:
        results = _measure(config, runs, material)
        facts = provenance(["python", "-m", _command(), *sys.argv[1:]], config.seed)
        with room_in(output):
            write_page(draft, runs, results, Bands(config.bands, seed=config.seed), material.notes, facts)
        files = sorted(path.name for path in draft.iterdir())
    _print(runs_table(runs, results))
    print("\n".join(str(output / name) for name in files if name.endswith((".png", ".html"))))


def _command() -> str:
    """The module that was started: this one, or an experiment that draws its curves with it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else __name__


def _measure(config: CurvesConfig, runs: dict[str, Run], material: Material) -> Results:
    """Runs the models: whole contexts, then rulers of the first, then the solver."""
    progress = Progress()
    scores = {name: _score(config, name, run, material, progress) for name, run in runs.items()}
    first, run = next(iter(runs.items()))
    contexts = [w for w in config.rulers if w < material.length]
    rulers = {f"{first}, last {w} tokens only": _score(config, first, run, material, progress, w) for w in contexts}
    solving = runs if config.sweep_documents else {}
    sweeps = {
        name: _sweep(config, name, run, material, progress)
        for name, run in solving.items()
        if solver.has_solver(run.config.model)
    }
    if not material.same_tokens:
        cut = iter(shared_text(*scores.values(), *rulers.values()))
        scores, rulers = ({name: next(cut) for name in uncut} for uncut in (scores, rulers))
    return Results(_grid(config, runs, material, scores), scores, rulers, sweeps)


def _grid(config: CurvesConfig, runs: dict[str, Run], material: Material, scores: dict[str, Scores]) -> Grid:
    """Buckets of positions; of bytes where positions mean different things to the runs."""
    unit = "bits per byte" if config.bits_per_byte else "nats per token"
    if not material.same_tokens:
        furthest = max(int(one.bytes_before.max()) for one in scores.values())
        return Grid(log_edges(furthest + 1), "bytes", unit)
    trained = tuple(run.config.data.length for run in runs.values())
    return Grid(log_edges(material.length, also=trained), "tokens", unit)


def _score(
    config: CurvesConfig, name: str, run: Run, material: Material, progress: Progress, context: int | None = None
) -> Scores:
    model = MesaNet(stretched(run, material.length))
    apply = jax.jit(lambda params, tokens: model.apply(params, tokens)[0], compiler_options=compiler_options())
    watch = progress.watch(f"{name}, last {context} tokens" if context else name)
    batch_size = config.batch_size * max(1, material.length // context) if context else config.batch_size
    choices = {"length": material.length, "batch_size": batch_size, "context": context, "watch": watch}
    try:
        return score(lambda tokens: apply(run.params, tokens), material.documents[name], **choices)
    except ValueError as error:
        raise UserError(f"runs: {name} cannot be scored, {error}.") from None


def _sweep(config: CurvesConfig, name: str, run: Run, material: Material, progress: Progress) -> solver.Sweep:
    longest = sorted(material.documents[name], key=lambda document: -len(document.tokens))[: config.sweep_documents]
    edges = log_edges(material.length, per_octave=1, also=(run.config.data.length,))
    return solver.sweep(
        stretched(run, material.length),
        run.params,
        longest,
        Grid(edges, "tokens", "bits per byte" if config.bits_per_byte else "nats per token"),
        Bands(config.bands, seed=config.seed),
        step_budgets=config.step_budgets,
        tolerances=config.tolerances,
        batch_size=min(config.batch_size, len(longest)),
        watch=progress.watch(f"{name}, solver"),
    )


def _print(table: Table) -> None:
    rows = [list(table.header), *(list(row) for row in table.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells))


if __name__ == "__main__":
    cli.run(main, CurvesConfig)
