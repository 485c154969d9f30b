"""The sentences that a comparison supports, made from the numbers alone.

A claim is about a range of positions and stands on the paired band of that whole range. Ranges grow out of the buckets:
neighbours that say the same are joined and tested again as one, and the narrowest give way until few are left. The
bands hold for all ranges at once: tested bucket by bucket, six in ten comparisons of runs that do not differ would find
a range where they do; so, one or two in ten.
"""

from typing import NamedTuple

import numpy as np

from experiments.curves.bands import FEWEST_DOCUMENTS, Bands, Curve, Grid, contrast, curve, difference, paired, reaching
from experiments.curves.scores import Scores


class Claim(NamedTuple):
    """In places start..stop-1 the first run's loss minus the second's is `mean`, inside the band low..high."""

    start: int
    stop: int
    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """-1 where the first run is better, 1 where it is worse, 0 where the band holds both."""
        return int(self.low > 0) - int(self.high < 0)


def claims(first: Scores, second: Scores, grid: Grid, bands: Bands = Bands(), *, most: int = 4) -> list[Claim]:
    """Splits the axis into at most `most` ranges, neighbours that say different things; the first 8 places are one."""
    first, second = paired(first, second, grid.axis)
    grid = grid._replace(edges=_reached(first, grid))
    inner = (grid.edges == 0) | (grid.edges >= min(8, grid.edges[-1]))
    edges, bands = grid.edges[inner], bands._replace(simultaneous=True)
    while True:
        found = difference(first, second, grid._replace(edges=edges), bands)
        ranges = _claims(found)
        same = [i + 1 for i in range(len(ranges) - 1) if ranges[i].sign == ranges[i + 1].sign]
        if not same and len(ranges) <= most:
            return ranges
        edges = np.delete(edges, same or _weakest_edge(edges))


def alone(name: str, scores: Scores, grid: Grid, bands: Bands = Bands()) -> str:
    """The loss of one run over all positions."""
    whole = curve(scores, grid._replace(edges=grid.edges[[0, -1]]), bands)
    (claim,) = _claims(whole)
    return (
        f"Over all {len(scores.names):,} documents the loss of {name} is {claim.mean:.3f} {grid.unit} "
        f"({_band(claim, bands)})."
    ).replace("+", "")


def compare(names: tuple[str, str], first: Scores, second: Scores, grid: Grid, bands: Bands = Bands()) -> list[str]:
    """Two sentences: over all positions, and by position."""
    first, second = paired(first, second, grid.axis)
    grid = grid._replace(edges=_reached(first, grid))
    whole = grid._replace(edges=grid.edges[[0, -1]])
    (overall,) = _claims(difference(first, second, whole, bands))
    ours, theirs = (curve(scores, whole, bands) for scores in (first, second))
    verdict = {-1: "better", 0: "not significantly different", 1: "worse"}[overall.sign]
    return [
        f"Over all {len(first.names):,} documents the loss is {ours.mean[0]:.3f} {grid.unit} for {names[0]} and "
        f"{theirs.mean[0]:.3f} for {names[1]}: {names[0]} is {verdict} ({_band(overall, bands)}).",
        by_position(names, claims(first, second, grid, bands), grid, bands),
    ]


def by_position(names: tuple[str, str], ranges: list[Claim], grid: Grid, bands: Bands = Bands()) -> str:
    """Says where the first of the two is better, where worse, and where nothing can be said."""
    if all(claim.sign == 0 for claim in ranges):
        return f"Between {names[0]} and {names[1]} there is no significant difference at any position."
    parts, subject = [], f"{names[0]} is"
    for claim in ranges:
        where = _where(claim, grid)
        if claim.sign == 0:
            parts.append(f"there is no significant difference {where}")
            continue
        than = f" than {names[1]}" if subject.startswith(names[0]) else ""
        verdict = "better" if claim.sign < 0 else "worse"
        parts.append(f"{subject} {verdict}{than} by {abs(claim.mean):.3f} {grid.unit} ({_band(claim, bands)}) {where}")
        subject = "it is"
    sentence = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1] + "."
    return sentence if sentence.startswith(names[0]) else sentence[0].upper() + sentence[1:]


def beyond(name: str, scores: Scores, grid: Grid, trained: int, bands: Bands = Bands()) -> str | None:
    """What becomes of one run's loss beyond its trained length, in the documents that go on; None if too few do."""
    scores = reaching(scores, trained, grid.axis)
    end = int(grid.edges[-1])
    if len(scores.names) < FEWEST_DOCUMENTS or not 1 < trained < end:
        return None
    thirds = grid._replace(edges=np.array([0, trained // 2, trained, end]))
    claim = Claim(trained, end, *contrast(scores, thirds, 1, 2, bands))
    verb = {-1: "falls", 0: "does not change significantly", 1: "rises"}[claim.sign]
    amount = f" by {abs(claim.mean):.3f} {grid.unit}" if claim.sign else ""
    length = f"{trained:,} tokens" if grid.axis == "tokens" else f"about {trained:,} bytes"
    return (
        f"Beyond the trained length of {length}, the loss of {name} {verb}{amount} against the "
        f"{trained - trained // 2:,} before it ({_band(claim, bands)}; {len(scores.names):,} documents go on)."
    )


def _reached(scores: Scores, grid: Grid) -> np.ndarray:
    """The edges up to the last bucket that holds anything."""
    furthest = scores.position if grid.axis == "tokens" else scores.bytes_before
    return grid.edges[: np.searchsorted(grid.edges, furthest.max(), side="right") + 1]


def _claims(found: Curve) -> list[Claim]:
    columns = (found.grid.edges[:-1], found.grid.edges[1:], found.mean, found.low, found.high)
    return [Claim(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _weakest_edge(edges: np.ndarray) -> int:
    """The inner edge whose removal joins the narrowest bucket, in octaves, to the narrower of its neighbours."""
    widths = np.diff(np.log2(edges + 1))
    joined = np.minimum(widths[:-1], widths[1:]) + 1e-3 * np.maximum(widths[:-1], widths[1:])
    return int(np.argmin(joined)) + 1


def _where(claim: Claim, grid: Grid) -> str:
    starts, ends = claim.start == grid.edges[0], claim.stop == grid.edges[-1]
    if starts and ends:
        return "at all positions together"
    if starts:
        return f"within the first {claim.stop:,} {grid.axis}"
    return f"beyond {claim.start:,} {grid.axis}" if ends else f"from {claim.start + 1:,} to {claim.stop:,} {grid.axis}"


def _band(claim: Claim, bands: Bands) -> str:
    if np.isnan(claim.low):
        return f"too few documents for a band, {FEWEST_DOCUMENTS} are needed"
    return f"{100 * bands.confidence:g} % band {claim.low:+.3f} to {claim.high:+.3f}".replace("-", "−")
