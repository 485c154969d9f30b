"""One self-contained HTML page: findings on top, figures as inline SVG, tables, and where all of it came from.

Nothing is loaded from elsewhere and nothing runs: no scripts, no fonts, no links out; a policy in the page forbids it.
Pictures can be inside the page only. Text is escaped; what is HTML already says so by its type, `Markup`.
"""

import datetime
import html
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax


class Markup(str):
    """Text that is HTML already, whose parts were escaped by whoever wrote it."""


class Drawing(NamedTuple):
    """A figure of the page."""

    heading: str
    svg: str  # as of pictures.inline_svg
    caption: str
    files: Sequence[str] = ()  # what lies beside the page: the numbers, the picture


class Table(NamedTuple):
    """Rows under a header; the first column names them, the others are numbers or short words.

    A row of one cell is the heading of a group of rows.
    """

    heading: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    folded: bool = False
    words: bool = False  # cells are words, not numbers


class Section(NamedTuple):
    """A part of the page that is neither a drawing nor a table."""

    heading: str
    content: Markup


Block = Drawing | Table | Section

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
caption span { display: block; position: sticky; left: 0; width: max-content; max-width: min(46rem, 100vw - 4rem); }
th, td { padding: .28rem .8rem .28rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
.words th, .words td { text-align: left; white-space: normal; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
tbody th { font-weight: 500; }
tbody tr:hover { background: var(--tint); }
.group th { padding-top: 1rem; color: var(--quiet); font-weight: 400; }
a { color: inherit; text-decoration-color: #0072B2; text-underline-offset: .15em; }
nav ul { display: flex; flex-wrap: wrap; gap: .1rem 1.25rem; padding: 0; list-style: none; font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.25rem; font-size: .9rem; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: .88em ui-monospace, "Cascadia Mono", Menlo, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
summary { cursor: pointer; }
@media (max-width: 40rem) { figure { overflow-x: auto; } figure svg { min-width: 36rem; }
  dl { grid-template-columns: 1fr; } dd { margin: 0 0 .4rem; } body { padding-top: 1.25rem; } }
@media print { .scroll { overflow: visible; } body { max-width: none; } }
"""


def page(
    title: str,
    subtitle: str,
    findings: Sequence[str],
    blocks: Sequence[Block],
    notes: Sequence[str],
    facts: dict,
    *,
    style: str = "",
    contents: bool = False,
) -> str:
    """The whole page as text.

    Args:
      title: of the page and its first heading.
      subtitle: one line under it.
      findings: sentences that stand on top.
      blocks: what follows, each under its own heading.
      notes: how it was measured, a paragraph each.
      facts: where it comes from.
      style: what its blocks need beyond the style of every page.
      contents: whether a list of the headings stands before them.
    """
    listed = [block.heading for block in blocks] if contents else []
    content = "\n".join(_block(block) for block in blocks)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escaped(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<main>
<h1>{escaped(title)}</h1>
<p class="quiet">{escaped(subtitle)}</p>
<section class="findings" aria-label="Findings">{_paragraphs(findings)}</section>{_contents(listed)}
{content}
<h2>How it was measured</h2>
{_paragraphs(notes)}
<h2>Where it comes from</h2>
<dl>{"".join(f"<dt>{escaped(k)}</dt><dd>{_fact(k, v)}</dd>" for k, v in facts.items())}</dl>
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


def anchor(heading: str) -> str:
    """The id of a heading."""
    return "about-" + "-".join(re.findall(r"\w+", heading.lower()))


def table(block: Table) -> Markup:
    """A table without its heading."""
    header = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in block.header)
    body = "".join(_row(row, len(block.header)) for row in block.rows)
    words = ' class="words"' if block.words else ""
    text = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(block.heading)}"><table{words}>'
        f"<caption><span>{escaped(block.caption)}</span></caption><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    if block.folded:
        text = f"<details><summary>{len(block.rows)} rows</summary>{text}</details>"
    return Markup(text)


def escaped(value: object) -> Markup:
    """A value as HTML."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def tint(color: str, share: float) -> Markup:
    """A style attribute: a background that leaves the ink readable on light and on dark paper, full at a share of 1."""
    strength = round(100 * 0.45 * min(share, 1.0))
    return Markup(f' style="background:color-mix(in srgb, {color} {strength}%, transparent)"' if strength else "")


def _block(block: Block) -> str:
    heading = f'<h2 id="{anchor(block.heading)}">{escaped(block.heading)}</h2>\n'
    if isinstance(block, Drawing):
        return heading + _figure(block)
    return heading + (table(block) if isinstance(block, Table) else block.content)


def _contents(headings: Sequence[str]) -> str:
    if not headings:
        return ""
    links = "".join(f'<li><a href="#{anchor(heading)}">{escaped(heading)}</a></li>' for heading in headings)
    return f'\n<nav aria-label="Contents"><ul>{links}</ul></nav>'


def _figure(block: Drawing) -> str:
    files = ""
    if block.files:
        files = " Beside this page: " + ", ".join(f"<code>{escaped(name)}</code>" for name in block.files) + "."
    caption = f"<figcaption>{escaped(block.caption)}{files}</figcaption>"
    return f"<figure>{block.svg}{caption}</figure>"


def _row(row: Sequence[str], width: int) -> str:
    first, *cells = row
    if not cells:
        return f'</tbody><tbody><tr class="group"><th scope="rowgroup" colspan="{width}">{escaped(first)}</th></tr>'
    return f'<tr><th scope="row">{escaped(first)}</th>{"".join(f"<td>{escaped(cell)}</td>" for cell in cells)}</tr>'


def _fact(name: str, value: str) -> str:
    return f"<code>{escaped(value)}</code>" if name in ("command", "commit") else escaped(value)


def _paragraphs(sentences: Sequence[str]) -> str:
    return "".join(f"<p>{escaped(sentence)}</p>" for sentence in sentences)
