"""The page about one or several runs: what was measured becomes pictures, tables and sentences."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.curves import figures, solver
from experiments.curves.bands import Bands, Curve, Grid, curve, difference, save_curves
from experiments.curves.findings import alone, beyond, compare
from experiments.curves.scores import Scores, save
from experiments.pictures import inline_svg, save_figure
from experiments.runs import Run
from experiments.webpage import Drawing, Table, page
from mesanet_jax.model import num_parameters

MARK = "Next-token log-likelihood of"  # by which these pages know each other


class Results(NamedTuple):
    """Everything that was measured."""

    grid: Grid
    scores: dict[str, Scores]
    rulers: dict[str, Scores]
    sweeps: dict[str, solver.Sweep]


class Picture(NamedTuple):
    """Curves as they are drawn, and the trained lengths on their axis."""

    curves: dict[str, Curve]
    differences: dict[str, Curve]
    rulers: dict[str, Curve]
    trained: dict[str, float]


def write_page(
    folder: Path, runs: dict[str, Run], results: Results, bands: Bands, notes: Sequence[str], facts: dict[str, str]
) -> None:
    """Writes report.html and beside it the pictures, the numbers behind them and the scores.

    Args:
      folder: where to; it exists.
      runs: by name, the one that is compared with the others first.
      results: what was measured of them.
      bands: how the bands are drawn.
      notes: what was scored, what was not and why.
      facts: command, commit, seed and what else says where the page comes from.
    """
    picture = _picture(runs, results, bands)
    note = f"{facts['command']} · commit {facts['commit']} · seed {facts['seed']}"
    for name, scores in results.scores.items():
        save(scores, folder / f"scores-{_slug(name)}.npz")
    blocks = [_loss_block(picture, folder, note), runs_table(runs, results)]
    for name, sweep in results.sweeps.items():
        blocks += _solver_blocks(name, runs[name], sweep, results.grid.unit, folder, note)
    blocks.append(curve_table(picture.curves, picture.differences))
    first, *others = runs
    title = f"{first} against {', '.join(others)}, position by position" if others else f"{first}, position by position"
    source = " + ".join(runs[first].config.data.source)
    documents = f"{len(results.scores[first].names):,} held-out documents of {source}"
    subtitle = f"{MARK} {documents}, up to {results.grid.edges[-1]:,} {results.grid.axis} of context"
    notes = [*notes, *_explanations(runs, results, bands)]
    text = page(title, subtitle, _findings(runs, results, bands), blocks, notes, facts)
    (folder / "report.html").write_text(text, encoding="utf-8")


def _picture(runs: dict[str, Run], results: Results, bands: Bands) -> Picture:
    curves = {name: curve(scores, results.grid, bands) for name, scores in results.scores.items()}
    rulers = {name: curve(scores, results.grid, bands) for name, scores in results.rulers.items()}
    (first, ours), *others = results.scores.items()
    differences = {f"{first} − {name}": difference(ours, theirs, results.grid, bands) for name, theirs in others}
    return Picture(curves, differences, rulers, {name: _trained(name, run, results) for name, run in runs.items()})


def _trained(name: str, run: Run, results: Results) -> float:
    """The trained length on the axis: in tokens, or in the bytes these are on average."""
    if results.grid.axis == "tokens":
        return run.config.data.length
    return run.config.data.length * float(results.scores[name].num_bytes.mean())


def _findings(runs: dict[str, Run], results: Results, bands: Bands) -> list[str]:
    (first, ours), *others = results.scores.items()
    said: list[str | None] = [] if others else [alone(first, ours, results.grid, bands)]
    for name, theirs in others:
        said += compare((first, name), ours, theirs, results.grid, bands)
    for name, run in runs.items():
        said.append(beyond(name, results.scores[name], results.grid, round(_trained(name, run, results)), bands))
    said += [solver.saving(name, sweep, results.grid.unit) for name, sweep in results.sweeps.items()]
    return [sentence for sentence in said if sentence]


def _loss_block(picture: Picture, folder: Path, note: str) -> Drawing:
    figure = figures.draw_curves(
        picture.curves, picture.differences, rulers=picture.rulers, trained=picture.trained, note=note
    )
    save_figure(figure, folder, "loss", "Next-token loss by position", note)
    save_curves({**picture.curves, **picture.differences, **picture.rulers}, folder / "loss.csv")
    caption = (
        "Each point is the mean over a bucket of positions with its 95 % bootstrap band over documents; points without "
        "a band stand on too few documents. Shaded: beyond the trained length. Where a line leaves the frame, the "
        "numbers below go on."
    )
    svg = inline_svg(figure, "loss", "Next-token loss by position; its numbers are in the table below")
    return Drawing("Loss by position", svg, caption, ["loss.csv", "loss.svg", "loss.png"])


def _solver_blocks(name: str, run: Run, sweep: solver.Sweep, unit: str, folder: Path, note: str) -> list:
    blocks: list[Drawing | Table] = [_trace_block(name, run, sweep, folder, note)]
    if sweep.series:
        blocks += [_compute_block(name, run, sweep, unit, folder, note), _settings_table(name, sweep, unit)]
    return blocks


def _compute_block(name: str, run: Run, sweep: solver.Sweep, unit: str, folder: Path, note: str) -> Drawing:
    stem = f"compute-{_slug(name)}"
    figure = figures.draw_compute(sweep.series, sweep.own, _fan(sweep), unit, trained=run.config.data.length, note=note)
    save_figure(figure, folder, stem, f"Loss of {name} against solver steps", note)
    solver.save_points(sweep, unit, folder / f"{stem}.csv")
    save_curves(sweep.fan, folder / f"{stem}-by-position.csv")
    caption = (
        "The longest of the drawn documents under other solver settings. Left: loss against the steps really spent, "
        "bars paired with the run's own setting. Right: where in the context the extra loss of the step budgets arises."
    )
    svg = inline_svg(figure, stem, f"Loss of {name} against solver steps; its numbers are in the table")
    files = [f"{stem}.csv", f"{stem}-by-position.csv", f"{stem}.svg", f"{stem}.png"]
    return Drawing(f"What solver steps buy {name}", svg, caption, files)


def _fan(sweep: solver.Sweep) -> dict[str, Curve]:
    """The step budgets, or the tolerances if there are no others: one colour each is as much as an eye can follow."""
    budgets = {label: curve for label, curve in sweep.fan.items() if label.endswith("steps")}
    return budgets or sweep.fan


def _settings_table(name: str, sweep: solver.Sweep, unit: str) -> Table:
    settings = [("own setting", sweep.own)]
    settings += [(f"{way} {point.label}", point) for way, points in sweep.series.items() for point in points]
    own = sweep.own.loss
    rows = [[label, f"{p.steps:.2f}", f"{p.loss:.4f}", f"{p.loss - own:+.4f}"] for label, p in settings]
    header = ["setting", "steps spent", f"loss, {unit}", "extra loss"]
    return Table(f"Solver settings of {name}", header, rows, folded=True)


def _trace_block(name: str, run: Run, sweep: solver.Sweep, folder: Path, note: str) -> Drawing:
    """Steps from the tolerance nearest to 1e-4, for a fixed budget shows none; residual from the run's own setting."""
    own = run.config.model.solver
    tolerance = own.tolerance or min(sweep.traces, key=lambda t: abs(math.log10(t) + 4), default=0.0)
    trace = sweep.traces.get(tolerance, sweep.own_trace)
    steps, residual = solver.profiles(trace)[0], solver.profiles(sweep.own_trace)[1]
    stem = f"solver-{_slug(name)}"
    figure = figures.draw_solver(steps, residual, own.max_steps, trained=run.config.data.length, note=note)
    save_figure(figure, folder, stem, f"Solver of {name} by position", note)
    solver.save_trace(trace, folder / f"{stem}-steps.csv")
    solver.save_trace(sweep.own_trace, folder / f"{stem}-residual.csv")
    until = f"until the relative residual is {tolerance:g}" if tolerance else "with a fixed budget"
    caption = (
        f"Conjugate gradient steps {until}, and the residual that the run's own setting leaves "
        f"(max_steps {own.max_steps}, tolerance {own.tolerance:g})."
    )
    svg = inline_svg(figure, stem, f"Solver steps and residual of {name} by position")
    files = [f"{stem}-steps.csv", f"{stem}-residual.csv", f"{stem}.svg", f"{stem}.png"]
    return Drawing(f"The solver of {name} along the context", svg, caption, files)


