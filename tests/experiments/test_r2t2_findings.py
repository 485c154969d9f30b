"""The sentences on top of an evaluation's page follow its answers, whichever way these turn out."""

import dataclasses
import re

import numpy as np
import pytest

from experiments.r2t2.findings import findings
from experiments.r2t2.summary import points, probability
from tests.experiments.evaluations import SEEDS, SIZE, answers, chosen, made_up_results, made_up_row


def said(results):
    return " ".join(" ".join(findings(results)).split())


@pytest.mark.parametrize(
    ("fixed", "broken", "verb", "room"),
    [
        (0.06, 0.01, "raises the accuracy", "% of that gap is recovered"),
        (0.02, 0.08, "lowers the accuracy", "of that gap nothing is recovered"),
        (0.02, 0.02, "does not significantly change the accuracy", "of that gap nothing is recovered"),
        (0.0, 0.0, "changes no answer from wrong to right or back", "of that gap nothing is recovered"),
    ],
)
def test_findings_follow_the_answers(fixed, broken, verb, room):
    text = said(chosen(fixed, broken))
    assert f"“amortised, guarded” {verb}" in text and room in text
    verbs = ("raises the accuracy", "lowers the accuracy", "does not significantly", "changes no answer")
    assert sum(other in text for other in verbs) == 1


def test_a_gain_of_five_answers_is_not_called_one():
    """Their bootstrap interval leaves out zero, since none is broken; McNemar's test gives them p = 0.06."""
    results = chosen(0.0, 0.0)
    seeds = tuple(answers(fixed / SIZE, 0.0, seed=i) for i, fixed in enumerate((3, 2, 0)))
    rows = (dataclasses.replace(results.rows[0], seeds=seeds), *results.rows[1:])
    text = said(dataclasses.replace(results, rows=rows))
    assert "does not significantly change the accuracy" in text
    assert "interval +0.1 to +0.6, McNemar p = 0.06). It rises in 2 and stays in 1 of 3 seeds." in text


@pytest.mark.parametrize(
    ("p", "written"), [(1.0, "1.00"), (0.05, "0.05"), (0.0123, "0.01"), (0.0099, "0.0099"), (0.00001, "< 0.0001")]
)
def test_a_probability_is_written_no_finer_than_it_is_worth(p, written):
    assert probability(p) == written


@pytest.mark.parametrize(("change", "written"), [(0.0141, "+1.4"), (-0.0141, "−1.4"), (-0.0004, "0.0"), (0.0, "0.0")])
def test_points_have_a_sign_unless_they_are_none(change, written):
    assert points(change) == written


def test_harm_is_counted_per_answer_that_is_fixed():
    assert "fixes 6.0 % of all answers and breaks 3.0 %: for each answer it fixes it breaks 0.50." in said(
        chosen(0.06, 0.03)
    )
    assert "for each answer it fixes it breaks none." in said(chosen(0.06, 0.0))
    assert "fixes no wrong answer and breaks 3.0 % of all answers" in said(chosen(0.0, 0.03))


def test_the_share_of_the_oracle_is_gain_over_gain():
    oracle = np.mean([seed.after.mean() - seed.before.mean() for seed in made_up_results().rows[6].seeds])
    assert f"the oracle gains +{100 * oracle:.1f} points; {5 / oracle:.0f} % of that gap" in said(chosen(0.06, 0.01))


def test_without_room_no_share_is_spoken_of():
    results = made_up_results()
    idle = [
        dataclasses.replace(row, seeds=results.rows[2].seeds) if row.name == "oracle" else row for row in results.rows
    ]
    idle[6] = dataclasses.replace(idle[6], seeds=tuple(answers(0, 0.01, seed=i) for i in range(SEEDS)))
    results = dataclasses.replace(results, rows=tuple(idle))
    assert "gains nothing either" in said(results) and "recovered" not in said(results)


@pytest.mark.parametrize(
    ("forecast", "verdict"),
    [
        (0.05, "as the test has it"),
        (0.055, "0.5 more than the test gave, inside its interval"),
        (0.09, "4.0 more than the test gave, outside its interval"),
        (-0.04, "−4.0 points: 9.0 less than the test gave, outside its interval"),
    ],
)
def test_the_forecast_is_held_against_the_test(forecast, verdict):
    results = chosen(0.06, 0.01)
    first = dataclasses.replace(results.rows[0], forecast=forecast)
    assert verdict in said(dataclasses.replace(results, rows=(first, *results.rows[1:])))


@pytest.mark.parametrize(
    ("fixed", "broken", "verdict"),
    [
        (0.12, 0.0, "ahead of it .*“amortised, guarded” is better"),
        (0.032, 0.015, "the two do not differ significantly, so the simpler does as well"),
        (0.0, 0.1, "behind it .*“best per template” is better"),
    ],
)
def test_the_best_baseline_is_compared_input_by_input(fixed, broken, verdict):
    assert re.search(verdict, said(chosen(fixed, broken)))


def test_where_it_does_not_help_is_named_and_half_an_answer_is_nothing():
    cells = [("clean", "count", 0.5, 0.4, 100), ("blur", "count", 0.5, 0.8, 100), ("clean", "colour", 0.5, 0.5001, 100)]
    text = said(made_up_results(by_condition=tuple(cells)))
    assert "Of 3 pairs of condition and question, 1 rise, 1 stay and 1 fall, clean / count most (−10.0 points" in text
    assert "it does not help with “clean” (−5.0) and “colour” (0.0)." in text
    cells[0] = ("clean", "count", 0.5, 0.7, 100)
    cells[2] = ("clean", "colour", 0.5, 0.6, 100)
    assert "every condition and every kind of question gains" in said(made_up_results(by_condition=tuple(cells)))


@pytest.mark.parametrize(("wrong", "part"), [(0.05, "little"), (0.2, "part"), (0.3, "most"), (0.6, "all")])
def test_the_null_oracle_says_how_much_is_label_steering(wrong, part):
    results = made_up_results()
    null = made_up_row("oracles", "null oracle", wrong, 0.0, right=0.08)
    text = said(dataclasses.replace(results, rows=(*results.rows[:-1], null)))
    times = np.mean([seed.after[~seed.before].mean() for seed in null.seeds]) / np.mean(
        [seed.after[~seed.before].mean() for seed in results.rows[6].seeds]
    )
    assert f"{times:.2f} times as often. By that measure {part} of the oracle's headroom" in text
