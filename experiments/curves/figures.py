"""Draws curves; every function returns a Figure, which `experiments.pictures` writes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from experiments.curves.bands import Curve, Grid
from experiments.pictures import COLORS, DASHES, INK, MARKERS, PAPER, STYLE, footer, new_figure

FAN = ("#D55E00", "#E69F00", "#CC79A7", "#009E73", "#56B4E9", "#0072B2", "#888888")


class Point(NamedTuple):
    """One solver setting of a sweep: what it costs, what it gains."""

    label: str
    steps: float  # conjugate gradient steps per token, head and layer, as spent
    loss: float
    low: float
    high: float


class Profile(NamedTuple):
    """Something every head of every layer has, by bucket of position."""

    grid: Grid
    values: np.ndarray  # [lines, buckets], a line per layer and head


def draw_curves(
    curves: dict[str, Curve],
    differences: dict[str, Curve],
    *,
    rulers: dict[str, Curve] | None = None,
    trained: dict[str, float] | None = None,
    note: str = "",
) -> Figure:
    """The losses with their bands, the differences under them, and how many documents stand behind each bucket.

    Args:
      curves: the runs, in the order of their colours.
      differences: label to difference, drawn in the colours of the runs that follow the first.
      rulers: thin grey lines for comparison, e.g. contexts cut off.
      trained: where a run's trained length lies on the axis; beyond the shortest is shaded.
      note: small print under the figure.
    """
    heights = [3.6, *([2.0] if differences else []), 0.8]
    with matplotlib.rc_context(STYLE):
        figure = new_figure(8.6, sum(heights) + 1.0)
        axes = figure.subplots(len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights}, squeeze=False)[
            :, 0
        ]
        grid = next(iter(curves.values())).grid
        reach = min((trained or {}).values(), default=grid.edges[-1])
        _draw_losses(axes[0], curves, rulers or {}, reach)
        if differences:
            _draw_differences(axes[1], differences, reach)
        _draw_documents(axes[-1], curves)
        for ax in axes:
            _log_axis(ax, grid)
            mark_trained(ax, trained or {}, grid, named=ax is axes[0])
        axes[-1].set_xlabel(_axis_label(grid))
        footer(figure, note)
    return figure


def draw_solver(
    steps: Profile, residual: Profile, budget: int, *, trained: float | None = None, note: str = ""
) -> Figure:
    """Steps taken and residual left by position, a thin line per layer and head, their median thick."""
    with matplotlib.rc_context(STYLE):
        figure = new_figure(8.6, 5.4)
        upper, lower = figure.subplots(2, 1, sharex=True)
        _draw_heads(upper, steps, COLORS[0])
        upper.axhline(budget, color=INK, linewidth=0.8, linestyle=":")
        upper.annotate(f"budget {budget}", (0.01, budget), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
        upper.set_ylim(0, 1.15 * max(budget, 1))
        upper.set_title("Solver steps by position")
        upper.set_ylabel("steps")
        lower.set_yscale("log")
        _draw_heads(lower, residual._replace(values=np.maximum(residual.values, 1e-9)), COLORS[1])
        lower.yaxis.set_minor_formatter(NullFormatter())
        lower.set_title("Relative residual left by the solver")
        lower.set_ylabel("‖q − (H + Λ)x‖ / ‖q‖")
        for ax in (upper, lower):
            _log_axis(ax, steps.grid)
            mark_trained(ax, {} if trained is None else {"": trained}, steps.grid, named=ax is upper)
        lower.set_xlabel(_axis_label(steps.grid))
        footer(figure, note)
    return figure


def draw_compute(
    series: Mapping[str, Sequence[Point]],
    own: Point,
    fan: Mapping[str, Curve],
    unit: str,
    *,
    trained: float | None = None,
    note: str = "",
) -> Figure:
    """Left, loss against the steps spent, per way of limiting them; right, where in the context the loss arises."""
    with matplotlib.rc_context(STYLE):
        figure = new_figure(11.0, 4.6)
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        for i, (label, points) in enumerate(series.items()):
            _draw_points(left, label, points, i)
        left.axhline(own.loss, color=INK, linewidth=0.8, linestyle=":")
        left.annotate("own setting", (0.01, own.loss), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
        left.set_xscale("symlog", linthresh=1, linscale=0.5)
        left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        left.xaxis.set_minor_locator(NullLocator())
        left.set_xticks([0, 1, 2, 5, 10, 20, 30])
        left.set_xlim(left=-0.3)
        left.set(xlabel="solver steps spent per token and head", ylabel=f"loss, {unit}", title="Loss against compute")
        left.legend(fontsize=8)
        draw_fan(right, fan, unit)
        mark_trained(right, {} if trained is None else {"": trained}, next(iter(fan.values())).grid, named=True)
        footer(figure, note)
    return figure


def centers(grid: Grid) -> np.ndarray:
    """Where a bucket stands on the axis: the geometric middle of its first and last number of tokens read."""
    return np.sqrt((grid.edges[:-1] + 1) * grid.edges[1:])


def _draw_losses(ax: Axes, curves: dict[str, Curve], rulers: dict[str, Curve], reach: float) -> None:
    for i, (label, curve) in enumerate(curves.items()):
        _draw_curve(ax, label, curve, i)
    for i, (label, ruler) in enumerate(rulers.items()):
        ax.plot(
            centers(ruler.grid),
            ruler.mean,
            color=INK,
            alpha=0.7,
            linewidth=1,
            linestyle=DASHES[i % 6],
            label=label,
            zorder=3,
        )
    grid = next(iter(curves.values())).grid
    ax.set_title("Next-token loss by position")
    ax.set_ylabel(f"−log-likelihood, {grid.unit}")
    ax.legend(fontsize=9, loc="best")
    _, high = _span(list(curves.values()), reach)
    _cut_off(ax, top=high + 0.25 * (high - ax.get_ylim()[0]))


def _draw_curve(ax: Axes, label: str, curve: Curve, i: int) -> None:
    """A line through the buckets and its band; points without a band are hollow."""
    color, x = COLORS[i % 6], centers(curve.grid)
    bare = np.isnan(curve.low)
    ax.fill_between(x, curve.low, curve.high, color=color, alpha=0.2, linewidth=0)
    ax.plot(x, curve.mean, color=color, linestyle=DASHES[i % 6], label=label, zorder=3)
    for rows, face in ((~bare, color), (bare, PAPER)):
        ax.plot(x[rows], curve.mean[rows], MARKERS[i % 6], color=color, markerfacecolor=face, zorder=4)


def _draw_differences(ax: Axes, differences: dict[str, Curve], reach: float) -> None:
    ax.axhline(0, color=INK, linewidth=1)
    for i, (label, curve) in enumerate(differences.items()):
        _draw_curve(ax, label, curve, i + 1)
    within = 1.4 * max(1e-3, *np.abs(_span(list(differences.values()), reach)))
    limit = min(within, 1.1 * max(1e-3, *np.abs(ax.dataLim.intervaly)))
    ax.set_ylim(-limit, limit)
    for curve in differences.values():
        if abs(curve.mean[-1]) > limit:
            down = curve.mean[-1] < 0
            text = f"{curve.mean[-1]:+.2f} {'▼' if down else '▲'}"
            ax.annotate(text, (0.995, 0.04 if down else 0.9), xycoords="axes fraction", fontsize=8, ha="right")
    first = next(iter(differences)).split(" − ")[0]
    ax.annotate(f"▼ {first} better", (0.005, 0.04), xycoords="axes fraction", fontsize=8)
    ax.annotate(f"▲ {first} worse", (0.005, 0.96), xycoords="axes fraction", fontsize=8, va="top")
    ax.set_title("Difference, with its paired band")
    ax.set_ylabel("difference")
    few = len(differences) < 3
    ax.legend(fontsize=9 if few else 8, loc="best" if few else "upper right", ncols=1 if few else 3)


def _span(curves: Sequence[Curve], reach: float) -> tuple[float, float]:
    """The lowest and highest mean at places before `reach`: what the frame must hold, whatever happens beyond."""
    means = np.concatenate([curve.mean[curve.grid.edges[:-1] < reach] for curve in curves])
    means = means[np.isfinite(means)]
    return (float(means.min()), float(means.max())) if len(means) else (0.0, 1.0)


def _cut_off(ax: Axes, top: float) -> None:
    """Lowers the top of the frame where a run that explodes beyond its trained length would flatten all others."""
    if ax.get_ylim()[1] > top:
        ax.set_ylim(top=top)


def _draw_documents(ax: Axes, curves: dict[str, Curve]) -> None:
    most = np.max([curve.num_documents for curve in curves.values()], axis=0)
    edges = next(iter(curves.values())).grid.edges
    ax.stairs(most, edges + 1, fill=True, color=INK, alpha=0.25, linewidth=0)
    ax.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    ax.set_ylim(0, 1.1 * max(most.max(), 1))
    ax.set_title("Documents behind each point")


def _draw_heads(ax: Axes, profile: Profile, color: str) -> None:
    x = centers(profile.grid)
    for line in profile.values:
        ax.plot(x, line, color=color, linewidth=0.7, alpha=0.45)
    ax.plot(x, np.median(profile.values, axis=0), color=color, linewidth=2.6, label="median over layers and heads")
    ax.plot([], [], color=color, linewidth=0.7, alpha=0.6, label="each layer and head")
    ax.legend(fontsize=8, loc="best")


def _draw_points(ax: Axes, label: str, points: Sequence[Point], i: int) -> None:
    steps, loss = [p.steps for p in points], np.array([p.loss for p in points])
    bars = np.nan_to_num([loss - [p.low for p in points], [p.high for p in points] - loss]).clip(0)
    ax.errorbar(
        steps,
        loss,
        yerr=bars,
        color=COLORS[i],
        linestyle=DASHES[i],
        marker=MARKERS[i],
        label=label,
        elinewidth=1,
        capsize=2,
    )
    corner: dict[str, Any] = {"xytext": (3, 4)} if i == 0 else {"xytext": (-3, -4), "ha": "right", "va": "top"}
    for j, point in enumerate(points):
        ax.annotate(point.label, (steps[j], loss[j]), textcoords="offset points", fontsize=7, rotation=45, **corner)


def draw_fan(ax: Axes, fan: Mapping[str, Curve], unit: str) -> None:
    """Extra loss by position, a line per setting: few steps warm, many cool."""
    ax.axhline(0, color=INK, linewidth=1)
    for i, (label, curve) in enumerate(fan.items()):
        ax.plot(centers(curve.grid), curve.mean, color=FAN[i % len(FAN)], linestyle=DASHES[i % 6], label=label)
    grid = next(iter(fan.values())).grid
    _log_axis(ax, grid)
    ax.set(xlabel=_axis_label(grid), ylabel=f"extra loss, {unit}", title="Extra loss by position")
    if np.abs(ax.get_ylim()).max() > 0.3:
        ax.set_yscale("symlog", linthresh=0.01)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _log_axis(ax: Axes, grid: Grid) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xlim(0.9, 1.05 * grid.edges[-1])
    ax.xaxis.set_major_locator(LogLocator(base=2, numticks=20))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x < 1024 or x % 1024 else f"{x / 1024:g}k"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(True)


def _axis_label(grid: Grid) -> str:
    return "tokens read before the prediction, BOS included" if grid.axis == "tokens" else "bytes of text read"


def mark_trained(ax: Axes, trained: dict[str, float], grid: Grid, *, named: bool) -> None:
    """A line at each trained length; beyond the shortest the paper is shaded."""
    inside = {label: x for label, x in trained.items() if x < grid.edges[-1]}
    for i, x in enumerate(sorted(set(inside.values()))):
        ax.axvline(x, color=INK, linewidth=1, linestyle="--", alpha=0.8)
        if named:
            whose = ", ".join(label for label in inside if inside[label] == x)
            text = "trained length " if len(set(inside.values())) == 1 else f"trained length of {whose} "
            where = {"xycoords": ("data", "axes fraction"), "ha": "right", "va": "top"}
            ax.annotate(text, (x, 1.0 - 0.06 * i), fontsize=8, alpha=0.9, **where)
    if inside:
        ax.axvspan(min(inside.values()), 2 * grid.edges[-1], color=INK, alpha=0.07, linewidth=0)
