"""The six tasks of MAD (arXiv 2403.17844, appendix B): what they ask, and how hard they are made.

The definitions are those of the authors' code where it says more than the paper. Examples are a function of the
setting and the seed.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from experiments.synthetic.examples import IGNORED, Examples

NOISE_VOCAB = 16  # ids of noise, the highest of the vocabulary
LONGEST_MOTIF = 3  # tokens of a fuzzy key or value
NUM_TEST = 1280

TaskName = Literal[
    "in-context-recall",
    "noisy-in-context-recall",
    "fuzzy-in-context-recall",
    "memorization",
    "selective-copying",
    "compression",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One difficulty of one task.

    Attributes:
      task: its name.
      vocab_size: ids, special ones included.
      length: tokens of a sequence.
      num_train: training sequences.
      noise: share of the pairs that are noise, of noisy recall alone.
      num_copied: tokens to copy, of selective copying alone.
    """

    task: TaskName
    vocab_size: int
    length: int
    num_train: int = 12_800
    noise: float = 0.0
    num_copied: int = 16

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"Setting: task={self.task!r} is unknown; use one of {tuple(TASKS)}.")
        if self.num_train < 1:
            raise ValueError(f"Setting: num_train={self.num_train} must be at least 1.")
        if not 0 <= self.noise < 1:
            raise ValueError(f"Setting: noise={self.noise} must lie in [0, 1).")
        least_ids, least_length = TASKS[self.task].least(self)
        if self.vocab_size < least_ids:
            raise ValueError(f"Setting: vocab_size={self.vocab_size} of {self.task} must be at least {least_ids}.")
        if self.length < least_length:
            raise ValueError(f"Setting: length={self.length} of {self.task} must be at least {least_length}.")


class Task(NamedTuple):
    """How a task makes its examples, and which of its difficulties the benchmark varies."""

    draw: Callable[[np.random.Generator, Setting, int, bool], Examples]  # the last: for training
    baseline: dict[str, float]
    harder: dict[str, tuple]  # other values of one field at a time
    least: Callable[[Setting], tuple[int, int]]  # vocabulary and length


def draw(setting: Setting, seed: int = 12345) -> tuple[Examples, Examples]:
    """Returns sequences to train on and to test with."""
    words = repr(dataclasses.astuple(setting)).encode()
    rng = np.random.default_rng([seed, zlib.crc32(words)])
    task = TASKS[setting.task]
    return task.draw(rng, setting, setting.num_train, True), task.draw(rng, setting, NUM_TEST, False)


def baseline(task: TaskName) -> Setting:
    """Returns the setting that a task's difficulties start from."""
    return Setting(task=task, **TASKS[task].baseline)


def sweep(task: TaskName) -> list[Setting]:
    """Returns the settings that a task's score is the mean over: its baseline, and one field changed at a time."""
    start = baseline(task)
    changes = [{field: value} for field, values in TASKS[task].harder.items() for value in values]
    return [start, *(dataclasses.replace(start, **change) for change in changes)]


def _recall(rng: np.random.Generator, setting: Setting, number: int, training: bool) -> Examples:
    """Pairs of key and value; a key always has the value that it had first. Asked: values of keys shown before."""
    ids = setting.vocab_size - (NOISE_VOCAB if setting.noise else 0)
    num_keys, num_pairs = ids // 2, setting.length // 2
    values = rng.integers(num_keys, ids, (number, num_keys))
    keys = rng.integers(0, num_keys, (number, num_pairs))
    noisy = rng.random((number, num_pairs)) < setting.noise
    noisy[np.arange(number), rng.integers(0, num_pairs - 1, number)] = False  # one pair at least is shown
    noisy[:, -1] = False
    shown = (keys[..., None] == np.arange(num_keys)) & ~noisy[..., None]
    before = np.cumsum(shown, axis=1) - shown  # [n, pairs, keys], how often before this pair
    keys[:, -1] = np.argmax(rng.random((number, num_keys)) * (before[:, -1] > 0), axis=-1)  # one that was shown
    pairs = np.stack([keys, np.take_along_axis(values, keys, axis=1)], axis=-1)
    pairs = np.where(noisy[..., None], rng.integers(ids, ids + NOISE_VOCAB, pairs.shape), pairs)
    asked = np.take_along_axis(before, keys[..., None], axis=-1)[..., 0] > 0
    targets = np.where((asked & ~noisy)[..., None] & [False, True], pairs, IGNORED)
    return _shifted(pairs.reshape(number, -1), targets.reshape(number, -1), training)


def _fuzzy_recall(rng: np.random.Generator, setting: Setting, number: int, training: bool) -> Examples:
    """The same with keys and values of one to three different tokens; keys that are tested have three."""
    ids = setting.vocab_size - 1  # the last one fills up
    num_keys, length = ids // 2, setting.length

    def motif(first: int, last: int, size: int) -> list[int]:
        return (first + rng.permutation(last - first)[:size]).tolist()

    def key() -> tuple[int, ...]:
        return tuple(motif(0, num_keys, rng.integers(1, LONGEST_MOTIF + 1) if training else LONGEST_MOTIF))

    def value() -> list[int]:
        return motif(num_keys, ids, rng.integers(1, LONGEST_MOTIF + 1))

    rows = np.full((2, number, length + 1), setting.vocab_size - 1)
    rows[1] = IGNORED
    for row in range(number):
        probe = key()
        known = {probe: value()}
        size = len(probe) + len(known[probe])
        # so early that the pair is shown for certain; the authors' code now and then asks for one that was not
        place, shown = rng.integers(length - size - 4 * LONGEST_MOTIF), set()
        tokens, targets = [], []
        while len(tokens) < length - size - 2 * LONGEST_MOTIF:
            due = len(tokens) >= place and probe not in shown
            chosen = probe if due else key()
            answer = known.setdefault(chosen, value())
            tokens += [*chosen, *answer]
            targets += [IGNORED] * len(chosen) + (answer if chosen in shown else [IGNORED] * len(answer))
            shown.add(chosen)
        tokens += [*probe, *known[probe]]
        targets += [IGNORED] * len(probe) + known[probe]
        rows[:, row, length + 1 - len(tokens) :] = tokens, targets
    return _shifted(rows[0], rows[1], training)


