"""Pages of single decisions: what was seen and asked, what was answered, which neighbours moved the routing and how."""

import base64
import io
import re
from collections.abc import Sequence

import numpy as np
import PIL.Image

from experiments.r2t2.results import Case, NeighborCase
from experiments.r2t2.summary import KINDS
from experiments.webpage import Markup, escaped

NEIGHBORS_SHOWN = 5
STYLE = """
.case { margin: 1.25rem 0 2rem; padding: 1rem 1.25rem 1.25rem; border: 1px solid var(--line); border-radius: 6px;
  break-inside: avoid; scroll-margin-top: 1rem; }
.case:target { border-color: #0072B2; box-shadow: 0 0 0 2px #0072B2; }
.case h3 { margin: 0 0 .75rem; font-size: 1.05rem; }
.case .parts { display: grid; grid-template-columns: 10rem minmax(13rem, 1fr) minmax(15rem, 1.25fr); gap: 1rem 1.5rem; }
.case img { display: block; width: 10rem; height: 10rem; image-rendering: pixelated; border-radius: 3px; }
.case dl { grid-template-columns: max-content 1fr; align-content: start; margin: 0; }
.case dd { margin: 0; }
.case p { margin: 1rem 0 0; }
.back { float: right; font-size: .85rem; }
.verdict { white-space: nowrap; font-weight: 600; }
.routes { width: 100%; font-size: .85rem; margin: 0; }
.routes th, .routes td, .routes tr:hover { border: 0; padding: .08rem .5rem .08rem 0; background: none; }
.routes thead th { font-weight: 400; color: var(--quiet); padding-bottom: .3rem; }
.routes td.track { width: 50%; text-align: left; }
.track i { display: block; height: .45rem; min-width: 1px; print-color-adjust: exact; }
.track i.before { background: repeating-linear-gradient(135deg, var(--quiet) 0 2px, transparent 2px 4px); }
.track i.after { background: #0072B2; }
.neighbors { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem 1rem; padding: 0;
  margin: .6rem 0 0; list-style: none; font-size: .82rem; line-height: 1.35; }
.neighbors li { display: grid; gap: .3rem; align-content: start; }
.neighbors img, .missing { width: 6rem; height: 6rem; }
.missing { display: grid; place-items: center; border: 1px dashed var(--quiet); border-radius: 3px;
  color: var(--quiet); }
.neighbors .quiet { font-size: inherit; }
.case details { margin-top: .75rem; }
.spark { display: flex; align-items: flex-end; gap: 2px; height: 1.6rem; width: 6rem;
  border-bottom: 1px solid var(--quiet); }
.spark i { flex: 1; min-height: 1px; background: #0072B2; print-color-adjust: exact; }
.index { columns: 20rem; column-gap: 2rem; font-size: .9rem; }
.index ul { display: block; margin: 0 0 .75rem; padding-left: 1.1rem; list-style: disc; }
.index b { font-weight: 600; }
@media (max-width: 46rem) { .case .parts { grid-template-columns: 1fr; } .case { padding: .75rem .9rem 1rem; } }
"""


def case_pages(cases: Sequence[Case], experts: Sequence[str]) -> Markup:
    """Returns an index of the cases and a section each, grouped by kind."""
    ordered = [case for kind in KINDS for case in cases if case.kind == kind]
    legend = (
        f"Bars are expert weights between 0 and 1: hatched before, blue after. The small bars of a neighbour are its "
        f"routing, in the order {', '.join(experts)}. Neighbours stand in the order of their weights."
    )
    pages = "".join(_case(case, experts) for case in ordered)
    return Markup(f'{_index(ordered)}<p class="quiet">{escaped(legend)}</p>{pages}')


def case_anchor(case: Case) -> str:
    """The id of a case on the page."""
    return "case-" + re.sub(r"\s", "-", case.id)


