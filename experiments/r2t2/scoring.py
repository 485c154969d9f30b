"""How replies are judged: a metric is a score for one reply and a way to add up scores, a row of METRICS its name.

`accuracy` compares the option a reply names, or the text where there are no options; `soft accuracy` is that of VQA as
M4C computes it (arXiv 1911.06258); `ANLS` is equation 1 of arXiv 1905.13648; `MME perception` is that of MME (arXiv
2306.13394); `circular accuracy` is MMBench's (arXiv 2307.06281); `starts with` is the rule in the code of R2-T2.
"""

import collections
import math
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.cli import UserError
from experiments.r2t2.benchmarks import BENCHMARKS, PERCEPTION, find
from experiments.r2t2.questions import Question
from experiments.r2t2.replies import normalised, parse_choice, plain, yes_or_no

ANNOTATORS = 10  # of a question in VQA and TextVQA
ANLS_THRESHOLD = 0.5
CIRCULAR_OFFSET = 1_000_000  # MMBench numbers the rotations of question n as n, n + 10^6, n + 2 10^6, ...


class Score(NamedTuple):
    """How well a benchmark was answered, in percent; MME perception runs to 2,000."""

    metric: str
    value: float
    per_subtask: dict[str, float]
    num_questions: int
    missing: int  # replies that are empty and count as wrong


class Examples(NamedTuple):
    """Questions whose answer is on a closed list."""

    questions: tuple[Question, ...]
    labels: np.ndarray  # [b] int32, positions on the list
    num_outside: int  # questions left out


class Metric(NamedTuple):
    """Scores of single replies, from 0 to 1, and what they add up to."""

    of_one: Callable[[Question, str], float]
    total: Callable[[Sequence[Question], Sequence[float]], float]


def score(
    benchmark: str,
    predictions: Mapping[str, str] | Iterable[tuple[str, str]],
    questions: Iterable[Question],
    *,
    metric: str | None = None,
) -> Score:
    """Judges the replies to all questions of a benchmark.

    Args:
      benchmark: its name.
      predictions: the reply to every question, by id.
      questions: those that were asked.
      metric: a row of METRICS; None: the benchmark's own.

    Raises:
      UserError: predictions lack an id, repeat one or have one that is not a question's, or nothing was asked.
    """
    name = metric or find(benchmark).metric
    if name not in METRICS:
        raise UserError(f"metric: {name!r} is unknown; choose one of {', '.join(METRICS)}.")
    asked = list(questions)
    replies = _checked(predictions, asked)
    of_one, total = METRICS[name]
    scores = [of_one(question, reply) if reply.strip() else 0.0 for question, reply in zip(asked, replies, strict=True)]
    groups = collections.defaultdict(list)
    for place, question in enumerate(asked):
        groups[question.subtask].append(place)
    per_subtask = {
        subtask: total([asked[i] for i in places], [scores[i] for i in places])
        for subtask, places in sorted(groups.items())
    }
    return Score(name, total(asked, scores), per_subtask, len(asked), sum(not reply.strip() for reply in replies))


def paper_averages(scores: Mapping[str, Score]) -> tuple[float, float]:
    """Returns the paper's two averages: of the first eight benchmarks, and of all nine; MME-P counts as a 20th.

    Raises:
      UserError: a benchmark is missing.
    """
    names = [row.name for row in BENCHMARKS]
    missing = [name for name in names if name not in scores]
    if missing:
        raise UserError(
            f"scores: there is none for {', '.join(missing)}; the averages are over all of {', '.join(names)}."
        )
    values = [scores[name].value / (20 if name == "MME-P" else 1) for name in names]
    return math.fsum(values[:8]) / 8, math.fsum(values) / 9


def to_examples(questions: Iterable[Question], answers: tuple[str, ...]) -> Examples:
    """Labels questions for a model with a closed list of answers.

    A question's label is the position of its letter, or else of its answer's text, compared as `normalised`.

    Raises:
      UserError: two answers on the list are the same, or no question has one of them.
    """
    positions: dict[str, int] = {}
    for position, answer in enumerate(answers):
        same = positions.setdefault(normalised(answer), position)
        if same != position:
            raise UserError(f"answers: {answers[same]!r} and {answer!r} are the same when normalised; leave one out.")
    labelled = [(question, _label(question, answers, positions)) for question in questions]
    inside = [(question, label) for question, label in labelled if label is not None]
    if not inside:
        raise UserError(
            f"answers: none of {len(labelled)} questions is answered by one of {', '.join(answers)}; add some."
        )
    kept, labels = zip(*inside, strict=True)
    return Examples(kept, np.array(labels, np.int32), len(labelled) - len(kept))


def accuracy(question: Question, reply: str) -> float:
    """1 for the letter of the right option, or for a right answer where there are none: text as `plain`, or number."""
    if question.choices is not None:
        return float(parse_choice(reply, question.choices) == question.answer)
    return float(any(_same(reply, answer) for answer in question.answers))


def starts_with(question: Question, reply: str) -> float:
    """1 if the reply begins, letter for letter, with a right answer; the letter of an option may be in brackets."""
    answers = question.answers if question.choices is None else (question.answer, f"({question.answer})")
    return float(reply.strip().startswith(answers))