def _memorization(rng: np.random.Generator, setting: Setting, number: int, training: bool) -> Examples:
    """Keys whose values are the same in all sequences, and an id to say them at."""
    del training
    ids = setting.vocab_size - 1
    num_keys = ids // 2
    values = num_keys + np.random.default_rng(12345).permutation(ids - num_keys)[:num_keys]
    keys = rng.integers(0, num_keys, (number, setting.length // 2))
    inputs = np.stack([keys, np.full_like(keys, ids)], axis=-1).reshape(number, -1)
    targets = np.stack([np.full_like(keys, IGNORED), values[keys]], axis=-1).reshape(number, -1)
    return _examples(inputs, targets)


def _selective_copying(rng: np.random.Generator, setting: Setting, number: int, training: bool) -> Examples:
    """Ids among blanks, to be said in their order when the last id has been read."""
    del training
    copied, blank = setting.num_copied, setting.vocab_size - 2
    tokens = rng.integers(0, blank, (number, copied))
    num_blanks = setting.length - 2 * copied - 1
    # a blank stands before a random token; sorting puts both in their places
    own = np.tile(np.arange(copied) + 0.5, (number, 1))
    order = np.argsort(np.concatenate([own, rng.integers(0, copied, (number, num_blanks))], axis=1), kind="stable")
    mixed = np.concatenate([tokens, np.full((number, num_blanks), blank)], axis=1)
    mixed = np.take_along_axis(mixed, order, axis=1)
    inputs = np.concatenate([mixed, np.full((number, 1), blank + 1), np.full((number, copied), blank)], axis=1)
    return _examples(inputs, np.concatenate([np.full((number, setting.length - copied), IGNORED), tokens], axis=1))


def _compression(rng: np.random.Generator, setting: Setting, number: int, training: bool) -> Examples:
    """Random ids and a last one, at whose position everything has to be known."""
    del training
    inputs = rng.integers(0, setting.vocab_size - 1, (number, setting.length))
    inputs[:, -1] = setting.vocab_size - 1
    return _examples(inputs, inputs)


def _shifted(tokens: np.ndarray, asked: np.ndarray, training: bool) -> Examples:
    """Next-token prediction: of everything while training, of what is asked in the test."""
    return _examples(tokens[:, :-1], (tokens if training else asked)[:, 1:])


def _examples(inputs: np.ndarray, targets: np.ndarray) -> Examples:
    return Examples(inputs.astype(np.int32), targets.astype(np.int32))


FEWER = (6400, 3200, 1600, 800)
LONGER = (256, 512, 1024)
MORE_IDS = (32, 64, 128)

TASKS: dict[str, Task] = {
    "in-context-recall": Task(
        draw=_recall,
        baseline={"vocab_size": 16, "length": 128},
        harder={"vocab_size": MORE_IDS, "length": LONGER, "num_train": FEWER},
        least=lambda setting: (2 + (NOISE_VOCAB if setting.noise else 0), 4),
    ),
    "noisy-in-context-recall": Task(
        draw=_recall,
        baseline={"vocab_size": 32, "length": 128, "noise": 0.2},
        harder={"vocab_size": (48, 80, 144), "length": LONGER, "num_train": FEWER, "noise": (0.4, 0.6, 0.8)},
        least=lambda setting: (2 + (NOISE_VOCAB if setting.noise else 0), 4),
    ),
    "fuzzy-in-context-recall": Task(
        draw=_fuzzy_recall,
        baseline={"vocab_size": 16, "length": 128},
        harder={"vocab_size": MORE_IDS, "length": LONGER, "num_train": FEWER},
        least=lambda setting: (2 * LONGEST_MOTIF + 1, 6 * LONGEST_MOTIF + 1),
    ),
    "memorization": Task(
        draw=_memorization,
        baseline={"vocab_size": 256, "length": 32, "num_train": 256},
        harder={"vocab_size": (512, 1024, 2048, 4096, 8192)},
        least=lambda setting: (3, 2),
    ),
    "selective-copying": Task(
        draw=_selective_copying,
        baseline={"vocab_size": 16, "length": 256},
        harder={"vocab_size": MORE_IDS, "length": (512, 1024), "num_train": FEWER, "num_copied": (32, 64, 96)},
        least=lambda setting: (3, 2 * setting.num_copied + 1),
    ),
    "compression": Task(
        draw=_compression,
        baseline={"vocab_size": 16, "length": 32},
        harder={"vocab_size": MORE_IDS, "length": (64, 128, 256), "num_train": FEWER},
        least=lambda setting: (2, 2),
    ),
}
