"""Buckets, bands, differences and the sentences they support, on rows whose truth is known."""

import csv
import itertools
import re

import numpy as np
import pytest

from experiments.curves.bands import (
    Bands,
    Grid,
    contrast,
    curve,
    difference,
    log_edges,
    reaching,
    save_curves,
    shared_text,
)
from experiments.curves.findings import beyond, claims, compare
from experiments.curves.scores import Scores


def rows(nll, lengths=None, target=None, num_bytes=2):
    """Scores of nll [documents, positions], cut to the lengths."""
    lengths = np.full(len(nll), nll.shape[1]) if lengths is None else np.asarray(lengths)
    document, position = np.nonzero(np.arange(nll.shape[1]) < lengths[:, None])
    target = position % 7 if target is None else target
    names = np.array([f"doc{i:03d}" for i in range(len(nll))])
    bytes_each = np.full(len(position), num_bytes)
    return Scores(names, document, position, target, bytes_each, position * num_bytes, nll[document, position])


def noisy(num_documents, length, shape=0.0, *, seed=0, spread=0.5, own=0.0):
    """A truth of 2 + shape; documents that differ by `spread`; noise per token, of which `own` has its own seed."""
    shared = np.random.default_rng(seed)
    nll = (
        2 + shape + spread * shared.normal(size=(num_documents, 1)) + 0.3 * shared.normal(size=(num_documents, length))
    )
    return nll + own * np.random.default_rng(seed + 1000).normal(size=(num_documents, length))


@pytest.mark.parametrize("length", [1, 2, 3, 63, 500, 2048])
@pytest.mark.parametrize("per_octave", [1, 2, 3])
def test_buckets_partition_the_positions(length, per_octave):
    edges = log_edges(length, per_octave=per_octave, also=(300,))
    assert edges[0] == 0 and edges[-1] == length and (np.diff(edges) > 0).all()
    assert length < 300 or 300 in edges


def test_every_token_falls_into_one_bucket():
    scores = rows(noisy(5, 100), lengths=[100, 3, 50, 77, 1])
    found = curve(scores, Grid(log_edges(100)))
    assert found.num_tokens.sum() == len(scores.nll) == 231
    assert found.num_documents[0] == 5 and found.num_documents[-1] == 2


def test_the_mean_pools_tokens_so_documents_weigh_by_their_share_of_the_bucket():
    nll = np.array([[1.0, 1.0, 1.0, 1.0], [3.0, 3.0, 0.0, 0.0]])
    found = curve(rows(nll, lengths=[4, 2]), Grid(np.array([0, 1, 4])))
    np.testing.assert_allclose(found.mean, [2.0, (3 * 1.0 + 3.0) / 4])
    assert found.num_documents.tolist() == [2, 2] and found.num_tokens.tolist() == [2, 4]


def test_the_mean_of_losses_is_taken_before_any_exponential():
    nll = np.log(np.array([[2.0, 8.0]]))
    found = curve(rows(nll), Grid(np.array([0, 2])))
    np.testing.assert_allclose(np.exp(found.mean), [4.0])  # a perplexity of 5 would be the mean of exp


def test_bits_per_byte_divide_the_bits_by_the_bytes_of_the_same_tokens():
    nll = np.log(2) * np.array([[8.0, 4.0], [2.0, 2.0]])
    found = curve(rows(nll, num_bytes=4), Grid(np.array([0, 1, 2]), unit="bits per byte"))
    np.testing.assert_allclose(found.mean, [10 / 8, 6 / 8])


def test_an_empty_bucket_is_nan_and_a_thin_one_has_no_band():
    found = curve(rows(noisy(7, 8), lengths=[1, 1, 4, 4, 4, 4, 4]), Grid(np.array([0, 1, 4, 8])))
    assert found.num_documents.tolist() == [7, 5, 0]
    assert not np.isnan(found.low[0]) and np.isnan(found.low[1:]).all()
    assert not np.isnan(found.mean[1]) and np.isnan(found.mean[2])


def test_an_infinite_loss_shows_as_an_infinite_mean_without_a_band():
    nll = noisy(8, 4)
    nll[3, 2] = np.inf
    found = curve(rows(nll), Grid(np.array([0, 2, 4])))
    assert np.isfinite([found.mean[0], found.low[0]]).all() and found.mean[1] == np.inf and np.isnan(found.low[1])


