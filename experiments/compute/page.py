"""The page about what compute buys: pictures, tables and sentences from what was measured."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.compute.figures import draw_heads, draw_positions, draw_quality
from experiments.compute.measure import BASELINE, OWN, UNIT
from experiments.compute.worth import Band, Measured, looser, positions
from experiments.curves.bands import FEWEST_DOCUMENTS, Bands, save_curves
from experiments.pictures import inline_svg, save_figure
from experiments.webpage import Drawing, Table, page
from mesanet_jax.model import num_parameters

MARK = "What compute buys"  # by which these pages know each other


def write_page(folder: Path, measured: Measured, bands: Bands, notes: Sequence[str], facts: dict[str, str]) -> None:
    """Writes report.html and beside it the pictures and the numbers behind them.

    Args:
      folder: where to; it exists.
      measured: what the page tells.
      bands: how the bands by position are drawn.
      notes: what was read, what was not and why.
      facts: command, commit, seed and what else says where the page comes from.
    """
    note = f"{facts['command']} · commit {facts['commit']} · seed {facts['seed']}"
    _save(folder / "compute.csv", measured)
    run, read, fans = measured.run, measured.read, positions(measured, bands)
    save_curves({f"{way} {x}": one for way, fan in fans.items() for x, one in fan.items()}, folder / "positions.csv")
    blocks = [
        _drawing(folder, note, "compute", draw_quality(measured, note), *_QUALITY),
        settings_table(measured),
        _drawing(folder, note, "positions", draw_positions(measured, fans, note), *_POSITIONS),
        _drawing(folder, note, "heads", draw_heads(measured, note), *_HEADS),
        heads_table(measured),
    ]
    text = page(
        f"{MARK} {run.name}",
        f"{len(read.documents):,} held-out documents, up to {read.length:,} tokens; {len(measured.bought)} settings",
        findings(measured),
        blocks,
        [*notes, *_explanations(measured)],
        facts,
    )
    (folder / "report.html").write_text(text, encoding="utf-8")


def findings(measured: Measured) -> list[str]:
    """Returns what the numbers say, in sentences."""
    own, *_ = measured.bought
    said = [_chosen(measured), _without(measured)]
    for other in measured.bought:
        if other.effort.way == BASELINE:
            said.append(
                f"Against {measured.run.name} the loss of {other.effort.label} is {_banded(other.extra, signed=True)} "
                f"{UNIT}{_told_apart(other.extra)}, for {other.effort.flops / own.effort.flops:.2f} times the "
                f"arithmetic and {other.time[0]:.2f} times the time; a second reading changes "
                f"its loss by {-other.recall.mean:+.3f} {UNIT}, that of {measured.run.name} by {-own.recall.mean:+.3f}."
            )
    return [*said, _remembering(measured), _growing(measured)]


def _told_apart(band: Band) -> str:
    return ", so they cannot be told apart" if band.low <= 0 <= band.high else ""


def _chosen(measured: Measured) -> str:
    own, choice = measured.bought[0], measured.choice
    bearable = f"at most {measured.target:g} {UNIT}"
    if len(own.effort.scores.names) < 2 * FEWEST_DOCUMENTS:
        return f"Too few documents to choose a tolerance by: half of them should be {FEWEST_DOCUMENTS} at least."
    if not looser([one.effort for one in measured.bought]):
        return f"No tolerance looser than the run's own, {own.effort.config.solver.tolerance:g}, was tried."
    if choice is None:
        return f"No looser tolerance that was tried surely costs {bearable}; keep the run's own."
    found = next(one for one in measured.bought if one.effort is choice.effort)
    solver = choice.effort.config.solver
    return (
        f"For a loss that grows by {bearable}, take tolerance={solver.tolerance:g}: {found.effort.steps:.1f} instead "
        f"of {own.effort.steps:.1f} steps per token and head, {found.time[0]:.2f} times the time; on the half of the "
        f"documents that had no say in it the loss changes by {_banded(choice.elsewhere, signed=True)}."
    )


def _without(measured: Measured) -> str:
    """What solving is worth at all, if a budget of no steps was tried."""
    none = [one for one in measured.bought if one.effort.config.solver.max_steps == 0 and one.effort.way != BASELINE]
    own = measured.bought[0]
    if not none:
        return f"The own setting takes {own.effort.steps:.1f} steps per token and head."
    return (
        f"Without solving, the same weights lose {_banded(none[0].extra, signed=True)} {UNIT} and "
        f"{own.recall.mean - none[0].recall.mean:+.3f} of what a second reading saves; {own.effort.steps:.1f} steps "
        f"per token and head take {1 / none[0].time[0]:.2f} times as long as none."
    )


def _remembering(measured: Measured) -> str:
    length, half_life = measured.run.config.data.length, measured.heads.half_life
    long = half_life >= length
    steps = measured.by_head("steps")
    said = f"{long.sum()} of {long.size} heads hardly forget: after the trained length of {length} tokens they still "
    said += "hold half"
    if long.any() and not long.all():
        said += f"; they take {steps[long].mean():.1f} steps, the others {steps[~long].mean():.1f}"
    return said + "."


def _growing(measured: Measured) -> str:
    places, condition = measured.heads.places, measured.heads.condition
    early = int(np.argmin(np.abs(places - 8)))
    before, after = (float(np.median(condition[..., i])) for i in (early, -1))
    layer, head = np.unravel_index(np.argmax(condition[..., -1]), condition.shape[:2])
    grow = "grow harder along the context" if after > before else "do not grow harder along the context"
    return (
        f"Systems {grow}: the median condition number over heads is {before:.3g} after {places[early]} tokens and "
        f"{after:.3g} after {places[-1]}, where that of mesa layer {layer}, head {head}, the hardest, is "
        f"{condition[layer, head, -1]:.3g}."
    )


def settings_table(measured: Measured) -> Table:
    """Every setting in numbers."""
    rows, way = [], ""
    for one in measured.bought:
        effort = one.effort
        if effort.way != way:
            way = effort.way
            rows.append([{OWN: "as it was trained", BASELINE: "other runs"}.get(way, f"another {way}")])
        residual = f"{effort.trace.by_line('residual').mean():.1e}" if effort.trace else "–"
        rows.append(
            [
                effort.label,
                f"{effort.steps:.2f}" if effort.trace else "–",
                residual,
                f"{effort.flops / 1e6:.2f}",
                f"{one.time[0]:.2f} [{one.time[1]:.2f}, {one.time[2]:.2f}]",
                _banded(one.loss),
                _banded(one.extra, signed=True),
                _banded(one.recall),
            ]
        )
    header = [
        "setting",
        "steps",
        "residual",
        "MFLOPs per token",
        "time",
        "loss",
        "extra loss",
        "a second reading saves",
    ]
    caption = (
        "Steps per token, head and mesa layer; residuals are relative, the mean. Time of a batch in that of the own "
        f"setting, by the best rounds, with quartiles. Losses in {UNIT} with 95 % bands; extra loss is paired; recall "
        "is what a second reading saves."
    )
    return Table("The settings", header, rows, caption)


def heads_table(measured: Measured) -> Table:
    """Every head in numbers, those that remember longest first."""
    steps, heads = measured.by_head("steps"), measured.heads
    residual = measured.by_head("residual")
    order = np.dstack(np.unravel_index(np.argsort(-heads.half_life, axis=None), heads.half_life.shape))[0]
    rows = [
        [
            f"layer {layer}, head {head}",
            f"{heads.half_life[layer, head]:,.1f}",
            f"{steps[layer, head]:.2f}",
            f"{residual[layer, head]:.1e}",
            *(f"{x:.3g}" for x in heads.condition[layer, head]),
        ]
        for layer, head in order
    ]
    header = ["mesa layer and head", "half-life", "steps", "residual", *(f"at {place:,}" for place in heads.places)]
    caption = (
        "Half-life: tokens after which half of what was held is forgotten, by the mean logarithm of the forget gate. "
        "Steps and residual under the own setting. Then the condition number after so many tokens, the median over "
        "documents."
    )
    return Table("The heads", header, rows, caption, folded=True)


_QUALITY = (
    "Quality against compute",
    "Loss and recall of the same weights under other solver settings; other runs are points. Bars are 95 % bands over "
    "documents; those of the losses of the settings are paired with the own setting, those of recall are not.",
)
_POSITIONS = (
    "Where in the context it matters",
    "Extra loss of each setting by position, against the own setting; its numbers are in positions.csv.",
)
_HEADS = (
    "Which heads work",
    "Each head is a point or a line. Half-life says how long a head holds what it has read.",
)


def _drawing(folder: Path, note: str, stem: str, figure: Figure, heading: str, caption: str) -> Drawing:
    save_figure(figure, folder, stem, heading, note)
    svg = inline_svg(figure, stem, f"{heading}; its numbers lie beside the page")
    return Drawing(heading, svg, caption, [f"{stem}.svg", f"{stem}.png"])


def _explanations(measured: Measured) -> list[str]:
    read, run = measured.read, measured.run
    return [
        f"{run.name} has {num_parameters(run.params):,} parameters. A step budget is spent on every token as long as "
        "steps change anything; a tolerance stops a token once its relative residual is below, within the run's own "
        "budget. The weights are the same throughout, and were trained under the own setting.",
        f"Recall: {len(read.twice):,} passages of {read.passage:,} tokens are read twice in a row; what is saved is "
        "the loss of the first reading less that of the second.",
        "Arithmetic counts multiply-adds twice, with the steps that were really spent. Time is that of one batch on "
        "this machine, all settings in turns.",
        "A tolerance is chosen by one half of the documents and told by the other, so that the choice is not praised "
        "by what it was chosen on.",
    ]


def _save(path: Path, measured: Measured) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        bands = [f"{name}{end}" for name in ("loss", "extra_loss", "recall") for end in ("", "_low", "_high")]
        writer.writerow(["way", "setting", "steps", "flops_per_token", "time", "time_low", "time_high", *bands])
        for one in measured.bought:
            effort = one.effort
            numbers = effort.steps, effort.flops, *one.time, *one.loss, *one.extra, *one.recall
            writer.writerow([effort.way, effort.label, *numbers])


def _banded(band: Band, *, signed: bool = False) -> str:
    style = "+.4f" if signed else ".4f"
    if np.isnan(band.low):
        return f"{band.mean:{style}}"
    return f"{band.mean:{style}} [{band.low:{style}}, {band.high:{style}}]"
