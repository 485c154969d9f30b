"""Draw the next-token log-likelihood of trained runs by position: where in the context does which model win?

  python -m experiments.mesanet.curves runs/mesa runs/transformer         mesa against transformer, one HTML page
  python -m experiments.mesanet.curves runs/mesa --rulers 16 64 256       how much does mesa need the far past?
  python -m experiments.mesanet.curves runs/a runs/b --bits-per-byte      two tokenizers

Every held-out document is read alone, from its start, up to twice the length the runs were trained on. The page opens
with the sentences the numbers support; under them the curves with bootstrap bands, their paired difference and, for
mesa layers, the solver: its steps and residual by position, and the loss under other step budgets and tolerances.
"""

import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tyro
from tqdm import tqdm

from experiments import cli
from experiments.cli import UserError
from experiments.curves import solver
from experiments.curves.bands import Bands, Grid, log_edges, shared_text
from experiments.curves.page import Results, runs_table, write_page
from experiments.curves.scores import Scores, Watch, score
from experiments.data import Document, held_out_documents
from experiments.mesh import compiler_options
from experiments.pictures import COLORS
from experiments.runs import Run, open_run
from experiments.webpage import Table, provenance
from mesanet_jax import MesaNet


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvesConfig:
    """What is scored and how it is drawn.

    Attributes:
      runs: folders of trained runs; the first is compared with each of the others.
      output: folder of the page and its files; empty means "curves" in the folder of the first run.
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
        if any(steps < 0 for steps in self.step_budgets) or not all(0 < t < 1 for t in self.tolerances):
            raise ValueError("CurvesConfig: step_budgets must be at least 0, tolerances between 0 and 1.")


class Material(NamedTuple):
    """The same texts for every run, each in the run's own tokens."""

    documents: dict[str, list[Document]]
    length: int
    same_tokens: bool
    notes: list[str]  # what is scored, what is not and why


class _Progress:
    """A bar on a terminal; elsewhere a line every quarter of a minute."""

    def __init__(self):
        self._told = time.monotonic()

    def watch(self, label: str) -> Watch:
        """What to wrap batches in while the thing of that name is worked on."""

        def batches_with_progress(batches: Sequence) -> Iterator:
            if sys.stderr.isatty():
                yield from tqdm(batches, desc=label, unit="batch", leave=False, dynamic_ncols=True)
                return
            for i, batch in enumerate(batches, start=1):
                yield batch
                if time.monotonic() - self._told > 15:
                    self._told = time.monotonic()
                    print(f"{label}: {i} of {len(batches)} batches", flush=True)

        return batches_with_progress


def main(config: CurvesConfig) -> None:
    """Scores the runs, writes the page, prints one table and what was drawn."""
    runs = _open(config.runs)
    material = _material(config, runs)
    output = Path(config.output or config.runs[0] / "curves")
    count = len(next(iter(material.documents.values())))
    print(
        f"reads {count:,} held-out documents, up to {material.length:,} tokens each, with {', '.join(runs)}", flush=True
    )
    with _draft(output) as draft:
        results = _measure(config, runs, material)
        facts = provenance(["python", "-m", _command(), *sys.argv[1:]], config.seed)
        try:
            write_page(Path(draft), runs, results, Bands(config.bands, seed=config.seed), material.notes, facts)
        except OSError as error:
            raise UserError(f"output: {output} has no room ({error.strerror}); what it held is untouched.") from None
        files = sorted(path.name for path in Path(draft).iterdir())
        for name in files:
            os.replace(Path(draft) / name, output / name)
    _print(runs_table(runs, results))
    print("\n".join(str(output / name) for name in files if name.endswith((".png", ".html"))))


def _command() -> str:
    """The module that was started: this one, or an experiment that draws its curves with it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else __name__


def _draft(output: Path) -> tempfile.TemporaryDirectory:
    """A folder inside the output, so that a page replaces an older one only when it is whole."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=output, prefix=".draft-")
    except OSError as error:
        raise UserError(f"output: {output} cannot be written ({error.strerror}); give another folder.") from None


def _open(paths: Sequence[Path]) -> dict[str, Run]:
    """Opens the runs under names of their own: the folder's, or the path where two folders share it."""
    runs = [open_run(path) for path in paths]
    names = [run.name if sum(run.name == r.name for r in runs) == 1 else str(run.path) for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"runs: {names[0]} is named twice; name different folders.")
    return dict(zip(names, runs, strict=True))