def picture(image: np.ndarray, what: str) -> Markup:
    """An image inside the page, pixel for pixel."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.asarray(image, np.uint8)).save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    height, width = image.shape[:2]
    size = f'width="{width}" height="{height}"'
    return Markup(f'<img src="data:image/png;base64,{data}" {size} alt="{escaped(what)}" loading="lazy">')


def verdict(answer: str, truth: str) -> Markup:
    """An answer and whether it is right, in words."""
    mark = "✓ right" if answer == truth else "✗ wrong"
    return Markup(f'{escaped(answer)} <span class="verdict">{mark}</span>')


def _index(cases: Sequence[Case]) -> str:
    groups = []
    for kind, title in KINDS.items():
        links = "".join(
            f'<li><a href="#{escaped(case_anchor(case))}">{escaped(case.question)}</a> '
            f'<span class="quiet">{escaped(_turn(case))}</span></li>'
            for case in cases
            if case.kind == kind
        )
        groups += [f"<b>{title}</b><ul>{links}</ul>"] if links else []
    return f'<nav class="index" aria-label="Cases">{"".join(groups)}</nav>'


def _case(case: Case, experts: Sequence[str]) -> str:
    facts = {
        "condition": escaped(case.condition),
        "question": escaped(case.question),
        "truth": escaped(case.truth),
        "before": verdict(case.before, case.truth),
        "after": verdict(case.after, case.truth),
    }
    seen = picture(case.image, f"Scene of case {case.id}, {case.condition}")
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    return (
        f'<section class="case" id="{escaped(case_anchor(case))}"><a class="back" href="#about-cases">all cases</a>'
        f"<h3>{escaped(case.kind.capitalize())}: {escaped(case.question)} {escaped(_turn(case))}</h3>"
        f'<div class="parts">{seen}<dl>{listed}</dl>{_routes(case, experts)}</div>'
        f"<p>{escaped(case.sentence)}</p>{_neighbors(case.neighbors, experts)}</section>"
    )


def _turn(case: Case) -> str:
    return f"{case.before} → {case.after}" if case.before != case.after else f"{case.before} stays"


def _routes(case: Case, experts: Sequence[str]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escaped(name)}</th><td class="track">{_bar("before", before)}{_bar("after", after)}</td>'
        f"<td>{before:.2f}</td><td>{after:.2f}</td></tr>"
        for name, before, after in zip(experts, case.base_routing, case.routing, strict=True)
    )
    header = '<th scope="col">expert</th><td></td><th scope="col">before</th><th scope="col">after</th>'
    return f'<table class="routes"><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>'


def _bar(when: str, weight: float) -> str:
    return f'<i class="{when}" style="width:{100 * weight:.1f}%"></i>'


def _neighbors(neighbors: Sequence[NeighborCase], experts: Sequence[str]) -> str:
    """The heaviest, the others folded away."""
    ordered = sorted(neighbors, key=lambda neighbor: -neighbor.weight)
    cards = [_neighbor(neighbor, experts) for neighbor in ordered]
    first, rest = cards[:NEIGHBORS_SHOWN], cards[NEIGHBORS_SHOWN:]
    text = f'<ul class="neighbors" aria-label="Neighbours">{"".join(first)}</ul>' if first else ""
    if rest:
        more = f"{len(rest)} more neighbour{'s' if len(rest) > 1 else ''}"
        text += f'<details><summary class="quiet">{more}</summary><ul class="neighbors">{"".join(rest)}</ul></details>'
    return text


def _neighbor(neighbor: NeighborCase, experts: Sequence[str]) -> str:
    if neighbor.image is None:
        seen = '<span class="missing">not stored</span>'
    else:
        seen = picture(neighbor.image, f"Scene of a neighbour: {neighbor.question} {neighbor.answer}")
    top = int(np.argmax(neighbor.routing))
    return (
        f"<li>{seen}<span>{escaped(neighbor.question)} <b>{escaped(neighbor.answer)}</b></span>"
        f'<span class="quiet">similarity {neighbor.similarity:.2f}, weight {neighbor.weight:.2f}</span>'
        f'{_spark(neighbor.routing, experts)}<span class="quiet">mostly {escaped(experts[top])}, '
        f"{neighbor.routing[top]:.2f}</span></li>"
    )


def _spark(routing: np.ndarray, experts: Sequence[str]) -> str:
    said = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(experts, routing, strict=True))
    bars = "".join(f'<i style="height:{100 * weight:.0f}%"></i>' for weight in routing)
    return f'<span class="spark" role="img" title="{escaped(said)}" aria-label="Routing: {escaped(said)}">{bars}</span>'
