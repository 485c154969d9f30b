"""A prediction is right if, and only if, the automaton of the sequence could go on so."""

import itertools

import numpy as np
import pytest

from experiments.cli import UserError
from experiments.synthetic import automata
from experiments.synthetic.automata import PADDING, SEPARATOR, AutomataConfig, draw, language, tally
from experiments.synthetic.examples import IGNORED
from experiments.synthetic.scores import accuracy

SMALL = AutomataConfig(states=(4, 6), alphabet=(4, 6), strings=(2, 5), string_length=(1, 9))


def accepts(automaton, word) -> bool:
    state = 0
    for symbol in word:
        if symbol not in automaton[state]:
            return False
        state = automaton[state][symbol]
    return True


def random_automata(number: int):
    rng = np.random.default_rng(0)
    return [automata._automaton(rng, SMALL) for _ in range(number)]


def test_automata_are_as_described():
    rng, config = np.random.default_rng(1), AutomataConfig()
    drawn = [automata._automaton(rng, config) for _ in range(500)]
    assert {len(a) for a in drawn} == set(range(4, 13))
    assert {len(state) for a in drawn for state in a} == {1, 2, 3}
    for automaton in drawn:
        for number, state in enumerate(automaton):
            assert number not in state.values() and len(set(state.values())) == len(state)
            assert all(0 <= symbol < 18 for symbol in state)
    assert max(len({symbol for state in a for symbol in state}) for a in drawn) > 12


def test_a_language_is_the_same_exactly_where_the_accepted_strings_are():
    found = random_automata(12)
    # states renamed, and one of them twice: the same language in another guise
    for automaton in found[:6]:
        order = [0, *range(len(automaton) - 1, 0, -1)]
        renamed = tuple({s: order.index(to) for s, to in automaton[old].items()} for old in order)
        doubled = (*renamed, dict(renamed[1]))
        doubled = tuple(
            {s: len(renamed) if to == 1 and i % 2 else to for s, to in st.items()} for i, st in enumerate(doubled)
        )
        found += [renamed, doubled]
    symbols = sorted({symbol for a in found for state in a for symbol in state})
    for one, other in itertools.combinations(found, 2):
        words = itertools.chain.from_iterable(itertools.product(symbols, repeat=n) for n in range(4))
        same = all(accepts(one, word) == accepts(other, word) for word in words)
        if language(one) == language(other):
            assert same
        elif same:  # they differ later
            assert any(accepts(one, w) != accepts(other, w) for w in _long_words(one)) or any(
                accepts(one, w) != accepts(other, w) for w in _long_words(other)
            )
    assert all(
        language(a) == language(found[12 + 2 * i]) == language(found[13 + 2 * i]) for i, a in enumerate(found[:6])
    )


def _long_words(automaton):
    """Accepted words of nine symbols."""
    words = [((), 0)]
    for _ in range(9):
        words = [((*word, s), to) for word, state in words for s, to in automaton[state].items()]
    return [word for word, _ in words]


def test_no_language_comes_twice(monkeypatch):
    few = random_automata(5)
    twice = iter([*few, *few, *few[:2]])
    monkeypatch.setattr(automata, "_automaton", lambda *_: next(twice))
    monkeypatch.setattr(automata, "PATIENCE", 5)
    found = []
    with pytest.raises(UserError, match="no more than 5 languages like these; widen the ranges"):
        for automaton in automata._different(np.random.default_rng(0), SMALL):
            found.append(automaton)
    assert len(found) == len({language(a) for a in few})


def test_what_may_come_next_is_what_the_automaton_says(monkeypatch):
    drawn = []

    def remember(rng, config):
        drawn.append(original(rng, config))
        return drawn[-1]

    original = automata._automaton
    monkeypatch.setattr(automata, "_automaton", remember)
    train, test = draw(SMALL, 30, 20)
    for problems, own in ((test, drawn[:20]), (train, drawn[20:])):
        for inputs, targets, accepted, automaton in zip(*problems.examples, problems.accepted, own, strict=True):
            word, length = [], int(np.sum(inputs != PADDING))
            for place in range(length):
                word = [] if inputs[place] == SEPARATOR else [*word, inputs[place]]
                expected = [accepts(automaton, [*word, symbol]) for symbol in range(20)]
                if targets[place] != IGNORED:
                    np.testing.assert_array_equal(accepted[place], expected)
                    assert accepted[place, targets[place]]
                elif place + 1 < length:
                    assert inputs[place + 1] == SEPARATOR
            assert (targets[length:] == IGNORED).all()


def test_the_truth_is_worth_everything_and_separators_nothing():
    test = draw(SMALL, 1, 50)[1]
    assert accuracy(tally(np.maximum(test.examples.targets, 0), test)) == 1
    assert accuracy(tally(np.full_like(test.examples.targets, SEPARATOR), test)) == 0


def test_more_training_leaves_the_test_as_it_is():
    one, other = draw(SMALL, 3, 20)[1], draw(SMALL, 9, 20)[1]
    np.testing.assert_array_equal(one.examples.inputs, other.examples.inputs)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"states": (5, 4)}, r"states=\(5, 4\) must be a range of positive numbers"),
        ({"alphabet": (4, 19)}, r"alphabet=\(4, 19\) must stay within 18 symbols"),
        ({"ways_out": (1, 4)}, r"ways_out=\(1, 4\) must be fewer than the fewest states, 4"),
    ],
)
def test_ranges_without_sense_end_in_a_sentence(fields, words):
    with pytest.raises(ValueError, match=words):
        AutomataConfig(**fields)
