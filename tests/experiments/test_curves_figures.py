"""Figures of curves: what a viewer gets, read back from the SVG."""

import re
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from experiments import pictures
from experiments.curves import figures
from experiments.curves.bands import Curve, Grid, log_edges
from experiments.curves.figures import Point, Profile
from experiments.curves.page import curve_table

GRID = Grid(log_edges(256, also=(128,)))


def made_up_curve(shift=0.0, far=0.0):
    size = len(GRID.edges) - 1
    mean = 3 - 0.1 * np.arange(size) + shift + far * (GRID.edges[:-1] >= 128)
    low = np.where(np.arange(size) < size - 1, mean - 0.1, np.nan)
    counts = np.arange(size, 0, -1)
    return Curve(GRID, mean, low, mean + 0.1 + 0 * low, counts, counts * np.diff(GRID.edges))


def made_up_figures():
    curves, rulers = {"mesa": made_up_curve(), "transformer": made_up_curve(0.1)}, {"ruler": made_up_curve(0.3)}
    yield (
        "loss",
        figures.draw_curves(
            curves,
            {"mesa − transformer": made_up_curve(-3)},
            rulers=rulers,
            trained={"mesa": 128, "transformer": 128},
            note="python -m experiments.mesanet.curves · commit abc",
        ),
    )
    heads = np.linspace(1, 9, 4)[:, None] + np.zeros(len(GRID.edges) - 1)
    profiles = Profile(GRID, heads), Profile(GRID, 10.0**-heads)
    yield "solver", figures.draw_solver(*profiles, 30, trained=128)
    points = [Point("1", 1, 3.0, 2.9, 3.1), Point("10", 9.5, 2.0, np.nan, np.nan)]
    fan = {"1 steps": made_up_curve(-2), "10 steps": made_up_curve(-3)}
    yield "compute", figures.draw_compute({"step budget": points}, points[1], fan, GRID.unit, trained=128)


FIGURES = dict(made_up_figures())


def words(figure):
    return " ".join(ET.fromstring(pictures.svg(figure, "title")).itertext())


def test_drawing_leaves_matplotlib_and_its_global_state_alone():
    before = dict(matplotlib.rcParams)
    list(made_up_figures())
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("name", FIGURES)
def test_text_of_an_svg_is_text(name):
    assert "<text" in pictures.svg(FIGURES[name], "title")
    assert "tokens read before the prediction" in words(FIGURES[name])
    assert "trained length" in words(FIGURES[name])


def test_the_curve_names_runs_rulers_unit_and_provenance():
    shown = words(FIGURES["loss"])
    for text in (
        "mesa",
        "transformer",
        "ruler",
        "mesa − transformer",
        "nats per token",
        "commit abc",
        "Documents behind",
    ):
        assert text in shown


def test_the_same_figure_gives_the_same_bytes():
    ours, again = (pictures.svg(dict(made_up_figures())["loss"], "title") for _ in range(2))
    assert ours == again


def test_lines_differ_in_more_than_colour():
    lines = [line for line in FIGURES["loss"].axes[0].lines if not line.get_label().startswith("_")]
    assert len({line.get_linestyle() for line in lines[:2]}) == 2
    assert len({line.get_color() for line in lines}) == 3


def test_the_zero_line_lies_in_the_middle_of_the_difference():
    low, high = FIGURES["loss"].axes[1].get_ylim()
    assert low == -high


def test_what_explodes_beyond_the_trained_length_does_not_flatten_the_rest():
    curves = {"mesa": made_up_curve(), "transformer": made_up_curve(0.1, far=100.0)}
    figure = figures.draw_curves(curves, {"mesa − transformer": made_up_curve(-3, -100)}, trained={"mesa": 128})
    assert figure.axes[0].get_ylim()[1] < 5
    assert figure.axes[1].get_ylim()[1] < 10
    assert "▼" in words(figure)


def test_saved_pictures_hold_what_made_them(tmp_path):
    paths = pictures.save_figure(FIGURES["loss"], tmp_path, "loss", "Title", "python -m x · commit abc · seed 0")
    assert [path.suffix for path in paths] == [".svg", ".png"]
    for path in paths:
        assert b"commit abc" in path.read_bytes()


def test_the_table_shows_a_band_where_there_is_one_and_a_dash_where_nothing_was_scored():
    curve = made_up_curve()
    curve.num_tokens[3] = 0
    rows = curve_table({"mesa": curve}, {"mesa − t": made_up_curve(-3)}).rows
    assert rows[0][0] == "1" and rows[-1][0].endswith("–256")
    assert re.fullmatch(r"3\.000 \[2\.900, 3\.100\]", rows[0][3]) and rows[0][4].startswith("+0.000 [")
    assert rows[3][3] == "–" and "[" not in rows[-1][3]
