"""The page about an evaluation of re-routing: findings, tables, pictures and single decisions, in one file.

The numbers lie beside it as CSV, the picture of gain and harm as SVG and PNG.
"""

from collections.abc import Sequence
from pathlib import Path

from experiments import pictures
from experiments.cli import UserError
from experiments.r2t2 import cases, heatmaps
from experiments.r2t2.figures import draw_ablations, draw_gain_and_harm, draw_steps
from experiments.r2t2.findings import findings
from experiments.r2t2.folder import write
from experiments.r2t2.numbers import csv_files
from experiments.r2t2.results import Point, Results, Row
from experiments.r2t2.summary import (
    ORACLES,
    SECTIONS,
    Summary,
    by_seed,
    check,
    is_null,
    null_oracle,
    percent,
    points,
    pooled,
    probability,
    reached,
    true_oracle,
    whole,
    whole_percent,
)
from experiments.webpage import Block, Drawing, Markup, Section, Table, escaped, page

STYLE = """
.name { font-weight: 500; } .name.chosen { font-weight: 700; }
.note { display: block; min-width: 10rem; max-width: 24rem;
  color: var(--quiet); font-size: .82rem; font-weight: 400; line-height: 1.35; }
td .level { display: inline-block; width: 8rem; text-align: left; }
td .level i { display: block; height: .6rem; background: #0072B2; print-color-adjust: exact; }
"""
MAIN = "gain-and-harm"


def write_report(folder: Path, results: Results, notes: Sequence[str], facts: dict[str, str]) -> Path:
    """Writes report.html and beside it its numbers and its main picture; the page last, each file whole or not at all.

    Args:
      folder: where to; it exists.
      results: what was measured, the chosen strategy first. Shares are of the gain of the first oracle that is not
        called null; the null oracle counts as right the wrong label that it is led to.
      notes: how it was measured, a paragraph each.
      facts: command, commit and what else says where the page comes from.

    Returns:
      The path of the page.

    Raises:
      UserError: the folder does not exist.
      ValueError: the rows are not of the same inputs.
    """
    if not folder.is_dir():
        raise UserError(f"output: there is no folder {folder}; name one that exists.")
    check(results)
    for name, content in _files(results, notes, facts).items():
        write(folder / name, content)
    return folder / "report.html"


def _files(results: Results, notes: Sequence[str], facts: dict[str, str]) -> dict[str, bytes]:
    note = " · ".join(f"{name} {facts[name]}" for name in ("command", "commit", "seed") if name in facts)
    figure = draw_gain_and_harm(_bars(results), apart=(SECTIONS[ORACLES],), note=note)
    title = "What re-routing fixes and what it breaks"
    files = {name: text.encode() for name, text in csv_files(results).items()}
    files[f"{MAIN}.svg"] = pictures.svg(figure, title, note).encode()
    files[f"{MAIN}.png"] = pictures.png(figure, title, note)
    svg = pictures.inline_svg(figure, MAIN, f"{title}; its numbers are in the table above")
    files["report.html"] = _page(results, svg, notes, facts).encode()
    return files


def _page(results: Results, svg: str, notes: Sequence[str], facts: dict[str, str]) -> str:
    chosen = results.rows[0]
    inputs = f"{sum(len(seed.before) for seed in chosen.seeds):,} test inputs"
    number = f" of {len(chosen.seeds)} seeds" if len(chosen.seeds) > 1 else ""
    return page(
        f"Re-routing at test time: {chosen.name}",
        f"What it fixes and what it breaks, against the same frozen model with its own routing, on {inputs}{number}",
        findings(results),
        _blocks(results, svg),
        notes,
        facts,
        style=STYLE + heatmaps.STYLE + cases.STYLE,
        contents=True,
    )


def _blocks(results: Results, svg: str) -> list[Block]:
    """What there is something to say about, in the order of the page."""
    blocks: list[Block] = [methods_table(results), seeds_table(results), _main_drawing(svg)]
    if null_oracle(results):
        blocks.append(steering_table(results))
    if results.steps:
        blocks.append(_steps_drawing(results))
    if results.transitions:
        blocks.append(Section("Which expert took over", heatmaps.transition_tables(results)))
    if results.by_condition:
        blocks.append(Section("By condition and question", heatmaps.condition_table(results)))
    if results.ablations:
        blocks.append(_ablations_drawing(results))
        blocks.append(ablations_table(results))
    if results.latency:
        blocks.append(latency_table(results))
    if results.choices:
        blocks.append(choices_table(results))
    if results.cases:
        blocks.append(Section("Cases", cases.case_pages(results.cases, results.experts)))
    return blocks


def methods_table(results: Results) -> Table:
    """Every way to answer, over all seeds."""
    header = ["method", "accuracy", "gain [95 %]", "fixed", "broken", "p", "of oracle", "re-routed", "forecast"]
    rows: list[Sequence[str]] = []
    for section, title in SECTIONS.items():
        members = [row for row in results.rows if row.section == section and not is_null(row)]
        rows += [[title]] if members else []
        rows += [[_named(row, results), *_numbers(whole(row, results)), *_rest(row)] for row in members]
    base = percent(whole(results.rows[0], results).before)
    caption = (
        f"Of all inputs; the frozen router alone answers {base} right. Gains in percentage points, with their paired "
        "bootstrap interval over the inputs of all seeds and McNemar's exact p; neither holds how much models of "
        "different seeds differ. Of oracle: share of the first oracle's gain. Forecast: the gain that leaving each "
        "reference out once promised. In bold: chosen on the development set."
    )
    return Table("Every way to answer", header, rows, caption)