def curve_table(curves: dict[str, Curve], differences: dict[str, Curve]) -> Table:
    """The numbers of the first figure, a row per bucket."""
    first = next(iter(curves.values()))
    axis, edges = first.grid.axis, first.grid.edges
    columns = {**curves, **differences}
    rows = []
    for i, (start, stop) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        place = f"{start + 1:,}" if stop == start + 1 else f"{start + 1:,}–{stop:,}"
        values = [_banded(curve, i, signed=name in differences) for name, curve in columns.items()]
        rows.append([place, f"{first.num_documents[i]:,}", f"{first.num_tokens[i]:,}", *values])
    return Table(
        "The numbers",
        [f"{axis} read", "documents", "tokens scored", *columns],
        rows,
        f"{first.grid.unit}, with the band in brackets. Documents and tokens are those of {next(iter(curves))}.",
        folded=True,
    )


def runs_table(runs: dict[str, Run], results: Results) -> Table:
    """Size, training and overall loss of each run."""
    header = ["run", "mixers", "parameters", "step", "trained length", "nats per token", "perplexity", "bits per byte"]
    rows = []
    for name, run in runs.items():
        scores = results.scores[name]
        loss, bits = scores.nll.mean(), scores.nll.sum() / np.log(2) / max(scores.num_bytes.sum(), 1)
        numbers = [f"{run.step:,}", f"{run.config.data.length:,}", f"{loss:.4f}", f"{np.exp(loss):.3f}", f"{bits:.4f}"]
        rows.append([name, " + ".join(run.config.model.pattern), f"{num_parameters(run.params):,}", *numbers])
    return Table(
        "The runs", header, rows, "Means over all scored tokens; perplexity is the exponential of the mean loss."
    )


