"""One self-contained HTML page: findings on top, figures as inline SVG, tables, and where all of it came from.

Nothing is loaded from elsewhere and nothing runs: no scripts, no fonts, no links out; a policy in the page forbids it.
"""

import datetime
import html
import platform
import shlex
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax

from experiments.curves.bands import Curve


class Drawing(NamedTuple):
    """A figure of the page."""

    heading: str
    svg: str  # as of figures.inline_svg
    caption: str
    files: Sequence[str] = ()  # what lies beside the page: the numbers, the picture


class Table(NamedTuple):
    """Rows under a header; the first column names them, the others are numbers or short words."""

    heading: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    folded: bool = False


STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fffffe; --quiet: #5c5f66; --line: #d9dbe0;
  --tint: #f3f5f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --paper: #17181b; --quiet: #a3a7b0; --line: #3a3d44; --tint: #212328; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; text-wrap: balance; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; }
p, figcaption, li { max-width: 46rem; }
.quiet, figcaption, caption { color: var(--quiet); font-size: .9rem; }
.findings { margin: 1.5rem 0; padding: 1rem 1.25rem; background: var(--tint); border-left: 4px solid #0072B2;
  border-radius: 4px; }
.findings p { margin: .5rem 0; }
.findings p:first-child { font-size: 1.1rem; }
figure { margin: .5rem 0 0; color: var(--ink); }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
figcaption { margin-top: .5rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid #0072B2; outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { padding: .28rem .8rem .28rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
tbody th { font-weight: 500; }
tbody tr:hover { background: var(--tint); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.25rem; font-size: .9rem; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: .88em ui-monospace, "Cascadia Mono", Menlo, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
summary { cursor: pointer; }
@media print { .scroll { overflow: visible; } body { max-width: none; } }
"""


def page(
    title: str,
    subtitle: str,
    findings: Sequence[str],
    blocks: Sequence[Drawing | Table],
    notes: Sequence[str],
    facts: dict,
) -> str:
    """The whole page as text."""
    content = "\n".join(_drawing(block) if isinstance(block, Drawing) else _table(block) for block in blocks)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{_text(title)}</h1>
<p class="quiet">{_text(subtitle)}</p>
<section class="findings" aria-label="Findings">{_paragraphs(findings)}</section>
{content}
<h2>How it was measured</h2>
{_paragraphs(notes)}
<h2>Where it comes from</h2>
<dl>{"".join(f"<dt>{_text(k)}</dt><dd>{_fact(k, v)}</dd>" for k, v in facts.items())}</dl>
</main>
</body>
</html>
"""


def provenance(command: Sequence[str], seed: int) -> dict[str, str]:
    """What one needs to make the page again."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "numpy", "matplotlib"))
    device = jax.devices()[0]
    return {
        "command": shlex.join(command),
        "commit": commit(),
        "seed": str(seed),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": f"Python {platform.python_version()}, {packages}",
        "machine": f"{jax.device_count()} × {device.device_kind} ({device.platform}), {platform.machine()}",
    }


def commit() -> str:
    """The commit of the code that runs, with a word if files differ from it; "unknown" outside a repository."""
    here = Path(__file__).parent
    try:
        revision = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision.stdout.decode().strip() + (" and uncommitted changes" if changes.stdout.strip() else "")


def curve_table(curves: dict[str, Curve], differences: dict[str, Curve]) -> Table:
    """The numbers of the first figure, a row per bucket."""
    first = next(iter(curves.values()))
    axis, edges = first.grid.axis, first.grid.edges
    columns = {**curves, **differences}
    rows = []
    for i, (start, stop) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        place = f"{start + 1:,}" if stop == start + 1 else f"{start + 1:,}–{stop:,}"
        values = [_banded(curve, i, signed=name in differences) for name, curve in columns.items()]
        rows.append([place, f"{first.num_documents[i]:,}", f"{first.num_tokens[i]:,}", *values])
    return Table(
        "The numbers",
        [f"{axis} read", "documents", "tokens scored", *columns],
        rows,
        f"{first.grid.unit}, with the band in brackets. Documents and tokens are those of {next(iter(curves))}.",
        folded=True,
    )


def _banded(curve: Curve, i: int, *, signed: bool) -> str:
    style = "+.3f" if signed else ".3f"
    if curve.num_tokens[i] == 0:
        return "–"
    if curve.low[i] != curve.low[i]:
        return f"{curve.mean[i]:{style}}"
    return f"{curve.mean[i]:{style}} [{curve.low[i]:{style}}, {curve.high[i]:{style}}]"


def _drawing(block: Drawing) -> str:
    files = ""
    if block.files:
        files = " Beside this page: " + ", ".join(f"<code>{_text(name)}</code>" for name in block.files) + "."
    caption = f"<figcaption>{_text(block.caption)}{files}</figcaption>"
    return f"<h2>{_text(block.heading)}</h2>\n<figure>{block.svg}{caption}</figure>"


def _table(block: Table) -> str:
    header = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in block.header)
    body = "".join(
        f'<tr><th scope="row">{_text(first)}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in cells)}</tr>'
        for first, *cells in block.rows
    )
    table = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(block.heading)}"><table>'
        f"<caption>{_text(block.caption)}</caption><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    if block.folded:
        table = f"<details><summary>{len(block.rows)} rows</summary>{table}</details>"
    return f"<h2>{_text(block.heading)}</h2>\n{table}"


def _fact(name: str, value: str) -> str:
    return f"<code>{_text(value)}</code>" if name in ("command", "commit") else _text(value)


def _paragraphs(sentences: Sequence[str]) -> str:
    return "".join(f"<p>{_text(sentence)}</p>" for sentence in sentences)


def _text(value: object) -> str:
    return html.escape(str(value))
