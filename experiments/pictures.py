"""What every picture shares: matplotlib's objects without its global state, colours, and a way onto paper or a page.

Colours are those of Okabe and Ito, which colour-blind people tell apart, and every line also has its own dash and
marker. Ink and paper are two named colours, so that a page can replace them by its own.
"""

import io
import re
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, PAPER = "#1b1b1f", "#fffffe"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (1, 1)), (0, (8, 2, 2, 2, 2, 2)))
MARKERS = "osD^vP"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "legend.handlelength": 3,
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that lays itself out."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def svg(figure: Figure, title: str, description: str = "") -> str:
    """The figure as SVG whose text is text; the same figure gives the same bytes."""
    buffer = io.StringIO()
    metadata = {"Title": title, "Description": description, "Date": None, "Creator": None}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata=metadata)
    return buffer.getvalue()


def png(figure: Figure, title: str, description: str = "") -> bytes:
    """The figure as PNG, 150 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Title": title, "Description": description})
    return buffer.getvalue()


def inline_svg(figure: Figure, title: str, label: str) -> str:
    """The SVG as part of a page: its ink is the page's, its paper none, its ids its own, and it has a spoken label."""
    text = svg(figure, title)
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "none")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", text)
    size = re.search(r'width="([\d.]+)pt" height="[\d.]+pt"', text)
    width = float(size.group(1)) if size else 600
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{escaped}" style="max-width:{width * 1.35:.0f}px"', 1)


def save_figure(figure: Figure, folder: Path, name: str, title: str, description: str) -> list[Path]:
    """Writes name.svg and name.png, what they show inside; returns the paths."""
    paths = [folder / f"{name}.svg", folder / f"{name}.png"]
    paths[0].write_text(svg(figure, title, description), encoding="utf-8")
    paths[1].write_bytes(png(figure, title, description))
    return paths


def footer(figure: Figure, note: str) -> None:
    """Small print under the figure."""
    if note:
        note = textwrap.fill(note, int(17 * figure.get_figwidth()))
        figure.supxlabel(note, fontsize=7, x=0.01, ha="left", alpha=0.75)
