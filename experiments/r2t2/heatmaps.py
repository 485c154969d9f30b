"""Tables whose cells are tinted: which experts took over, and where accuracy rose and fell."""

from collections.abc import Sequence

import numpy as np

from experiments.r2t2.figures import BROKEN, FIXED
from experiments.r2t2.results import Results
from experiments.r2t2.summary import percent, points
from experiments.webpage import Markup, escaped, tint

STYLE = """
.heat { border-collapse: separate; border-spacing: 2px; }
.heat th, .heat td, .heat thead th { border: 0; padding: .3rem .6rem; }
.heat tr > :first-child { padding-left: 0; text-align: left; }
.heat td { text-align: center; min-width: 3.4rem; border-radius: 3px; print-color-adjust: exact; }
.heat td small, .heat td.empty { color: var(--quiet); }
.heat td small { display: block; font-size: .74rem; }
.heat td.same { box-shadow: inset 0 0 0 1px var(--quiet); }
.heat thead th:not(:first-child) { text-align: center; }
.heat thead th { font-weight: 500; }
.heat .whole { border-left: 2px solid var(--line); border-radius: 0; }
.heat tbody tr:hover { background: none; }
.beside { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; }
"""


def transition_tables(results: Results) -> Markup:
    """For fixed and for broken answers: the expert with most weight before, in rows, and after, in columns."""
    tables = "".join(
        f"<div>{_transition(kind, np.asarray(counts), results.experts)}</div>"
        for kind, counts in results.transitions.items()
    )
    said = (
        "Counts of answers by the expert with most weight before (rows) and after (columns). Framed: that expert "
        "stayed the same, and only the weights moved."
    )
    moves = " ".join(main_move(kind, np.asarray(c), results.experts) for kind, c in results.transitions.items())
    return Markup(f'<p class="quiet">{escaped(said)} {escaped(moves)}</p><div class="beside">{tables}</div>')


def main_move(kind: str, counts: np.ndarray, experts: Sequence[str]) -> str:
    """The commonest change of the expert with most weight, as a sentence."""
    total, moved = int(counts.sum()), counts - np.diag(np.diag(counts))
    if not moved.any():
        return f"No {kind} answer came with another expert on top."
    before, after = divmod(int(moved.argmax()), len(experts))
    return (
        f"Of {total:,} {kind} answers {int(moved.sum()):,} have another expert on top, most often "
        f"{experts[after]} instead of {experts[before]} ({int(moved.max()):,})."
    )


def condition_table(results: Results) -> Markup:
    """Change of the accuracy by question, in rows, and condition, in columns, with what both add up to."""
    conditions = list(dict.fromkeys(row[0] for row in results.by_condition))
    templates = list(dict.fromkeys(row[1] for row in results.by_condition))
    spread = max((abs(row[3] - row[2]) for row in results.by_condition), default=0) or 1
    body = []
    for template in (*templates, None):
        cells = [_merged(results, condition, template) for condition in (*conditions, None)]
        tinted = "".join(_change(cell, spread, whole=i == len(conditions)) for i, cell in enumerate(cells))
        body.append(f'<tr><th scope="row">{escaped(template or "all questions")}</th>{tinted}</tr>')
    header = [*conditions, "all conditions"]
    said = "Change of the accuracy in percentage points, and beneath it the accuracy before and the number of inputs."
    return _heat("Change by condition and question", said, "question", header, body)


def _transition(kind: str, counts: np.ndarray, experts: Sequence[str]) -> Markup:
    color, most = (FIXED if kind == "fixed" else BROKEN), max(int(counts.max()), 1)
    body = []
    for i, (name, line) in enumerate(zip(experts, counts.tolist(), strict=True)):
        cells = "".join(
            f'<td class="{"same" if i == j else "empty" if n == 0 else "count"}"{tint(color, n / most)}>{n:,}</td>'
            for j, n in enumerate(line)
        )
        body.append(f'<tr><th scope="row">{escaped(name)}</th>{cells}</tr>')
    total = f"{kind}, {int(counts.sum()):,} answers"
    return _heat(f"Experts of {kind} answers", total, "before ↓ after →", experts, body)


def _merged(results: Results, condition: str | None, template: str | None) -> tuple[float, float, int]:
    """Accuracy before and after and the number of inputs of a condition and a template, or of all."""
    rows = [r for r in results.by_condition if condition in (None, r[0]) and template in (None, r[1])]
    count = sum(row[4] for row in rows)
    before, after = (sum(row[2] * row[4] for row in rows), sum(row[3] * row[4] for row in rows))
    return before / max(count, 1), after / max(count, 1), count


def _change(cell: tuple[float, float, int], spread: float, *, whole: bool) -> str:
    before, after, count = cell
    if not count:
        return '<td class="empty">–</td>'
    change = after - before
    style = tint(FIXED if change > 0 else BROKEN, abs(change) / spread)
    place = ' class="whole"' if whole else ""
    return f"<td{place}{style}>{points(change)}<small>{percent(before)}, {count:,}</small></td>"


def _heat(label: str, caption: str, corner: str, header: Sequence[str], body: Sequence[str]) -> Markup:
    heads = "".join(f'<th scope="col">{escaped(name)}</th>' for name in (corner, *header))
    return Markup(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(label)}"><table class="heat">'
        f"<caption><span>{escaped(caption)}</span></caption><thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )
