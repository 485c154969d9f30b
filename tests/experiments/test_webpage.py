"""The page that every report is written into: what a reader gets, read back from the HTML."""

import pytest

from experiments import pictures, webpage
from experiments.webpage import Drawing, Markup, Section, Table
from tests.experiments.pages import Reader, check_self_contained


def made_up_drawing(name):
    figure = pictures.new_figure(4, 3)
    ax = figure.subplots()
    ax.plot([0, 1], color=pictures.INK, markerfacecolor=pictures.PAPER, clip_on=True, label="line")
    ax.fill_between([0, 1], [1, 1], hatch="//")
    return Drawing(name, pictures.inline_svg(figure, name, f'the "{name}" & more'), "caption", ["a.csv"])


def made_up_page(**options):
    blocks = [
        made_up_drawing("loss"),
        made_up_drawing("compute"),
        Table(
            "runs", ["run", "loss"], [["the <first>"], ["<b>mesa</b>", "1.0"], [Markup("<i>ours</i>"), "2"]], "caption"
        ),
        Section("a & b", Markup("<p>said</p>")),
    ]
    facts = webpage.provenance(["python", "-m", "x", "a b"], 7)
    return webpage.page("title", "subtitle", ["mesa < transformer"], blocks, ["note"], facts, **options)


PAGE = made_up_page()


def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere():
    check_self_contained(PAGE)
    check_self_contained(made_up_page(contents=True))


@pytest.mark.parametrize(
    "addition",
    [
        "<script></script>",
        '<img src="https://x.org/a.png">',
        "<style>@import 'a'</style>",
        '<a href="#away"></a>',
        '<p style="background: url(http://x)"></p>',
        '<p id="a"></p><p id="a"></p>',
        '<p onclick="x()"></p>',
    ],
)
def test_a_page_that_loads_or_runs_something_would_be_caught(addition):
    with pytest.raises(AssertionError):
        check_self_contained(PAGE + addition)


def test_the_policy_allows_styles_and_pictures_inside_the_page_alone():
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in PAGE


def test_the_page_has_the_ink_of_its_reader_and_speaks_its_figures():
    svg = PAGE[PAGE.index("<svg") : PAGE.rindex("</svg>")]
    assert "currentColor" in svg and pictures.INK not in svg and pictures.PAPER not in svg
    assert PAGE.count('role="img" aria-label="the &quot;') == 2
    assert "prefers-color-scheme: dark" in PAGE


def test_text_from_outside_is_escaped_and_markup_is_not():
    assert "<b>mesa" not in PAGE and "&lt;b&gt;mesa" in PAGE and "mesa &lt; transformer" in PAGE
    assert "<i>ours</i>" in PAGE and "<p>said</p>" in PAGE


def test_a_row_of_one_cell_heads_a_group_across_the_table():
    assert '<tr class="group"><th scope="rowgroup" colspan="2">the &lt;first&gt;</th></tr>' in PAGE


def test_contents_name_every_heading_and_stand_there_only_if_asked_for():
    assert "nav" not in Reader(PAGE).tags
    links = Reader(made_up_page(contents=True)).references
    assert [r for r in links if "about" in r] == ["#about-loss", "#about-compute", "#about-runs", "#about-a-b"]


def test_the_page_says_where_it_comes_from():
    for text in ("python -m x &#x27;a b&#x27;", "<dt>commit</dt>", "<dt>seed</dt><dd>7</dd>", "jax ", "Python 3."):
        assert text in PAGE


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert webpage.commit() == "unknown"
