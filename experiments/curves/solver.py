"""What the solver of mesa layers does along the context, and what the loss gains from its steps."""

import csv
import dataclasses
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments.curves.bands import Bands, Curve, Grid, curve, difference
from experiments.curves.figures import Point, Profile
from experiments.curves.scores import Scores, Watch, score
from experiments.data import Document
from experiments.mesh import compiler_options
from mesanet_jax import MesaNet, MesaNetConfig, apply_with_report
from pallas_kernels import SolverConfig


class Trace(NamedTuple):
    """Means over the scored tokens, a line per mesa layer and head."""

    grid: Grid  # along tokens
    steps: np.ndarray  # [lines, buckets]
    residual: np.ndarray  # [lines, buckets]
    num_tokens: np.ndarray  # [buckets]

    def by_line(self, field: str) -> np.ndarray:
        """Returns the mean [lines] of "steps" or "residual" over all tokens."""
        used = self.num_tokens > 0
        return np.average(getattr(self, field)[:, used], axis=1, weights=self.num_tokens[used])

    def mean_steps(self) -> float:
        """Steps spent per token, head and layer."""
        return float(self.by_line("steps").mean())


class Sweep(NamedTuple):
    """A run under other solver settings, scored on the same tokens."""

    own: Point  # the setting it was trained with
    own_trace: Trace
    series: dict[str, list[Point]]  # way of limiting the steps -> a point per setting, its band paired with own
    fan: dict[str, Curve]  # setting -> its loss minus that of `own`, by position
    traces: dict[float, Trace]  # tolerance -> trace


def has_solver(config: MesaNetConfig) -> bool:
    """Whether any layer solves."""
    return "mesa" in config.pattern


def measure(
    config: MesaNetConfig, params, documents: Sequence[Document], grid: Grid, *, batch_size: int, watch: Watch = iter
) -> tuple[Scores, Trace]:
    """Scores the documents up to the grid's end and traces the solver at every scored token."""
    apply = _compiled(config)
    documents = [document for document in documents if len(document.tokens) > 1]
    reports = []

    def logits_fn(tokens):
        logits, _, report = apply(params, tokens)
        reports.append(jax.device_get(report))
        return logits

    length = int(grid.edges[-1])
    scores = score(logits_fn, documents, length=length, batch_size=batch_size, watch=watch)
    counts = np.array([len(document.tokens) - 1 for document in documents])
    return scores, _trace(reports, np.arange(length) < counts[:, None], grid)


def sweep(
    config: MesaNetConfig,
    params,
    documents: Sequence[Document],
    grid: Grid,
    bands: Bands,
    *,
    step_budgets: Sequence[int],
    tolerances: Sequence[float],
    batch_size: int,
    watch: Watch = iter,
) -> Sweep:
    """Scores the documents under the model's own solver setting, then under every step budget and tolerance."""
    whole = grid._replace(edges=grid.edges[[0, -1]])
    own, own_trace = measure(config, params, documents, grid, batch_size=batch_size, watch=watch)
    loss = curve(own, whole, bands)
    own_point = Point("own setting", own_trace.mean_steps(), *(float(x[0]) for x in (loss.mean, loss.low, loss.high)))
    found = Sweep(own_point, own_trace, {}, {}, {})
    for way, label, solver in settings(config.solver, step_budgets, tolerances):
        scores, trace = own, own_trace
        if solver != config.solver:
            changed = dataclasses.replace(config, solver=solver)
            scores, trace = measure(changed, params, documents, grid, batch_size=batch_size, watch=watch)
        extra = difference(scores, own, whole, bands)
        shifted = (own_point.loss + float(x[0]) for x in (extra.mean, extra.low, extra.high))
        found.series.setdefault(way, []).append(Point(label, trace.mean_steps(), *shifted))
        found.fan[f"{label} steps" if way == "step budget" else label] = difference(scores, own, grid, bands)
        if way == "tolerance":
            found.traces[solver.tolerance] = trace
    return found