def _explanations(runs: dict[str, Run], results: Results, bands: Bands) -> list[str]:
    said = [
        "Every document is read alone from its start, never packed with another. The first point is the prediction "
        "after BOS alone; BOS itself is not predicted. Log-softmax in float32 of the model's logits, sums in float64.",
        f"Bands hold {100 * bands.confidence:g} % of {bands.num_resamples:,} resamples of the documents, since tokens "
        "of one document are not independent; a difference resamples both runs together. The findings use wider bands "
        "that hold for all ranges at once. Fewer documents reach far positions, so the slope of a single curve mixes "
        "more context with other documents; a difference compares the same tokens.",
    ]
    if results.rulers:
        said.append(
            "“Last w tokens only”: the same model reads windows of w tokens that begin with BOS, so each token sees "
            "between 3/4 w and w tokens; where that line parts from the whole context, the far past begins to pay."
        )
    stretched = [name for name, run in runs.items() if "attention" in run.config.model.pattern]
    if stretched:
        said.append(f"Beyond the trained length, full attention ({', '.join(stretched)}) looks back over everything.")
    return said


def _banded(curve: Curve, i: int, *, signed: bool) -> str:
    style = "+.3f" if signed else ".3f"
    if curve.num_tokens[i] == 0:
        return "–"
    if curve.low[i] != curve.low[i]:
        return f"{curve.mean[i]:{style}}"
    return f"{curve.mean[i]:{style}} [{curve.low[i]:{style}}, {curve.high[i]:{style}}]"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip("-.")
