"""The sentences that an evaluation supports, made from its numbers alone.

A gain is called one where its 95 % interval leaves out zero and McNemar's test agrees; otherwise nothing is claimed.
"""

import math
from typing import NamedTuple

import numpy as np

from experiments.r2t2.results import Results, Row
from experiments.r2t2.summary import (
    SAME_LABELS,
    Summary,
    null_oracle,
    percent,
    points,
    pooled,
    probability,
    reached,
    summarise,
    true_oracle,
    whole,
    whole_percent,
)
from r2t2_jax.evaluate import Paired

NO_BREAK = "\N{NO-BREAK SPACE}"


class Cell(NamedTuple):
    """One kind of input; counts are of inputs."""

    name: str
    change: float  # of the right answers
    count: int

    @property
    def gain(self) -> float:
        """Change of the accuracy."""
        return self.change / max(self.count, 1)


def findings(results: Results) -> list[str]:
    """Returns the sentences on top of the page, the most important first."""
    chosen = results.rows[0]
    total = whole(chosen, results)
    said = [
        headline(chosen, total),
        harm(chosen, total),
        headroom(total, true_oracle(results), results),
        forecast(chosen, total),
        *same_labels(chosen, results),
        where(results),
        steering(results),
    ]
    return [(s[0].upper() + s[1:]).replace(" %", f"{NO_BREAK}%") for s in said if s]


def headline(row: Row, total: Summary) -> str:
    """What the chosen strategy gains."""
    number = len(row.seeds)
    inputs = f"{total.count:,} inputs" + (f" of {number} seeds" if number > 1 else "")
    if total.fixed == total.broken == 0:
        stays = f"the accuracy on {inputs} stays {percent(total.before)}"
        return f"“{row.name}” changes no answer from wrong to right or back: {stays}."
    verb = {1: "raises", 0: "does not significantly change", -1: "lowers"}[total.sign]
    return (
        f"“{row.name}” {verb} the accuracy on {inputs}: {percent(total.before)} before, {percent(total.after)} after, "
        f"{points(total.gain)} points ({_spread(total)}).{_by_seed(row)}"
    )


def harm(row: Row, total: Summary) -> str:
    """What it breaks for what it fixes."""
    rerouted = f"It changes the routing of {percent(row.rerouted)} of the inputs"
    if total.fixed == total.broken == 0:
        return f"{rerouted}."
    if total.fixed == 0:
        return f"{rerouted}, fixes no wrong answer and breaks {percent(total.broken)} of all answers."
    rate = total.broken / total.fixed
    cost = "none" if rate == 0 else f"{rate:.2f}"
    shares = f"fixes {percent(total.fixed)} of all answers and breaks {percent(total.broken)}"
    return f"{rerouted}, {shares}: for each answer it fixes it breaks {cost}."


def headroom(total: Summary, oracle: Row | None, results: Results) -> str | None:
    """Which share of the oracle's gain that is."""
    if oracle is None:
        return None
    most = whole(oracle, results)
    room = "Told the true label, the oracle gains"
    if most.gain <= 0:
        return f"{room} nothing either ({points(most.gain)} points), so there is no gap to speak of."
    if total.gain <= 0:
        return f"{room} {points(most.gain)} points; of that gap nothing is recovered."
    return f"{room} {points(most.gain)} points; {whole_percent(total.recovered)} of that gap is recovered."


def forecast(row: Row, total: Summary) -> str | None:
    """How the forecast from the references compares with the test."""
    if row.forecast is None:
        return None
    error = row.forecast - total.gain
    if f"{100 * abs(error):.1f}" == "0.0":
        verdict = "as the test has it"
    else:
        side = "more" if error > 0 else "less"
        inside = "inside" if total.low <= row.forecast <= total.high else "outside"
        verdict = f"{100 * abs(error):.1f} {side} than the test gave, {inside} its interval"
    return f"Leaving each reference out once forecast {points(row.forecast)} points: {verdict}."


