"""Draws gain and harm: what is fixed to the right, what is broken to the left, the net gain as a dot with its interval.

Every function returns a Figure, which `experiments.pictures` writes. Fixed is blue and plain, broken is orange and
hatched, here and wherever the page shows them.
"""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.pictures import COLORS, DASHES, INK, MARKERS, STYLE, footer, new_figure
from experiments.r2t2.results import Ablation, Point, Steps
from experiments.r2t2.summary import points

FIXED, BROKEN = COLORS[0], COLORS[1]
HATCH = "#8f3d00"  # ink is seen on it, be it black or white
LINE = 0.3  # inches per row
CROWD = 3.0  # a bar this many times as long as most is cut, so that the others can be seen


def draw_gain_and_harm(sections: Mapping[str, Sequence[Point]], *, apart: Sequence[str] = (), note: str = "") -> Figure:
    """One row per way to answer, the first of all in bold, a panel per section.

    Args:
      sections: title to rows; gains, fixed and broken as shares of all inputs.
      apart: sections that have an axis of their own, because they are out of reach of the others.
      note: small print under the figure.
    """
    with matplotlib.rc_context(STYLE):
        heights = [LINE * len(rows) + 0.2 for rows in sections.values()]
        figure = new_figure(8.6, sum(heights) + 0.55 * len(heights) + 0.7)
        axes = figure.subplots(len(sections), 1, gridspec_kw={"height_ratios": heights}, squeeze=False)[:, 0]
        together = [row for title, rows in sections.items() if title not in apart for row in rows]
        for i, (ax, (title, rows)) in enumerate(zip(axes, sections.items(), strict=True)):
            _draw_rows(ax, rows, _reach(rows if title in apart else together), bold=i == 0)
            ax.set_title(title)
        axes[-1].set_xlabel("percentage points of all inputs")
        handles = _legend_handles(axes[0])
        figure.legend(handles=handles, loc="outside upper right", ncols=3, fontsize=9)
        footer(figure, note)
    return figure


def draw_steps(curves: Sequence[Steps], *, note: str = "") -> Figure:
    """Accuracy after each step, and beneath it what is fixed and what is broken by then."""
    with matplotlib.rc_context(STYLE):
        figure = new_figure(8.6, 5.6)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1.3, 1))
        for i, curve in enumerate(curves):
            _draw_line(upper, curve.accuracy, i, label=curve.name)
            _draw_line(lower, curve.fixed, i)
            _draw_line(lower, -np.asarray(curve.broken), i)
        upper.axhline(100 * curves[0].accuracy[0], color=INK, linewidth=0.8, linestyle=":")
        upper.set(title="Accuracy by step", ylabel="right answers, %")
        upper.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
        lower.axhline(0, color=INK, linewidth=1)
        lower.set(
            title="Fixed (above zero) and broken (below) by then", ylabel="% of all inputs", xlabel="gradient step"
        )
        lower.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{abs(y):g}"))
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        for ax in (upper, lower):
            ax.grid(True)
        footer(figure, note)
    return figure


def draw_ablations(ablations: Sequence[Ablation], *, columns: int = 2, note: str = "") -> Figure:
    """Small multiples on one axis, drawn as the main figure is."""
    with matplotlib.rc_context(STYLE):
        groups = [ablations[i : i + columns] for i in range(0, len(ablations), columns)]
        heights = [LINE * max(len(ablation.points) for ablation in group) + 0.2 for group in groups]
        figure = new_figure(10.0, sum(heights) + 0.8 * len(heights) + 0.4)
        axes = figure.subplots(len(groups), columns, gridspec_kw={"height_ratios": heights}, squeeze=False)
        reach = _reach([point for ablation in ablations for point in ablation.points])
        for ax in axes.flat[len(ablations) :]:
            ax.remove()
        for i, ablation in enumerate(ablations):
            _draw_rows(axes.flat[i], ablation.points, reach, small=True)
            most = max(len(other.points) for other in groups[i // columns])
            axes.flat[i].set_ylim(most - 0.4, -0.6)
            _name(axes.flat[i], ablation)
        footer(figure, note)
    return figure


def _draw_rows(ax: Axes, rows: Sequence[Point], reach: float, *, bold: bool = False, small: bool = False) -> None:
    """The first row on top; what a bar loses beyond the reach is said by the number beside it."""
    y, frame = np.arange(len(rows)), 106 * reach
    shown = [[min(100 * getattr(row, side), frame) for row in rows] for side in ("fixed", "broken")]
    ax.barh(y, shown[0], color=FIXED, height=0.62, label="fixed")
    ax.barh(
        y, np.negative(shown[1]), color=BROKEN, height=0.62, hatch="////", edgecolor=HATCH, linewidth=0, label="broken"
    )
    ax.axvline(0, color=INK, linewidth=1)
    for i, row in enumerate(rows):
        _draw_net(ax, i, row, reach)
        ax.annotate(
            _numbers(row), (1.01, i), xycoords=("axes fraction", "data"), va="center", fontsize=8 if small else 9
        )
    ax.set(xlim=(-frame, frame), ylim=(len(rows) - 0.4, -0.6))
    ax.set_yticks(y, [row.label for row in rows])
    if bold:
        ax.get_yticklabels()[0].set_fontweight("bold")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{abs(x):g}"))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(True, axis="x")


def _draw_net(ax: Axes, i: int, row: Point, reach: float) -> None:
    """The net gain and its interval, or an arrow where it lies beyond the frame."""
    if abs(row.gain) > reach:
        side = np.sign(row.gain)
        ax.plot([102 * side * reach], [i], ">" if side > 0 else "<", color=INK, markersize=7, zorder=4)
        return
    low, high = (100 * np.clip(bound, -reach, reach) for bound in (row.low, row.high))
    ax.plot([low, high], [i, i], color=INK, linewidth=1.6, solid_capstyle="butt", zorder=3)
    ax.plot([100 * row.gain], [i], "o", color=INK, markersize=6, zorder=4)


def _name(ax: Axes, ablation: Ablation) -> None:
    """The title, and in small print beneath it what the labels are."""
    ax.set_title(ablation.title, pad=18 if ablation.note else None)
    ax.annotate(ablation.note, (0, 1), xycoords="axes fraction", xytext=(0, 5), textcoords="offset points", fontsize=8)


def _legend_handles(ax: Axes) -> list:
    (dot,) = ax.plot([], [], "o-", color=INK, linewidth=1.6, markersize=6, label="net gain, 95 % interval")
    return [*ax.containers, dot]


def _reach(rows: Sequence[Point]) -> float:
    """How far an axis goes: to the longest bar, but not where that would make the others too short to see."""
    longest = np.array([max(row.fixed, row.broken, abs(row.low), abs(row.high)) for row in rows])
    return max(1e-3, float(longest[longest <= CROWD * max(float(np.median(longest)), 1e-3)].max(initial=1e-3)))


def _numbers(row: Point) -> str:
    return f"{points(row.gain)}  [{points(row.low)}, {points(row.high)}]"


def _draw_line(ax: Axes, values: np.ndarray, i: int, label: str | None = None) -> None:
    style = {"color": COLORS[i % 6], "linestyle": DASHES[i % 6], "marker": MARKERS[i % 6]}
    ax.plot(100 * np.asarray(values), label=label, **style)