def yes_no(question: Question, reply: str) -> float:
    """1 if the reply says yes or no, whichever is right."""
    return float(yes_or_no(reply) == plain(question.answer))


def soft_accuracy(question: Question, reply: str) -> float:
    """Mean of min(n / 3, 1) over all sets of nine of the ten annotators, n of whom say the same.

    Where fewer than ten were asked, as in ST-VQA, whether one of them says the same.
    """
    said = [normalised(answer) for answer in question.answers]
    agree = said.count(normalised(reply))
    if len(said) < ANNOTATORS:
        return float(agree > 0)
    without_one = agree * min((agree - 1) / 3, 1) + (len(said) - agree) * min(agree / 3, 1)
    return without_one / len(said)


def anls(question: Question, reply: str) -> float:
    """The closest answer's normalised Levenshtein similarity, 0 below one half.

    At one half it counts, as in the challenge's own evaluation and against equation 1.
    """
    told = " ".join(reply.lower().split())
    similarity = max(_similarity(told, " ".join(answer.lower().split())) for answer in question.answers)
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def percent(questions: Sequence[Question], scores: Sequence[float]) -> float:
    """Mean score in percent."""
    return 100 * math.fsum(scores) / len(scores)


def perception(questions: Sequence[Question], scores: Sequence[float]) -> float:
    """Sum over subtasks of accuracy and accuracy+ in percent, the share of images with both questions right.

    Raises:
      UserError: a question is of no perception subtask, or an image has not two questions.
    """
    images: dict[str, dict[str, list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for question, one in zip(questions, scores, strict=True):
        if question.subtask not in PERCEPTION:
            raise UserError(
                f"subtask: {question.subtask!r} of question {question.id} is none of {', '.join(PERCEPTION)}."
            )
        images[question.subtask][question.source].append(one)
    odd = [source for subtask in images.values() for source, pair in subtask.items() if len(pair) != 2]
    if odd:
        raise UserError(
            f"source: {odd[0]} has not two questions, as every image of MME has; ask both, or mend columns=."
        )
    pairs = [list(subtask.values()) for subtask in images.values()]
    return 100 * math.fsum(np.mean(pair) + np.mean(np.all(pair, axis=1)) for pair in pairs)


def circular(questions: Sequence[Question], scores: Sequence[float]) -> float:
    """Share in percent of the questions that are answered rightly in all rotations of their options.

    Raises:
      UserError: ids are not numbers.
    """
    rotations: dict[int, float] = collections.defaultdict(lambda: 1.0)
    for question, one in zip(questions, scores, strict=True):
        if not question.id.isdecimal():
            raise UserError(f"id: {question.id!r} is no number of MMBench, by which rotations are told; mend columns=.")
        rotations[int(question.id) % CIRCULAR_OFFSET] *= one
    return 100 * math.fsum(rotations.values()) / len(rotations)


METRICS = {
    "accuracy": Metric(accuracy, percent),
    "circular accuracy": Metric(accuracy, circular),
    "MME perception": Metric(yes_no, perception),
    "soft accuracy": Metric(soft_accuracy, percent),
    "ANLS": Metric(anls, percent),
    "starts with": Metric(starts_with, percent),
}


def _checked(predictions: Mapping[str, str] | Iterable[tuple[str, str]], asked: Sequence[Question]) -> list[str]:
    """The replies in the order of the questions."""
    pairs = list(predictions.items() if isinstance(predictions, Mapping) else predictions)
    ids = [question.id for question in asked]
    if not ids:
        raise UserError("questions: there are none; read some first.")
    for what, names in (("questions", ids), ("predictions", [name for name, _ in pairs])):
        repeated = [name for name, times in collections.Counter(names).items() if times > 1]
        if repeated:
            raise UserError(f"{what}: {_some(repeated)} occurs more than once; leave one of each.")
    replies = dict(pairs)
    missing, unknown = [name for name in ids if name not in replies], sorted(set(replies) - set(ids))
    if missing:
        raise UserError(
            f"predictions: none for {_some(missing)} of {len(ids)} questions; reply to each, if with nothing."
        )
    if unknown:
        raise UserError(f"predictions: {_some(unknown)} is no id among {len(ids)} questions; leave such out.")
    return [replies[name] for name in ids]


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _same(reply: str, answer: str) -> bool:
    told, right = plain(reply), plain(answer)
    try:
        return told == right or float(told) == float(right)
    except ValueError:
        return False


def _similarity(told: str, right: str) -> float:
    longest = max(len(told), len(right))
    return 1 - _distance(told, right) / longest if longest else 1.0


def _distance(one: str, other: str) -> int:
    """Levenshtein's: insertions, deletions and replacements."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        above, row = row, [i]
        for j, match in enumerate(other, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != match)))
    return row[-1]


def _label(question: Question, answers: tuple[str, ...], positions: Mapping[str, int]) -> int | None:
    """The position of a question's answer: of its letter where letters are on the list, else of its text."""
    if question.choices is None:
        return positions.get(normalised(question.answer))
    if question.answer in answers:
        return answers.index(question.answer)
    option = question.choices[string.ascii_uppercase.index(question.answer)]
    return positions.get(normalised(option))