def settings(
    own: SolverConfig, step_budgets: Sequence[int], tolerances: Sequence[float]
) -> Iterator[tuple[str, str, SolverConfig]]:
    """Yields (way, label, solver), each once: budgets stop at nothing else, tolerances within the run's own budget."""
    own = dataclasses.replace(own, adjoint_max_steps=None, adjoint_tolerance=None)  # nothing is differentiated
    for steps in dict.fromkeys(step_budgets):
        yield "step budget", f"{steps}", dataclasses.replace(own, max_steps=steps, tolerance=0.0)
    for tolerance in dict.fromkeys(tolerances):
        yield "tolerance", f"{tolerance:g}", dataclasses.replace(own, tolerance=tolerance)


def saving(name: str, found: Sweep, unit: str, *, bearable: float = 0.005) -> str | None:
    """The cheapest setting whose extra loss is surely bearable, as a sentence; None if there is none."""
    points = [p for points in found.series.values() for p in points if p.high - found.own.loss <= bearable]
    best = min(points, key=lambda p: p.steps, default=found.own)
    if best.steps > 0.9 * found.own.steps:
        return None
    way = next(way for way, points in found.series.items() if best in points)
    return (
        f"With a {way} of {best.label} the solver of {name} spends {best.steps:.1f} steps per token and head instead "
        f"of {found.own.steps:.1f}, and the loss changes by {best.loss - found.own.loss:+.4f} {unit}."
    ).replace("by -", "by −")


def save_trace(trace: Trace, path: Path) -> None:
    """Writes steps and residual as CSV, a row per line and bucket."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["layer_and_head", "start", "stop", "steps", "residual", "num_tokens"])
        for line, (steps, residual) in enumerate(zip(trace.steps.tolist(), trace.residual.tolist(), strict=True)):
            edges = trace.grid.edges.tolist()
            rows = zip(edges[:-1], edges[1:], steps, residual, trace.num_tokens.tolist(), strict=True)
            writer.writerows([line, *row] for row in rows)


def save_points(found: Sweep, unit: str, path: Path) -> None:
    """Writes the sweep as CSV, a row per setting."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["way", "setting", "mean_steps", "loss", "low", "high", "unit"])
        writer.writerow(["own", *found.own, unit])
        writer.writerows([way, *point, unit] for way, points in found.series.items() for point in points)


def profiles(trace: Trace) -> tuple[Profile, Profile]:
    """Steps and residual, ready to be drawn; buckets without a token left out."""
    used = trace.num_tokens > 0
    last = int(np.flatnonzero(used)[-1]) + 1
    grid = trace.grid._replace(edges=trace.grid.edges[: last + 1])
    return Profile(grid, trace.steps[:, :last]), Profile(grid, trace.residual[:, :last])


@lru_cache(maxsize=2)
def _compiled(config: MesaNetConfig):
    return jax.jit(partial(apply_with_report, MesaNet(config)), compiler_options=compiler_options())


def _trace(reports: list, seen: np.ndarray, grid: Grid) -> Trace:
    """Averages reports of arrays [l, b, t, h] over the tokens seen [documents, t], bucket by bucket."""
    bucket = np.searchsorted(grid.edges, np.arange(seen.shape[1]), side="right") - 1
    member = np.eye(len(grid.edges) - 1)[bucket]  # [t, buckets]
    num_tokens = seen.sum(axis=0) @ member

    def mean(name: str) -> np.ndarray:
        values = np.concatenate([getattr(report, name) for report in reports], axis=1)[:, : len(seen)]
        by_place = np.where(seen[None, :, :, None], values, 0).sum(axis=1, dtype=np.float64)  # [l, t, h]
        sums = np.einsum("lth,tn->lhn", by_place, member).reshape(-1, member.shape[1])
        return np.divide(sums, num_tokens, out=np.full(sums.shape, np.nan), where=num_tokens > 0)

    return Trace(grid, mean("num_steps"), mean("residual"), num_tokens.astype(np.int64))