def test_the_band_holds_the_truth_about_95_times_in_100():
    grid, hits = Grid(np.array([0, 4, 20])), []
    for seed in range(300):
        found = curve(rows(noisy(40, 20, seed=seed)), grid, Bands(num_resamples=300, seed=seed))
        hits.append((found.low <= 2) & (found.high >= 2))
    coverage = np.mean(hits, axis=0)
    assert (coverage > 0.9).all() and (coverage < 0.98).all(), coverage


def test_a_band_over_tokens_instead_of_documents_would_be_far_too_narrow():
    nll = noisy(40, 100)
    found = curve(rows(nll), Grid(np.array([0, 100])))
    over_tokens = 2 * 1.96 * nll.std() / np.sqrt(nll.size)
    assert found.high[0] - found.low[0] > 3 * over_tokens


def test_the_paired_band_is_narrower_than_unpaired_ones_and_holds_the_truth():
    grid, hits = Grid(np.array([0, 20])), 0
    for seed in range(200):
        first, second = rows(noisy(40, 20, -0.1, seed=seed, own=0.5)), rows(noisy(40, 20, seed=seed))
        found = difference(first, second, grid, Bands(num_resamples=300))
        hits += found.low[0] <= -0.1 <= found.high[0]
        single = curve(first, grid, Bands(num_resamples=300))
        assert found.high[0] - found.low[0] < 0.5 * (single.high[0] - single.low[0])
    assert 0.9 < hits / 200 < 0.98


def test_a_run_does_not_differ_from_itself():
    scores = rows(noisy(10, 20))
    found = difference(scores, scores, Grid(log_edges(20)))
    assert (found.mean == 0).all() and (found.low == 0).all() and (found.high == 0).all()


