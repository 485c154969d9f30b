"""RegBench (arXiv 2401.12973): strings of a random automaton, which has to be learned from the strings before.

The definitions are those of the authors' code. Every sequence has an automaton of its own, and no automaton of the test
is one of the training: they are compared as languages, by their smallest forms.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from experiments.cli import UserError
from experiments.synthetic.examples import IGNORED, Examples
from experiments.synthetic.scores import Tally

NUM_SYMBOLS = 18
SEPARATOR, PADDING = NUM_SYMBOLS, NUM_SYMBOLS + 1
VOCAB_SIZE = NUM_SYMBOLS + 2
PATIENCE = 10_000  # automata in a row whose language is known

Automaton = tuple[dict[int, int], ...]  # for each state, the next one by symbol; the first is the start


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutomataConfig:
    """What is drawn; both ends of a range belong to it.

    Attributes:
      states: range of the number of states.
      alphabet: range of the number of symbols.
      ways_out: range of the number of transitions from each state, to different states and by different symbols.
      strings: range of the number of strings in a sequence.
      string_length: range of the symbols in a string.
    """

    states: tuple[int, int] = (4, 12)
    alphabet: tuple[int, int] = (4, 18)
    ways_out: tuple[int, int] = (1, 3)
    strings: tuple[int, int] = (10, 19)
    string_length: tuple[int, int] = (1, 49)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            low, high = getattr(self, field.name)
            if not 1 <= low <= high:
                raise ValueError(f"AutomataConfig: {field.name}={(low, high)} must be a range of positive numbers.")
        if self.length < 1:
            raise ValueError(
                "AutomataConfig: one string of one symbol asks for nothing; raise strings or string_length."
            )
        if self.alphabet[1] > NUM_SYMBOLS:
            raise ValueError(f"AutomataConfig: alphabet={self.alphabet} must stay within {NUM_SYMBOLS} symbols.")
        if self.ways_out[1] > min(self.states[0] - 1, self.alphabet[0]):
            raise ValueError(
                f"AutomataConfig: ways_out={self.ways_out} must be fewer than the fewest states, {self.states[0]}, and "
                f"no more than the fewest symbols, {self.alphabet[0]}."
            )

    @property
    def length(self) -> int:
        """Tokens of the longest sequence, without its last."""
        return self.strings[1] * (self.string_length[1] + 1) - 2


class Problems(NamedTuple):
    """Sequences, each from an automaton of its own."""

    examples: Examples
    accepted: np.ndarray  # [n, t, y] bool, which ids may come next where one is asked for


def draw(config: AutomataConfig, num_train: int, num_test: int, seed: int = 0) -> tuple[Problems, Problems]:
    """Returns sequences to train on and to test with, a function of the arguments."""
    rng = np.random.default_rng(seed)
    automata = _different(rng, config)
    test = _problems(rng, config, automata, num_test)  # the first, so that more training does not change it
    return _problems(rng, config, automata, num_train), test


def tally(predictions: np.ndarray, problems: Problems) -> Tally:
    """Counts predictions [n, t] that the automaton accepts, where the next id is a symbol; all ids as one."""
    asked = problems.examples.targets != IGNORED
    right = np.take_along_axis(problems.accepted, predictions[..., None], axis=-1)[..., 0] & asked
    num_asked, num_right = (np.sum(x, axis=1, keepdims=True).astype(np.float32) for x in (asked, right))
    return Tally(num_asked, num_asked, num_right)


def language(automaton: Automaton) -> tuple:
    """Returns what is the same for automata that accept the same strings: the smallest, states in order of meeting.

    All states accept, so two states differ if some symbol is known to one only, or leads to states that differ.
    """
    kinds, before = [0] * len(automaton), 0
    while len(set(kinds)) > before:
        before = len(set(kinds))
        ways = [tuple(sorted((symbol, kinds[to]) for symbol, to in state.items())) for state in automaton]
        numbers = {way: number for number, way in enumerate(dict.fromkeys(ways))}
        kinds = [numbers[way] for way in ways]
    met, found, todo = {kinds[0]: 0}, [], [0]
    while todo:
        state = automaton[todo.pop(0)]
        for symbol in sorted(state):
            if kinds[state[symbol]] not in met:
                met[kinds[state[symbol]]] = len(met)
                todo.append(state[symbol])
        found.append(tuple((symbol, met[kinds[state[symbol]]]) for symbol in sorted(state)))
    return tuple(found)


def _different(rng: np.random.Generator, config: AutomataConfig) -> Iterator[Automaton]:
    """Yields automata of different languages.

    Raises:
      UserError: there are no more.
    """
    known, in_vain = set(), 0
    while in_vain < PATIENCE:
        automaton = _automaton(rng, config)
        in_vain += 1
        if (spoken := language(automaton)) not in known:
            known.add(spoken)
            in_vain = 0
            yield automaton
    raise UserError(f"automata: there seem to be no more than {len(known)} languages like these; widen the ranges.")


def _automaton(rng: np.random.Generator, config: AutomataConfig) -> Automaton:
    num_states = _within(rng, config.states)
    symbols = rng.permutation(NUM_SYMBOLS)[: _within(rng, config.alphabet)]
    states = []
    for state in range(num_states):
        number = _within(rng, config.ways_out)
        others = rng.permutation(np.delete(np.arange(num_states), state))
        states.append(dict(zip(rng.permutation(symbols)[:number].tolist(), others[:number].tolist(), strict=True)))
    return tuple(states)


def _problems(rng: np.random.Generator, config: AutomataConfig, automata: Iterator[Automaton], number: int) -> Problems:
    inputs = np.full((number, config.length), PADDING, np.int32)
    targets = np.full((number, config.length), IGNORED, np.int32)
    accepted = np.zeros((number, config.length, VOCAB_SIZE), bool)
    for row in range(number):
        tokens, may_come = _sequence(rng, config, next(automata))
        length = len(tokens) - 1
        inputs[row, :length] = tokens[:-1]
        targets[row, :length] = [IGNORED if token == SEPARATOR else token for token in tokens[1:]]
        for place, ids in enumerate(may_come[1:]):
            accepted[row, place, list(ids)] = True
    return Problems(Examples(inputs, targets), accepted)


def _sequence(rng: np.random.Generator, config: AutomataConfig, automaton: Automaton) -> tuple[list[int], list]:
    """Returns tokens, and for each the symbols that could have stood there."""
    tokens, may_come = [], []
    for _ in range(_within(rng, config.strings)):
        state = automaton[0]
        for _ in range(_within(rng, config.string_length)):
            symbol = list(state)[rng.integers(len(state))]
            tokens.append(symbol)
            may_come.append(state.keys())
            state = automaton[state[symbol]]
        tokens.append(SEPARATOR)
        may_come.append(())
    return tokens[:-1], may_come[:-1]


def _within(rng: np.random.Generator, ends: tuple[int, int]) -> int:
    return int(rng.integers(ends[0], ends[1] + 1))