def _material(config: CurvesConfig, runs: dict[str, Run]) -> Material:
    """Draws the documents and decides how far they are read, before anything is scored."""
    first = next(iter(runs.values()))
    every = {name: held_out_documents(first.config.data, run.tokenizer) for name, run in runs.items()}
    drawn = _draw(config, len(every[next(iter(runs))]))
    documents = {name: [found[i] for i in drawn] for name, found in every.items()}
    same = _same_tokens(list(documents.values()))
    if not same and not config.bits_per_byte:
        raise UserError("runs: they use different tokenizers; add --bits-per-byte to compare them.")
    ours = documents[next(iter(runs))]
    longest = max(len(document.tokens) - 1 for document in ours)
    if longest < max(config.length, 1):
        raise UserError(
            f"length: {config.length} is more than the {longest} tokens of the longest document; ask for less."
        )
    length = config.length or min(longest, 2 * max(run.config.data.length for run in runs.values()))
    beyond_length = sum(max(0, len(document.tokens) - 1 - length) for document in ours)
    scored = sum(min(len(document.tokens) - 1, length) for document in ours)
    notes = [
        f"Scored: {scored:,} tokens of {len(ours):,} held-out documents of "
        f"{' + '.join(first.config.data.source)}, tokens as "
        f"{next(iter(runs))} counts them. Not scored: {len(every[next(iter(runs))]) - len(ours):,} held-out documents "
        f"that were not drawn (num_documents, seed), and {beyond_length:,} tokens that lie beyond position {length:,}."
    ]
    others = [name for name, run in runs.items() if _origin(run) != _origin(first)]
    if others:
        notes.append(f"Beware: {', '.join(others)} was trained on other data, perhaps on these very documents.")
    return Material(documents, length, same, notes)


def _draw(config: CurvesConfig, available: int) -> list[int]:
    wanted = min(config.num_documents or available, available)
    return sorted(np.random.default_rng(config.seed).permutation(available)[:wanted].tolist())


def _same_tokens(documents: Sequence[list[Document]]) -> bool:
    first, *others = documents
    return all(np.array_equal(a.tokens, b.tokens) for other in others for a, b in zip(first, other, strict=True))


def _origin(run: Run) -> tuple:
    data = run.config.data
    return data.source, data.subset, data.split, data.held_out


def _measure(config: CurvesConfig, runs: dict[str, Run], material: Material) -> Results:
    """Runs the models: whole contexts, then rulers of the first, then the solver."""
    progress = _Progress()
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
    config: CurvesConfig, name: str, run: Run, material: Material, progress: _Progress, context: int | None = None
) -> Scores:
    model = MesaNet(_stretched(run, material.length))
    apply = jax.jit(lambda params, tokens: model.apply(params, tokens)[0], compiler_options=compiler_options())
    watch = progress.watch(f"{name}, last {context} tokens" if context else name)
    batch_size = config.batch_size * max(1, material.length // context) if context else config.batch_size
    choices = {"length": material.length, "batch_size": batch_size, "context": context, "watch": watch}
    try:
        return score(lambda tokens: apply(run.params, tokens), material.documents[name], **choices)
    except ValueError as error:
        raise UserError(f"runs: {name} cannot be scored, {error}.") from None


def _sweep(config: CurvesConfig, name: str, run: Run, material: Material, progress: _Progress) -> solver.Sweep:
    longest = sorted(material.documents[name], key=lambda document: -len(document.tokens))[: config.sweep_documents]
    edges = log_edges(material.length, per_octave=1, also=(run.config.data.length,))
    return solver.sweep(
        _stretched(run, material.length),
        run.params,
        longest,
        Grid(edges, "tokens", "bits per byte" if config.bits_per_byte else "nats per token"),
        Bands(config.bands, seed=config.seed),
        step_budgets=config.step_budgets,
        tolerances=config.tolerances,
        batch_size=min(config.batch_size, len(longest)),
        watch=progress.watch(f"{name}, solver"),
    )


def _stretched(run: Run, length: int):
    """The run's model, with room for attention to look back over the whole length."""
    model = run.config.model
    return dataclasses.replace(model, max_context=max(model.max_context, length))


def _print(table: Table) -> None:
    rows = [list(table.header), *(list(row) for row in table.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells))


if __name__ == "__main__":
    cli.run(main, CurvesConfig)