def test_the_same_seed_draws_the_same_band_and_another_seed_another():
    scores, grid = rows(noisy(10, 20)), Grid(log_edges(20))
    ours, again, other = (curve(scores, grid, Bands(seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(ours.low, again.low)
    assert (ours.low != other.low).any()


def test_different_tokens_are_refused_in_one_sentence_that_says_where():
    first, second = rows(noisy(6, 9)), rows(noisy(6, 9))
    other = second._replace(target=np.where(np.arange(54) == 12, 6, second.target))
    with pytest.raises(ValueError, match="different tokens, first at position 3 of document 'doc001'"):
        difference(first, other, Grid(log_edges(9)))
    with pytest.raises(ValueError, match="first at position 7 of document 'doc000'"):
        difference(first, rows(noisy(6, 7)), Grid(log_edges(9)))


def test_different_documents_are_refused_by_name():
    first, second = rows(noisy(6, 9)), rows(noisy(5, 9))
    with pytest.raises(ValueError, match="only one has 'doc005'"):
        difference(first, second, Grid(log_edges(9)))


def test_different_tokenizers_compare_in_bits_per_byte_over_the_text_both_have_read():
    """One tokenizer splits the same 16 bytes into 8 tokens, the other into 4 of twice the loss, then reads on."""
    fine = rows(np.full((6, 8), 1.0), num_bytes=2)
    coarse = rows(np.full((6, 10), 2.0), num_bytes=4, target=np.zeros(60, int))
    grid = Grid(np.array([0, 8, 40]), axis="bytes", unit="bits per byte")
    found = difference(fine, coarse, grid)
    np.testing.assert_allclose(found.mean, 0, atol=1e-12)
    assert found.num_tokens.tolist() == [12, 12]


def test_the_text_that_is_shared_ends_where_tokens_of_all_end():
    """Tokens of 4 and of 6 bytes, read up to 40 and 36 bytes: both end at 36, though 40 and 36 are the last of each."""
    four, six = rows(np.ones((3, 10)), num_bytes=4), rows(np.ones((3, 6)), num_bytes=6)
    assert [len(one.nll) // 3 for one in shared_text(four, six)] == [9, 6]
    seven = rows(np.ones((3, 5)), num_bytes=7)
    assert [len(one.nll) // 3 for one in shared_text(four, seven)] == [7, 4]


def test_claims_and_losses_of_different_tokenizers_are_about_the_text_both_have_read():
    rng = np.random.default_rng(0)
    fine = rows(1 + rng.random((10, 64)), num_bytes=2)
    coarse = rows(2 + rng.random((10, 64)), num_bytes=4, target=np.zeros(640, int))
    coarse.nll[coarse.bytes_before >= 128] = 99.0  # only one has read this far
    grid = Grid(log_edges(256), axis="bytes", unit="bits per byte")
    assert claims(fine, coarse, grid)[-1].stop == 128
    overall = compare(("fine", "coarse"), fine, coarse, grid)[0]
    assert float(re.search(r"([\d.]+) for coarse", overall)[1]) < 3


def test_a_grid_too_short_for_the_rows_is_refused():
    with pytest.raises(ValueError, match="edges must hold every scored place, 0 to 8"):
        curve(rows(noisy(6, 9)), Grid(np.array([0, 4])))


def test_contrast_finds_the_step_within_documents():
    step = np.where(np.arange(20) < 10, 0.0, 0.7)
    mean, low, high = contrast(rows(noisy(40, 20, step)), Grid(np.array([0, 10, 20])), 0, 1)
    assert low < 0.7 < high and abs(mean - 0.7) < 0.1


def test_reaching_keeps_all_rows_of_the_documents_that_go_far_enough():
    kept = reaching(rows(noisy(4, 9), lengths=[9, 3, 5, 6]), 5)
    assert kept.names.tolist() == ["doc000", "doc003"]
    assert np.bincount(kept.document).tolist() == [9, 6]


def crossing(seed=0, num_documents=60):
    """First better by 0.2 before position 32, equal to 128, worse by 0.2 after."""
    place = np.arange(512)
    effect = np.where(place < 32, -0.2, np.where(place < 128, 0.0, 0.2))
    first = noisy(num_documents, 512, effect, seed=seed, own=0.3)
    return rows(first), rows(noisy(num_documents, 512, seed=seed))


def test_claims_find_where_the_runs_cross():
    found = claims(*crossing(), Grid(log_edges(512, per_octave=1)))
    assert [claim.sign for claim in found] == [-1, 0, 1]
    assert [claim.start for claim in found] == [0, 32, 128]


def test_claims_cover_every_position_once_and_neighbours_differ():
    for seed in range(10):
        found = claims(*crossing(seed, 8), Grid(log_edges(512)), most=3)
        assert found[0].start == 0 and found[-1].stop == 512 and len(found) <= 3
        for left, right in itertools.pairwise(found):
            assert left.stop == right.start and left.sign != right.sign


def test_runs_that_differ_by_chance_alone_are_rarely_said_to_differ():
    said = 0
    for seed in range(100):
        first, second = rows(noisy(40, 256, seed=seed, own=0.3)), rows(noisy(40, 256, seed=seed))
        said += any(claim.sign for claim in claims(first, second, Grid(log_edges(256)), Bands(num_resamples=200)))
    assert said <= 20


def test_the_sentence_says_what_the_numbers_say():
    overall, by_position = compare(("mesa", "transformer"), *crossing(), Grid(log_edges(512, per_octave=1)))
    assert re.fullmatch(r"Over all 60 documents .* mesa is worse \(95 % band .*\)\.", overall)
    pattern = (
        r"mesa is better than transformer by 0\.\d{3} nats per token \(95 % band −.*\) within the first 32 tokens, "
        r"there is no significant difference from 33 to 128 tokens and it is worse by 0\.\d{3} nats per token \(.*\) "
        r"beyond 128 tokens\."
    )
    assert re.fullmatch(pattern, by_position), by_position


def test_without_a_difference_the_sentence_says_so():
    scores = rows(noisy(10, 20))
    assert compare(("a", "b"), scores, scores, Grid(log_edges(20)))[1].endswith(
        "no significant difference at any position."
    )


def test_what_happens_beyond_the_trained_length_is_said_only_of_documents_that_go_there():
    step = np.where(np.arange(64) < 32, 0.0, 0.5)
    nll, grid = noisy(40, 64, step), Grid(log_edges(64, also=(32,)))
    sentence = beyond("mesa", rows(nll, lengths=[64] * 30 + [20] * 10), grid, 32)
    assert re.match("Beyond the trained length of 32 tokens, the loss of mesa rises by 0.[45].*30 documents", sentence)
    assert beyond("mesa", rows(nll, lengths=[20] * 40), grid, 32) is None


def test_numbers_behind_a_figure_are_written_as_csv(tmp_path):
    found = curve(rows(noisy(10, 20)), Grid(log_edges(20)))
    save_curves({"a": found, "b": found}, tmp_path / "curve.csv")
    with open(tmp_path / "curve.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 2 * len(found.mean) and {row["curve"] for row in table} == {"a", "b"}
    assert float(table[3]["mean"]) == found.mean[3] and int(table[3]["num_documents"]) == 10
