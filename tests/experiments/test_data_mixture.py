"""Rows of several sources: exact shares, nothing lost, and the same whoever reads them."""

import collections
import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data import (
    DataConfig,
    PackedWindows,
    Windows,
    held_out_documents,
    held_out_text,
    ordered_batches,
    shuffled_rows,
    stack,
    training_text,
)
from experiments.data.mixture import Turns
from experiments.tokenizers import ByteTokenizer

positive = st.integers(1, 10**6) | st.floats(1e-3, 1e3)


def windows_of(*counts: int, length: int = 4) -> Windows:
    """Sources of so many windows each; every token tells its source and window."""
    first = np.cumsum([0, *counts]) * 1000
    return Windows(
        [
            PackedWindows.of([np.repeat(start + np.arange(n, dtype=np.int32), length)[: n * length + 1]], length)
            for n, start in zip(counts, first, strict=False)
        ]
    )


def names(rows, first: int, last: int) -> list[int]:
    """The window that each row is, by its first token."""
    return [int(rows[n].tokens[0]) for n in range(first, last)]


@given(st.lists(positive, min_size=1, max_size=6), st.integers(0, 10**12))
def test_each_source_gets_its_rows_in_order_and_none_is_left_out(weights, row):
    turns = Turns(weights)
    due = turns.counts(row)
    assert sum(due) == row
    for n in range(row, row + 50):
        source, theirs = turns[n]
        assert theirs == due[source]
        due[source] += 1
    assert due == turns.counts(row + 50)


@given(st.lists(positive, min_size=1, max_size=6), st.integers(1, 10**12))
def test_shares_are_exact_to_about_a_row_of_any_beginning(weights, num_rows):
    exact = [Fraction(str(weight)) for weight in weights]
    bound = (1 + sum(Fraction(1, i) for i in range(1, len(weights) - 1))) / 2  # 1 for three sources
    for weight, count in zip(exact, Turns(weights).counts(num_rows), strict=True):
        assert abs(count - num_rows * weight / sum(exact)) <= bound


def test_weights_are_taken_as_they_are_written():
    counts = collections.Counter(Turns([0.1, 0.2, 0.7])[n][0] for n in range(1000))
    assert counts == {0: 100, 1: 200, 2: 700}
    assert all(Turns([1, 0, 3])[n][0] != 1 for n in range(100))


def test_each_source_goes_through_its_windows_before_it_repeats_any():
    windows = windows_of(30, 7)
    config = DataConfig(source=("a", "b"), weights=(0.5, 0.5))
    seen = names(shuffled_rows(windows, config), 0, 120)
    for part, count in ((range(0, 30_000), 30), (range(30_000, 99_000), 7)):
        own = [name for name in seen if name in part]
        assert len(own) == 60
        epochs = [own[i : i + count] for i in range(0, 60 - count + 1, count)]
        assert all(len(set(epoch)) == count for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_sources_of_one_size_do_not_go_in_step():
    rows = shuffled_rows(windows_of(20, 20), DataConfig(source=("a", "b")))
    seen = names(rows, 0, 40)
    assert [name for name in seen if name < 20_000] != [name - 20_000 for name in seen if name >= 20_000]


def test_without_weights_an_epoch_of_all_is_an_epoch_of_each():
    windows = windows_of(30, 7, 1)
    rows = shuffled_rows(windows, DataConfig(source=("a", "b", "c")))
    for epoch in range(3):
        assert len(set(names(rows, 38 * epoch, 38 * (epoch + 1)))) == 38


def test_windows_in_order_are_all_there_and_mixed_from_the_start():
    windows = windows_of(30, 10)
    batches = ordered_batches(windows, 8)
    seen = [int(tokens[0]) for n in range(len(batches)) for tokens in batches[n].tokens]
    assert len(set(seen)) == len(windows) == 40
    assert sum(name >= 30_000 for name in seen[:8]) == 2


@pytest.mark.parametrize("weights", [(), (0.7, 0.2, 0.1)])
def test_hosts_that_come_and_go_read_what_one_host_reads(weights):
    config = DataConfig(source=("a", "b", "c"), weights=weights, batch_size=8)
    alone = shuffled_rows(windows_of(21, 9, 5), config)
    expected = [stack([alone[8 * step + i] for i in range(8)]).tokens for step in range(12)]
    read = []
    for step, num_hosts in enumerate([4, 4, 2, 2, 2, 1, 4, 8, 8, 2, 4, 4]):
        tokens = np.zeros_like(expected[0])
        for host in range(num_hosts):  # each starts anew and knows the step alone
            rows = shuffled_rows(windows_of(21, 9, 5), config)
            for i in range(host * 8 // num_hosts, (host + 1) * 8 // num_hosts):
                tokens[i] = rows[8 * step + i].tokens
        read.append(tokens)
    np.testing.assert_array_equal(read, expected)
    if not weights:  # two epochs of 35 windows and a bit: nothing was lost or read twice
        seen = [int(tokens[0]) for batch in read for tokens in batch]
        assert len(set(seen[:35])) == len(set(seen[35:70])) == 35


@pytest.fixture
def two_folders(tmp_path):
    for source, count in (("a", 30), ("b", 10)):
        (tmp_path / source).mkdir()
        for i in range(count):
            (tmp_path / source / f"{i}.txt").write_text(f"text {i} of {source}")
    return str(tmp_path / "a"), str(tmp_path / "b")


def test_documents_of_several_sources_keep_names_of_their_own(two_folders):
    config = DataConfig(source=two_folders, held_out=0.3, length=16)
    documents = list(held_out_documents(config, ByteTokenizer()))
    apart = [held_out_documents(dataclasses.replace(config, source=(s,)), ByteTokenizer()) for s in two_folders]
    assert len(documents) == len({d.name for d in documents}) == sum(map(len, apart))
    assert [d.name for d in documents] == [
        f"{s}/{d.name}" for s, some in zip(two_folders, apart, strict=True) for d in some
    ]
    assert len(held_out_text(config, ByteTokenizer())) > 2


def test_the_fingerprint_covers_all_sources_in_their_order(two_folders):
    config = DataConfig(source=two_folders, length=16)
    a, b = two_folders
    prints = {
        training_text(dataclasses.replace(config, source=source), ByteTokenizer()).fingerprint
        for source in ((a, b), (b, a), (a,), (b,))
    }
    assert len(prints) == 4
    assert training_text(config, ByteTokenizer()).fingerprint in prints


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": (1.0,)}, r"DataConfig: weights=\(1.0,\) must be one for each of 2 source"),
        ({"weights": (1.0, -1.0)}, "must be 0 or more, and not all of them 0"),
        ({"weights": (0.0, 0.0)}, "must be 0 or more, and not all of them 0"),
        ({"weights": (1.0, float("nan"))}, "must be 0 or more, and not all of them 0"),
        ({"weights": (1.0, float("inf"))}, "must be 0 or more, and not all of them 0"),
        ({"source": ()}, "must name at least one text"),
        ({"source": "stdlib"}, "source='stdlib' must name at least one text, as a tuple"),
        ({"source": ("a", "a")}, "names a text twice; give it a larger weight instead"),
        ({"seed": 2**32}, "must lie between 0 and"),
    ],
)
def test_bad_mixtures_end_in_a_sentence(changes, words):
    with pytest.raises(ValueError, match=words):
        DataConfig(**({"source": ("a", "b")} | changes))
