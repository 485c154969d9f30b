"""Draws what compute buys; every function returns a Figure, which `experiments.pictures` writes."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from experiments.compute.measure import BASELINE, LIMITS, OWN, UNIT
from experiments.compute.worth import Bought, Measured
from experiments.curves.bands import Curve
from experiments.curves.figures import draw_fan, mark_trained
from experiments.pictures import COLORS, DASHES, INK, MARKERS, STYLE, footer, new_figure


def draw_quality(measured: Measured, note: str = "") -> Figure:
    """Loss against arithmetic, loss against time, and recall against arithmetic; other runs as points."""
    with matplotlib.rc_context(STYLE):
        figure = new_figure(12.0, 4.2)
        left, middle, right = figure.subplots(1, 3)
        _draw_tradeoff(left, measured, lambda one: one.effort.flops / 1e6, lambda one: one.loss)
        _draw_tradeoff(middle, measured, lambda one: one.time[0], lambda one: one.loss)
        _draw_tradeoff(right, measured, lambda one: one.effort.flops / 1e6, lambda one: one.recall)
        left.set(title="Loss against arithmetic", xlabel="MFLOPs per token", ylabel=f"loss, {UNIT}")
        middle.set(title="Loss against time", xlabel="time of a batch, own setting = 1", ylabel=f"loss, {UNIT}")
        right.set(title="Recall against arithmetic", xlabel="MFLOPs per token", ylabel=f"recall, {UNIT}")
        left.legend(fontsize=8)
        footer(figure, note)
    return figure


def draw_positions(measured: Measured, fans: dict[str, dict[str, Curve]], note: str = "") -> Figure:
    """Extra loss by position, a panel for each way of limiting the steps."""
    trained = {"": float(measured.run.config.data.length)}
    with matplotlib.rc_context(STYLE):
        figure = new_figure(12.0, 4.2)
        for panel, (way, fan) in zip(figure.subplots(1, len(fans), squeeze=False)[0], fans.items(), strict=True):
            draw_fan(panel, fan, UNIT)
            panel.set_title(f"By {way}")
            mark_trained(panel, trained, next(iter(fan.values())).grid, named=True)
        footer(figure, note)
    return figure


def draw_heads(measured: Measured, note: str = "") -> Figure:
    """Left, how long a head remembers and what steps it takes; right, how hard its systems are along the context."""
    heads, steps = measured.heads, measured.by_head("steps")
    with matplotlib.rc_context(STYLE):
        figure = new_figure(12.0, 4.2)
        left, right = figure.subplots(1, 2)
        for layer in range(len(heads.half_life)):
            style = {"color": COLORS[layer % 6], "marker": MARKERS[layer % 6]}
            left.plot(heads.half_life[layer], steps[layer], linestyle="", label=f"mesa layer {layer}", **style)
            for head, line in enumerate(heads.condition[layer]):
                label = f"mesa layer {layer}" if head == 0 else None
                right.plot(heads.places, line, linestyle=DASHES[layer % 6], linewidth=1, label=label, **style)
        left.axvline(measured.run.config.data.length, color=INK, linewidth=0.8, linestyle=":")
        left.set(title="Memory and work", xlabel="half-life, tokens (dotted: trained length)", ylabel="solver steps")
        right.set(title="How hard the systems are", xlabel="tokens read", ylabel="condition number of H + Λ")
        left.set_xscale("log")
        right.set_xscale("log", base=2)
        right.set_yscale("log")
        right.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        for ax in (left, right):
            ax.grid(visible=True)
            ax.legend(fontsize=8)
        footer(figure, note)
    return figure


def _draw_tradeoff(ax: Axes, measured: Measured, cost, gain) -> None:
    """Lines along each way of limiting the steps, the own setting as a star, other runs as points."""
    own = measured.bought[0]
    for i, way in enumerate(LIMITS):
        points = sorted((one for one in measured.bought if one.effort.way == way), key=lambda one: one.effort.steps)
        if points:
            _draw_points(ax, points, cost, gain, color=COLORS[i], marker=MARKERS[i], linestyle=DASHES[i], label=way)
    ax.plot(cost(own), gain(own).mean, "*", color=INK, markersize=11, label=OWN, zorder=5)
    others = [one for one in measured.bought if one.effort.way == BASELINE]
    for i, one in enumerate(others, start=len(LIMITS)):
        style = {"color": COLORS[i % 6], "marker": MARKERS[i % 6], "linestyle": "", "markersize": 7}
        _draw_points(ax, [one], cost, gain, label=one.effort.label, **style)
    ax.grid(visible=True)


def _draw_points(ax: Axes, points: Sequence[Bought], cost, gain, **style) -> None:
    x, values = [cost(one) for one in points], [gain(one) for one in points]
    mean = np.array([value.mean for value in values])
    # a setting is compared with the own one, document by document, so the bar is that of the difference
    bars = [
        one.extra if one.effort.way in LIMITS and value is one.loss else value
        for one, value in zip(points, values, strict=True)
    ]
    spread = np.array([(bar.mean - bar.low, bar.high - bar.mean) for bar in bars]).T
    ax.errorbar(x, mean, yerr=np.nan_to_num(spread).clip(0), elinewidth=1, capsize=2, **style)
    above = dict(xytext=(2, 4), rotation=60, va="bottom")
    below = dict(xytext=(2, -4), rotation=-60, va="top")
    for place, value, one in zip(x, mean, points, strict=True):
        if one.effort.way in LIMITS:
            side: Any = above if one.effort.way == LIMITS[0] else below
            ax.annotate(one.effort.label, (place, value), textcoords="offset points", fontsize=7, **side)
