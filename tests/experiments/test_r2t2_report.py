"""The page about an evaluation: what a reader gets, held against counts made here from the answers themselves."""

import base64
import csv
import dataclasses
import io
import math
import re

import numpy as np
import PIL.Image
import pytest
import scipy.stats

from experiments.cli import UserError
from experiments.r2t2 import figures, heatmaps, report
from experiments.r2t2.report import write_report
from experiments.r2t2.results import Point, Results
from experiments.r2t2.summary import percent, points, probability
from r2t2_jax.evaluate import Paired
from tests.experiments.evaluations import EXPERTS, SEEDS, answers, made_up_case, made_up_results, made_up_row
from tests.experiments.pages import Reader, check_self_contained

FILES = {"report.html", "gain-and-harm.png", "gain-and-harm.svg"} | {
    f"{name}.csv" for name in ("methods", "ablations", "steps", "transitions", "conditions", "latency", "cases")
}
FACTS = {"command": "python -m experiments.r2t2.evaluate 'a b'", "commit": "abc123", "seed": "0"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    results, folder = made_up_results(), tmp_path_factory.mktemp("report")
    assert write_report(folder, results, ["How <it> was done."], FACTS) == folder / "report.html"
    return results, folder, (folder / "report.html").read_text()


def lines(folder, name):
    with open(folder / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_lies_beside_its_numbers_and_its_picture(written):
    assert {path.name for path in written[1].iterdir()} == FILES
    for name in ("gain-and-harm.png", "gain-and-harm.svg"):
        assert b"commit abc123" in (written[1] / name).read_bytes()


def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere(written):
    check_self_contained(written[2])
    assert "img-src data:" in written[2]


def test_text_from_outside_is_escaped(written):
    assert "<circle>" not in written[2] and "<it>" not in written[2]
    assert "chroma & picture" in Reader(written[2]).text and "How <it> was done." in Reader(written[2]).text


def test_the_page_says_how_it_was_measured_and_where_it_comes_from(written):
    for text in ("<dt>commit</dt>", "abc123", "python -m experiments.r2t2.evaluate &#x27;a b&#x27;"):
        assert text in written[2]


def test_the_table_of_methods_is_right_about_every_answer(written):
    """Counted here from the answers, with scipy's binomial test for McNemar's."""
    results, _, text = written
    rows = {
        row[0]: row[1:] for row in Reader(text).rows if len(row) == 9 and row[0] != "method" and row[1] not in "012"
    }
    gain = {}
    for row in results.rows[:-1]:
        before, after = (np.concatenate([getattr(seed, side) for seed in row.seeds]) for side in Paired._fields)
        fixed, broken = int(np.sum(after & ~before)), int(np.sum(before & ~after))
        gain[row.name] = (fixed - broken) / len(before)
        cells = rows[f"{row.name} {row.note}"]
        p = scipy.stats.binomtest(fixed, fixed + broken).pvalue
        share = gain[row.name] / np.mean([seed.after.mean() - seed.before.mean() for seed in results.rows[6].seeds])
        assert cells[0] == f"{100 * after.mean():.1f} %"
        assert cells[1].startswith(f"{100 * gain[row.name]:+.1f} [".replace("-", "−"))
        assert cells[2:4] == [f"{100 * fixed / len(before):.1f} %", f"{100 * broken / len(before):.1f} %"]
        assert cells[4] == ("< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.01 else f"{p:.2f}")
        assert cells[5] == f"{100 * share:.0f} %".replace("-", "−")
        assert cells[6:] == ["64.0 %", "–" if row.forecast is None else f"{100 * row.forecast:+.1f}"]


def test_an_interval_holds_the_gain_and_is_as_wide_as_theory_says(written):
    for line in lines(written[1], "methods"):
        gain, fixed, broken = (float(line[name]) for name in ("gain", "fixed", "broken"))
        low, high = float(line["low"]), float(line["high"])
        width = 2 * 1.96 * math.sqrt((fixed + broken - gain**2) / int(line["inputs"]))
        assert low <= gain <= high and abs(high - low - width) < 0.12 * width + 0.002


def test_the_files_of_numbers_repeat_the_page(written):
    results, folder, text = written
    read, shown = Reader(text), {tuple(row) for row in Reader(text).rows}
    methods = lines(folder, "methods")
    assert len(methods) == len(results.rows) * (SEEDS + 1)
    for line in methods:
        if line["seed"] != "all" and line["method"] != "null oracle":
            values = [float(line[name]) for name in ("gain", "low", "high", "fixed", "broken", "McNemar p")]
            gain, low, high, fixed, broken, p = values
            share = f"{100 * float(line['share of oracle gain']):.0f} %".replace("-", "−")
            accuracies = [percent(float(line[f"accuracy {when}"])) for when in ("before", "after")]
            cells = [f"{points(gain)} [{points(low)}, {points(high)}]", percent(fixed), percent(broken), probability(p)]
            assert (line["method"], line["seed"], *accuracies, *cells, share) in shown
    whole = [line for line in methods if line["seed"] == "all"]
    for row, line in zip(results.rows, whole, strict=True):
        assert (line["method"], float(line["rerouted"])) == (row.name, row.rerouted)
        assert line["forecast"] == ("" if row.forecast is None else str(row.forecast))
    for line in lines(folder, "latency"):
        milliseconds, share = float(line["milliseconds per input"]), float(line["share"])
        assert (line["part"], f"{milliseconds:.3f}", percent(share), "") in shown
    for line in lines(folder, "ablations"):
        gain, low, high = (points(float(line[name])) for name in ("gain", "low", "high"))
        cells = (f"{gain} [{low}, {high}]", percent(float(line["fixed"])), percent(float(line["broken"])))
        assert (line["setting"], *cells) in shown
    for line in lines(folder, "conditions"):
        assert (
            points(float(line["change"])) + f"{percent(float(line['accuracy before']))}, {line['inputs']}" in read.cells
        )


def test_transitions_and_steps_go_into_their_files_whole(written):
    results, folder, _ = written
    for kind, counts in results.transitions.items():
        cells = {(x["before"], x["after"]): int(x["count"]) for x in lines(folder, "transitions") if x["kind"] == kind}
        assert cells == {(a, b): counts[i, j] for i, a in enumerate(EXPERTS) for j, b in enumerate(EXPERTS)}
    first = [x for x in lines(folder, "steps") if x["strategy"] == "descent, all references"]
    np.testing.assert_array_equal([float(x["accuracy"]) for x in first], results.steps[0].accuracy)


def test_margins_of_the_conditions_are_weighted_by_their_inputs():
    cells = (("clean", "count", 0.5, 0.6, 100), ("blur", "count", 0.2, 0.1, 300), ("clean", "colour", 0.8, 0.8, 100))
    rows = Reader(heatmaps.condition_table(made_up_results(by_condition=cells))).rows
    assert rows[1] == ["count", "+10.050.0 %, 100", "−10.020.0 %, 300", "−5.027.5 %, 400"]
    assert rows[2] == ["colour", "0.080.0 %, 100", "–", "0.080.0 %, 100"]
    assert rows[3][0] == "all questions" and rows[3][-1] == "−4.038.0 %, 500"


def test_a_matrix_has_rows_before_and_columns_after():
    counts = np.array([[5, 9, 0], [0, 2, 1], [0, 0, 3]])
    results = made_up_results(experts=("a", "b", "c"), transitions={"fixed": counts, "broken": np.eye(3, dtype=int)})
    table = heatmaps.transition_tables(results)
    assert Reader(table).rows[1] == ["a", "5", "9", "0"]
    assert "Of 20 fixed answers 10 have another expert on top, most often b instead of a (9)." in table
    assert "No broken answer came with another expert on top." in table


def test_pictures_of_cases_are_inside_the_page_pixel_for_pixel(written):
    results, _, text = written
    first = next(image for image in Reader(text).images if "fixed 2" in image["alt"])
    encoded = first["src"].removeprefix("data:image/png;base64,")
    shown = np.array(PIL.Image.open(io.BytesIO(base64.b64decode(encoded))))
    np.testing.assert_array_equal(shown, results.cases[1].image)
    assert "image-rendering: pixelated" in text


def test_cases_say_right_and_wrong_in_words_and_show_every_neighbour(written):
    results, folder, text = written
    sections = re.findall(r'<section class="case" id="([^"]+)">(.*?)</section>', text, re.DOTALL)
    assert [name for name, _ in sections] == ["case-fixed-2", "case-broken-1", "case-kept-4", "case-abstained-3"]
    shown = {name: Reader(section).text for name, section in sections}
    assert "blue ✗ wrong after red ✓ right" in shown["case-fixed-2"]
    assert "red ✓ right after blue ✗ wrong" in shown["case-broken-1"]
    for section in shown.values():
        assert len(re.findall(r"similarity 0\.\d\d, weight 0\.\d\d", section)) == 8
        assert section.count("not stored") == 1 and "3 more neighbours" in section
        assert re.findall(r"circle \((\d)\)", section) == list("01234567"), "not in the order of their weights"
    written_down = {line["case"]: line for line in lines(folder, "cases")}
    assert float(written_down["fixed 2"]["after chroma"]) == results.cases[1].routing[2]
    assert written_down["fixed 2"]["neighbour 1 question"] == "which colour has the circle (0)?"


def test_routings_are_drawn_to_scale_and_said(written):
    results, _, text = written
    section = text[text.index('id="case-fixed-2"') :]
    for when, routing in (("before", results.cases[1].base_routing), ("after", results.cases[1].routing)):
        widths = re.findall(rf'<i class="{when}" style="width:([\d.]+)%">', section)[:6]
        np.testing.assert_allclose([float(width) for width in widths], 100 * routing, atol=0.05)
    said = ", ".join(f"{name} {x:.2f}" for name, x in zip(EXPERTS, results.cases[1].neighbors[-1].routing, strict=True))
    assert f'aria-label="Routing: {said}"' in section


def test_the_null_oracle_stands_apart_from_what_is_counted_by_right_answers(written):
    svg = (written[1] / "gain-and-harm.svg").read_text()
    assert "existence oracle" in svg and "null oracle" not in svg
    assert sum(row[0].startswith("null oracle") for row in Reader(written[2]).rows) == 1


def test_a_page_with_hardly_anything_to_say_is_a_page(tmp_path):
    row = dataclasses.replace(made_up_row("strategies", "alone", 0.0, 0.0), seeds=(answers(0.0, 0.0),))
    results = Results(
        rows=(row,), experts=EXPERTS, transitions={}, steps=(), ablations=(), by_condition=(), latency=(), cases=(),
        choices=(),
    )  # fmt: skip
    text = write_report(tmp_path, results, [], {}).read_text()
    check_self_contained(text)
    assert "nan" not in Reader(text).text and "changes no answer" in text
    assert "nan" not in (tmp_path / "methods.csv").read_text()


def test_bars_show_what_was_fixed_and_broken_and_cut_what_would_flatten_them():
    rows = [Point(str(i), 0.01, 0.0, 0.02, 0.03, 0.02) for i in range(4)] + [Point("far", -0.5, -0.6, -0.4, 0.0, 0.5)]
    (ax,) = figures.draw_gain_and_harm({"Strategies": rows}).axes
    fixed, broken = ([patch.get_width() for patch in bars] for bars in ax.containers)
    np.testing.assert_allclose(fixed, [3, 3, 3, 3, 0])
    np.testing.assert_allclose(broken[:4], -2)
    assert ax.get_xlim()[1] < 5 and broken[4] == ax.get_xlim()[0]
    assert any(line.get_marker() == "<" for line in ax.lines)
    assert ax.containers[1][0].get_hatch() and not ax.containers[0][0].get_hatch()


def test_steps_show_what_is_fixed_above_zero_and_what_is_broken_below():
    (curve, *_) = made_up_results().steps
    upper, lower = figures.draw_steps([curve]).axes
    np.testing.assert_allclose(upper.lines[0].get_ydata(), 100 * curve.accuracy)
    np.testing.assert_allclose(lower.lines[0].get_ydata(), 100 * curve.fixed)
    np.testing.assert_allclose(lower.lines[1].get_ydata(), -100 * curve.broken)


def test_the_same_results_give_the_same_page(written, tmp_path):
    write_report(tmp_path, made_up_results(), ["How <it> was done."], FACTS)
    for name in FILES - {"gain-and-harm.png"}:
        assert (tmp_path / name).read_bytes() == (written[1] / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda rows: (), "rows: there is none"),
        (lambda rows: (*rows[:1], dataclasses.replace(rows[1], seeds=rows[1].seeds[:2])), "answer the inputs of"),
        (lambda rows: (rows[0], made_up_row("strategies", "other", 0.0, 0.0, right=0.5)), "answer the inputs of"),
        (lambda rows: (rows[0], dataclasses.replace(rows[1], section="others")), "put it into one of"),
        (lambda rows: (rows[0], dataclasses.replace(rows[1], name=rows[0].name)), "stands there twice"),
        (lambda rows: (rows[0], made_up_row("oracles", "null oracle", 0.1, 0.0)), "counts right answers"),
    ],
)
def test_rows_that_are_not_of_the_same_inputs_are_refused_before_anything_is_written(tmp_path, change, complaint):
    results = made_up_results()
    with pytest.raises(ValueError, match=complaint):
        write_report(tmp_path, dataclasses.replace(results, rows=change(results.rows)), [], FACTS)
    assert not list(tmp_path.iterdir())


def test_cases_of_one_name_or_of_no_known_kind_are_refused(tmp_path):
    for cases, complaint in (((made_up_case("fixed", 1),) * 2, "twice"), ((made_up_case("odd", 1),), "no known kind")):
        with pytest.raises(ValueError, match=complaint):
            write_report(tmp_path, made_up_results(cases=cases), [], FACTS)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="output: there is no folder"):
        write_report(tmp_path / "away", made_up_results(), [], FACTS)


def test_a_page_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr(report, "page", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(tmp_path, made_up_results(), [], FACTS)
    assert (tmp_path / "report.html").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