def seeds_table(results: Results) -> Table:
    """The same seed by seed."""
    header = ["method", "seed", "before", "accuracy", "gain [95 %]", "fixed", "broken", "p", "of oracle"]
    rows = [
        [row.name, str(i), percent(seed.before), *_numbers(seed)]
        for row in results.rows
        if not is_null(row)
        for i, seed in enumerate(by_seed(row, results))
    ]
    return Table("Seed by seed", header, rows, folded=True)


def steering_table(results: Results) -> Table:
    """What the oracle reaches, and what the null oracle."""
    rows = []
    for row in (true_oracle(results), null_oracle(results)):
        if row is not None:
            paired = pooled(row)
            shares = [float(paired.before.mean()), float(paired.after.mean()), reached(paired)]
            rows.append([_named(row, results), *("–" if x != x else percent(x) for x in shares)])
    caption = (
        "How often the label that an oracle is led to is said: the right one, or a random wrong one of the same kind. "
        "The more alike the two, the more an oracle's gain tells how far routings push answers, not how well they look."
    )
    header = ["oracle", "said before", "said after", "reached where not said before"]
    return Table("What the oracle's headroom is made of", header, rows, caption)


def ablations_table(results: Results) -> Table:
    """The numbers of the ablations' picture."""
    rows: list[Sequence[str]] = []
    for ablation in results.ablations:
        rows.append([f"{ablation.title}: {ablation.note}" if ablation.note else ablation.title])
        rows += [[point.label, *_gain(point), percent(point.fixed), percent(point.broken)] for point in ablation.points]
    header = ["setting", "gain [95 %]", "fixed", "broken"]
    return Table("Numbers of the ablations", header, rows, "On the development set.", folded=True)


def latency_table(results: Results) -> Table:
    """Where the time goes."""
    rows = [
        [
            part,
            f"{milliseconds:.3f}",
            percent(share),
            Markup(f'<span class="level"><i style="width:{100 * share:.1f}%"></i></span>'),
        ]
        for part, milliseconds, share in results.latency
    ]
    return Table("Where the time goes", ["part", "ms per input", "share", ""], rows, "On the machine named below.")


def choices_table(results: Results) -> Table:
    """What was tuned."""
    header = ["choice", "candidates", "chosen"]
    return Table(
        "Chosen on the development set", header, results.choices, "The test was not looked at for these.", words=True
    )


def _named(row: Row, results: Results) -> Markup:
    chosen = " chosen" if row is results.rows[0] else ""
    return Markup(
        f'<span class="name{chosen}">{escaped(row.name)}</span> <span class="note">{escaped(row.note)}</span>'
    )


def _numbers(total: Summary) -> list[str]:
    shares = [percent(total.fixed), percent(total.broken)]
    return [percent(total.after), *_gain(total), *shares, probability(total.p), whole_percent(total.recovered)]


def _gain(value: Summary | Point) -> list[str]:
    return [f"{points(value.gain)} [{points(value.low)}, {points(value.high)}]"]


def _rest(row: Row) -> list[str]:
    return [percent(row.rerouted), "–" if row.forecast is None else points(row.forecast)]


def _bars(results: Results) -> dict[str, list[Point]]:
    """The rows of the main picture by the titles of their sections."""
    bars: dict[str, list[Point]] = {}
    for section, title in SECTIONS.items():
        for row in results.rows:
            if row.section == section and not is_null(row):
                total = whole(row, results)
                point = Point(row.name, total.gain, total.low, total.high, total.fixed, total.broken)
                bars.setdefault(title, []).append(point)
    return bars


def _main_drawing(svg: str) -> Drawing:
    caption = (
        "Bars: answers fixed (blue, to the right) and broken (orange and hatched, to the left). Dots: the net gain "
        "with its 95 % interval; an arrow stands for one beyond the frame. The oracles have an axis of their own."
    )
    files = [f"{MAIN}.svg", f"{MAIN}.png", "methods.csv"]
    return Drawing("Gain and harm", svg, caption, files)


def _steps_drawing(results: Results) -> Drawing:
    svg = pictures.inline_svg(draw_steps(results.steps), "steps", "Accuracy by step; its numbers are in steps.csv")
    caption = "Over all seeds. Above: accuracy, dotted where it starts. Below: what has been fixed and broken by then."
    return Drawing("Step by step", svg, caption, ["steps.csv"])


def _ablations_drawing(results: Results) -> Drawing:
    figure = draw_ablations(results.ablations)
    svg = pictures.inline_svg(figure, "ablations", "Ablations; their numbers are in the table below")
    caption = "On the development set, one choice changed at a time; drawn as gain and harm above, on one axis."
    return Drawing("What each choice changes", svg, caption, ["ablations.csv"])
