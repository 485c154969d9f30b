"""Tasks that ask how far back, and beyond what length, a model still knows: recall, needles and copying.

Each answer stands somewhere in the sequence, and a position that is asked for knows at what distance. Any length can be
drawn, so a model that was trained on one is tested on others.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from experiments.synthetic.examples import IGNORED, Examples

KEYS, VALUES, FILLERS = 32, 32, 16  # ids of each kind, one kind after the other
ASK = KEYS + VALUES + FILLERS  # an id of its own: what follows are questions
VOCAB_SIZE = ASK + 1
NEEDLES = 4

TaskName = Literal["recall", "needles", "copying"]


AXES: dict[TaskName, str] = {
    "recall": "tokens since the answer was shown",
    "needles": "tokens since the answer was shown",
    "copying": "place in the copy",
}


class Asked(NamedTuple):
    """Sequences, what is asked at their positions, and how many tokens before the answer stood."""

    examples: Examples
    distance: np.ndarray  # [n, t] int32; 0 where nothing is asked

    def along(self, task: TaskName) -> np.ndarray:
        """Returns what answers are sorted by [n, t], see AXES; 0 where nothing is asked."""
        if task != "copying":
            return self.distance
        return np.where(self.distance, np.cumsum(self.distance > 0, axis=1), 0)


def draw(task: TaskName, length: int, number: int, seed: int) -> Asked:
    """Returns sequences of so many tokens, a function of the arguments.

    Raises:
      ValueError: the task needs longer ones.
    """
    if length < SHORTEST:
        raise ValueError(f"draw: length={length} must be at least {SHORTEST}.")
    rng = np.random.default_rng([seed, length, sorted(TASKS).index(task)])
    inputs, targets, distance = (x.astype(np.int32) for x in TASKS[task](rng, length, number))
    return Asked(Examples(inputs, targets), distance)


def _recall(rng: np.random.Generator, length: int, number: int):
    """Pairs of key and value; a key always has one value. Asked: values of keys that were shown before."""
    pairs = length // 2
    keys = rng.integers(0, KEYS, (number, pairs))
    values = np.take_along_axis(rng.integers(KEYS, KEYS + VALUES, (number, KEYS)), keys, axis=1)
    inputs = np.stack([keys, values], axis=-1).reshape(number, -1)
    places = np.arange(pairs)
    last = np.full((number, KEYS), -1)
    distance = np.zeros((number, pairs, 2), int)
    for place in places:
        rows = np.arange(number), keys[:, place]
        # at the key the value is asked for, which stood next to the same key before
        distance[:, place, 0] = np.where(last[rows] >= 0, 2 * (place - last[rows]) - 1, 0)
        last[rows] = place
    targets = np.stack([values, np.full_like(values, IGNORED)], axis=-1)
    targets = np.where(distance > 0, targets, IGNORED)
    return _filled(length, inputs, targets.reshape(number, -1), distance.reshape(number, -1))


def _needles(rng: np.random.Generator, length: int, number: int):
    """A few pairs of key and value in fillers, all asked for at the end in another order."""
    tail = 1 + 2 * NEEDLES  # the sign, then key and value of each
    inputs = rng.integers(KEYS + VALUES, KEYS + VALUES + FILLERS, (number, length))
    targets, distance = np.full((number, length), IGNORED), np.zeros((number, length), int)
    slots = (length - tail) // 2
    places = 2 * np.sort(np.argsort(rng.random((number, slots)), axis=1)[:, :NEEDLES], axis=1)
    keys = np.argsort(rng.random((number, KEYS)), axis=1)[:, :NEEDLES]
    values = rng.integers(KEYS, KEYS + VALUES, (number, NEEDLES))
    rows = np.arange(number)[:, None]
    inputs[rows, places], inputs[rows, places + 1] = keys, values
    order = np.argsort(rng.random((number, NEEDLES)), axis=1)
    asked = length - tail + 1 + 2 * np.arange(NEEDLES)
    inputs[:, length - tail] = ASK
    for of, positions in ((keys, asked), (values, asked + 1)):
        inputs[:, positions] = np.take_along_axis(of, order, axis=1)
    targets[:, asked] = np.take_along_axis(values, order, axis=1)
    distance[:, asked] = asked - np.take_along_axis(places, order, axis=1) - 1
    return inputs, targets, distance


def _copying(rng: np.random.Generator, length: int, number: int):
    """Random ids, the sign, and the same ids again."""
    size = (length - 1) // 2
    ids = rng.integers(0, KEYS, (number, size))
    inputs = np.concatenate([ids, np.full((number, 1), ASK), ids], axis=1)
    targets = np.full(inputs.shape, IGNORED)
    targets[:, size:-1] = ids
    distance = np.where(targets != IGNORED, size, 0)
    return _filled(length, inputs, targets, distance)


def _filled(length: int, inputs: np.ndarray, targets: np.ndarray, distance: np.ndarray):
    """Adds what is missing to the length on the left, where it disturbs nobody."""
    missing = ((0, 0), (length - inputs.shape[1], 0))
    return (
        np.pad(inputs, missing, constant_values=KEYS + VALUES),
        np.pad(targets, missing, constant_values=IGNORED),
        np.pad(distance, missing),
    )


def reach(task: TaskName, length: int) -> int:
    """Returns how far the axis goes in sequences of a length."""
    return (length - 1) // 2 if task == "copying" else length


TASKS: dict[TaskName, Callable] = {"recall": _recall, "needles": _needles, "copying": _copying}
SHORTEST = 2 * (1 + 2 * NEEDLES) + 2