def same_labels(chosen: Row, results: Results) -> list[str]:
    """Whether something simpler that uses the same labels does as well."""
    others = [row for row in results.rows[1:] if row.section == SAME_LABELS]
    if not others:
        return []
    best = max(others, key=lambda row: pooled(row).gain)
    total = summarise(Paired(pooled(best).after, pooled(chosen).after))
    verdict = {
        1: f"“{chosen.name}” is better",
        0: "the two do not differ significantly, so the simpler does as well",
        -1: f"“{best.name}” is better",
    }[total.sign]
    which = f"the best of {len(others)}" if len(others) > 1 else "the only one tried"
    side = "behind" if total.gain < 0 else "ahead of"
    return [
        f"Of the baselines with the same labels or none, “{best.name}” ({which}) changes the accuracy by "
        f"{points(pooled(best).gain)} points. On the same inputs “{chosen.name}” is {abs(100 * total.gain):.1f} points "
        f"{side} it ({_spread(total)}): {verdict}."
    ]


def cells(results: Results, *, by: int | None = None) -> list[Cell]:
    """The kinds of inputs: each pair of condition and template, or only the conditions (0) or templates (1)."""
    merged: dict[str, list[float]] = {}
    for row in results.by_condition:
        name = f"{row[0]} / {row[1]}" if by is None else str(row[by])
        total = merged.setdefault(name, [0.0, 0])
        total[0] += (row[3] - row[2]) * row[4]
        total[1] += row[4]
    return [Cell(name, change, int(count)) for name, (change, count) in merged.items()]


def where(results: Results) -> str | None:
    """Which kinds of inputs gain nothing; half an answer more or less is none."""
    if not results.by_condition:
        return None
    every = cells(results)
    rises, falls = (sum(sign * cell.change >= 0.5 for cell in every) for sign in (1, -1))
    stays = len(every) - rises - falls
    counted = f"Of {len(every)} pairs of condition and question, {rises} rise, {stays} stay and {falls} fall"
    without = [
        f"“{cell.name}” ({points(cell.gain)})" for by in (0, 1) for cell in cells(results, by=by) if cell.change < 0.5
    ]
    worst = min(every, key=lambda cell: cell.gain)
    if falls:
        counted += f", {worst.name} most ({points(worst.gain)} points of {worst.count:,} inputs)"
    if without:
        return f"{counted}. On the whole it does not help with {_enumerated(without)}."
    return f"{counted}. On the whole every condition and every kind of question gains."


def steering(results: Results) -> str | None:
    """How much of what the oracle reaches is reached towards any label."""
    oracle, null = true_oracle(results), null_oracle(results)
    if oracle is None or null is None:
        return None
    right, wrong = reached(pooled(oracle)), reached(pooled(null))
    if math.isnan(right) or math.isnan(wrong) or right == 0:
        return None
    share = wrong / right
    part = "little" if share < 0.25 else "part" if share < 0.5 else "most" if share < 1 else "all"
    return (
        f"Led to the right label, the oracle makes the model say it in {percent(right)} of the cases where it did not; "
        f"led to a random wrong label of the same kind, in {percent(wrong)}, {share:.2f} times as often. By that "
        f"measure {part} of the oracle's headroom is label steering rather than a better look at the input."
    )


def _spread(total: Summary) -> str:
    return f"95 % interval {points(total.low)} to {points(total.high)}, McNemar p{NO_BREAK}{_compared(total.p)}"


def _by_seed(row: Row) -> str:
    number, signs = len(row.seeds), [int(np.sign(seed.gain)) for seed in row.seeds]
    counts = [(word, signs.count(sign)) for word, sign in (("rises", 1), ("stays", 0), ("falls", -1))]
    said = [f"{word} in {count}" for word, count in counts if count]
    return f" It {_enumerated(said)} of {number} seeds." if number > 1 else ""


def _compared(p: float) -> str:
    text = probability(p)
    return text.replace(" ", NO_BREAK) if text.startswith("<") else f"={NO_BREAK}{text}"


def _enumerated(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
