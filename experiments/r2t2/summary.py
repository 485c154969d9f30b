"""What the answers of one way to re-route amount to, and how numbers are written in words, tables and pictures.

Among the oracles the first descends on the true label: shares are of its gain. The null oracle, named so, descends on
a wrong label instead; its answers count as right where they are that label, so it is not in line with the others.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from experiments.r2t2.results import Results, Row
from r2t2_jax.evaluate import Paired, interval, mcnemar, pool, recovered

STRATEGIES, SAME_LABELS, ORACLES = "strategies", "same labels", "oracles"
SECTIONS = {  # as the page calls them
    STRATEGIES: "Strategies",
    SAME_LABELS: "Baselines with the same labels or none",
    ORACLES: "Oracles, which know the label of the test",
}
KINDS = {  # of cases
    "fixed": "Fixed: wrong before, right after",
    "broken": "Broken: right before, wrong after",
    "kept": "Kept: the answer is as before",
    "abstained": "Abstained: too little evidence to re-route",
}
SIGNIFICANT = 0.05
ROUNDING = 0.01  # share of answers of one model that two programs may give differently, where two are nearly as likely


class Summary(NamedTuple):
    """Shares and accuracies are between 0 and 1."""

    before: float
    after: float
    gain: float
    low: float  # 95 % interval of the gain
    high: float
    fixed: float
    broken: float
    p: float
    recovered: float  # share of the oracle's gain; NaN where there is none
    count: int

    @property
    def sign(self) -> int:
        """1 where answers became better, -1 where worse, 0 where interval or test leave it open."""
        if self.p >= SIGNIFICANT or self.low <= 0 <= self.high:
            return 0
        return 1 if self.gain > 0 else -1


def summarise(paired: Paired, oracle: Paired | None = None) -> Summary:
    """Summarises answers before and after; without an oracle no share of its gain is known."""
    share = math.nan if oracle is None else recovered(paired, oracle)
    before, after = float(paired.before.mean()), float(paired.after.mean())
    spread = interval(paired)
    return Summary(
        before, after, paired.gain, *spread, paired.fixed, paired.broken, mcnemar(paired), share, len(paired.before)
    )


def pooled(row: Row) -> Paired:
    """The tests of all seeds as one."""
    return pool(list(row.seeds))


def is_null(row: Row) -> bool:
    """Whether a row is the null oracle."""
    return row.section == ORACLES and "null" in row.name.lower()


def true_oracle(results: Results) -> Row | None:
    """The row that shares are of."""
    return next((row for row in results.rows if row.section == ORACLES and not is_null(row)), None)


def null_oracle(results: Results) -> Row | None:
    """The row that is led to wrong labels."""
    return next((row for row in results.rows if is_null(row)), None)


def whole(row: Row, results: Results) -> Summary:
    """A row over all seeds, beside the oracle."""
    oracle = true_oracle(results)
    return summarise(pooled(row), None if oracle is None or is_null(row) else pooled(oracle))


def by_seed(row: Row, results: Results) -> list[Summary]:
    """A row seed by seed, beside the oracle of that seed."""
    oracle = None if is_null(row) else true_oracle(results)
    against: Sequence[Paired | None] = [None] * len(row.seeds) if oracle is None else oracle.seeds
    return [summarise(*pair) for pair in zip(row.seeds, against, strict=True)]


def reached(paired: Paired) -> float:
    """Share of the answers not yet given that are given afterwards; NaN where all were."""
    return float(paired.after[~paired.before].mean()) if not paired.before.all() else math.nan


def check(results: Results) -> None:
    """Checks that all rows speak of the same inputs.

    Raises:
      ValueError: they do not, or names that lead to a place on the page are given twice.
    """
    if not results.rows:
        raise ValueError("rows: there is none; put the strategy that was chosen first.")
    first = results.rows[0]
    for row in results.rows:
        same = _same_inputs(first, row, answers=not is_null(row))
        if row.section not in SECTIONS or not same:
            allowed = ", ".join(SECTIONS)
            remedy = f"answer the inputs of {first.name}, seed by seed" if not same else f"put it into one of {allowed}"
            raise ValueError(f"rows: {row.name} ({row.section}) does not belong beside {first.name}; {remedy}.")
        if row is not first and is_null(row) and _same_inputs(first, row, answers=True):
            raise ValueError(f"rows: {row.name} counts right answers; count the wrong label it is led to instead.")
    if strange := [case.id for case in results.cases if case.kind not in KINDS]:
        raise ValueError(f"cases: {strange[0]} is of no known kind; call it one of {', '.join(KINDS)}.")
    for what, names in {"rows": [r.name for r in results.rows], "cases": [c.id for c in results.cases]}.items():
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{what}: {twice[0]!r} stands there twice; give each its own name.")


def _same_inputs(first: Row, row: Row, *, answers: bool) -> bool:
    """Whether two rows have as many inputs in as many seeds, answered before as the other says if that matters."""
    if [len(pair.before) for pair in first.seeds] != [len(pair.before) for pair in row.seeds]:
        return False
    differ = float((pooled(first).before != pooled(row).before).mean())
    return not answers or differ <= ROUNDING


def percent(share: float) -> str:
    """A share of inputs."""
    return f"{100 * share:.1f} %"


def points(change: float) -> str:
    """A change of the accuracy, in percentage points, with its sign."""
    text = f"{100 * change:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def whole_percent(share: float) -> str:
    """A share of a gain, or a dash where there is no gain to share."""
    return "–" if math.isnan(share) else f"{100 * share:.0f} %".replace("-", "−")


def probability(p: float) -> str:
    """A p-value, no finer than it is worth."""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.01 else f"{p:.2f}"
