"""Reference sets: what they refuse, and what each operation keeps."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from r2t2_jax.references import Diff, credit, refresh
from r2t2_jax.shapes import Readout
from tests.r2t2_jax.made_up import reference_set


def changed(array, place, value):
    """A copy with one entry changed."""
    array = np.array(array)
    array[place] = value
    return array


GOOD = reference_set()
BAD = [
    ({"ids": ["a"] * 12}, ValueError, "the id 'a' occurs more than once"),
    ({"ids": [f"r{i}" for i in range(11)]}, ValueError, r"sources has shape \(12,\); with 11 ids"),
    ({"ids": range(12)}, TypeError, "ids must be a sequence of strings"),
    ({"sources": "abcdefghijkl"}, TypeError, "sources must be a sequence of strings"),
    ({"labels": changed(GOOD.labels, 3, 4)}, ValueError, "labels of 'r3' is not an index of the 4 answers"),
    ({"labels": changed(GOOD.labels, 3, -1)}, ValueError, "labels of 'r3' is not an index"),
    (
        {"labels": changed(GOOD.labels.astype(np.int64), 3, 2**32)},
        ValueError,
        "labels has values that do not fit int32",
    ),
    ({"labels": GOOD.labels.astype(np.float32)}, TypeError, "labels has dtype float32; pass an array of integer"),
    ({"correct": GOOD.labels}, TypeError, "correct has dtype int32"),
    ({"time": GOOD.time + 0.5}, TypeError, "time has dtype float64"),
    ({"routing": changed(GOOD.routing, (5, 0), np.nan)}, ValueError, "routing of 'r5' is not finite"),
    ({"routing": GOOD.routing * 1.01}, ValueError, r"routing of 'r0'.* and 7 more is not non-negative with sum 1"),
    (
        {"routing": changed(GOOD.routing, (5, slice(0, 2)), [-0.5, 1.5])},
        ValueError,
        "routing of 'r5' is not non-negative",
    ),
    ({"routing": GOOD.routing[:, [0, 2, 1, 3, 4]]}, ValueError, "routing of .* is not non-negative"),  # groups mixed up
    (
        {"routing": GOOD.routing[:, :4]},
        ValueError,
        r"routing has shape \(12, 4\); its axes are \[r, e\], here \(12, 5\)",
    ),
    ({"embedding": changed(GOOD.embedding, (7, 1), np.nan)}, ValueError, "embedding of 'r7' is not finite"),
    ({"embedding": GOOD.embedding * 1.01}, ValueError, "embedding of .* is not of unit length"),
    (
        {"embedding": GOOD.embedding[:, 0]},
        ValueError,
        r"embedding has shape \(12,\); its axes are \[r, p\], here \(12, p\)",
    ),
    ({"features": changed(GOOD.features, (2, 2), -np.inf)}, ValueError, "features of 'r2' is not finite"),
    ({"features": GOOD.features[:5]}, ValueError, r"features has shape \(5, 3\)"),
    ({"readout": tuple(GOOD.readout)}, TypeError, "readout is a tuple; pass a Readout"),
    ({"readout": Readout(GOOD.readout.weight[:, :, :3], GOOD.readout.offset)}, ValueError, r"readout.weight has shape"),
    (
        {"readout": Readout(GOOD.readout.weight, GOOD.readout.offset * np.inf)},
        ValueError,
        "readout.offset of .* not finite",
    ),
    ({"readout": Readout(GOOD.readout.weight, np.full((12, 4), -np.inf))}, ValueError, "masks the right answer"),
    ({"optimised": GOOD.routing * 2}, ValueError, "optimised of .* is not non-negative"),
    ({"inputs": {"image": np.zeros((11, 2))}}, ValueError, r"inputs\['image'\] has shape \(11, 2\); it needs 12 rows"),
    ({"inputs": {"text": np.array(["a"] * 12)}}, TypeError, r"inputs\['text'\] has dtype <U1; only numbers"),
    ({"groups": (2, 2)}, ValueError, r"groups=\(2, 2\) must be positive and add up to the 5 experts"),
    ({"groups": (2.0, 3.0)}, TypeError, "must be integers"),
    ({"model": None}, TypeError, "model, embedder and names of inputs must be"),
    ({"inputs": {1: np.zeros((12, 2))}}, TypeError, "names of inputs must be"),
]


@pytest.mark.parametrize(("fields", "error", "message"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_right_is_refused_by_name(fields, error, message):
    with pytest.raises(error, match=message):
        reference_set(**fields)


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="there is no reference"):
        GOOD.select(np.zeros(12, bool))


def test_a_set_owns_its_arrays_and_nobody_can_write_to_them():
    features = np.ones((12, 3), np.float32)
    references = reference_set(features=features)
    features[:] = 7
    assert (references.features == 1).all()
    with pytest.raises(ValueError, match="read-only"):
        references.readout.weight[0] = 1


def test_arrays_become_the_types_that_are_stored():
    references = reference_set(labels=[1] * 12, routing=jnp.asarray(GOOD.routing, jnp.bfloat16))
    assert references.labels.dtype == np.int32
    assert references.routing.dtype == np.float32  # and its sums, rounded to bfloat16, pass


def test_the_fingerprint_follows_everything_that_influences_an_answer_and_nothing_else():
    same = [
        reference_set(time=np.arange(12) + 5),
        reference_set(inputs={"image": np.ones((12, 2))}),
        reference_set(ids=np.array(GOOD.ids, dtype="<U40")),
    ]
    other = [
        reference_set(ids=[f"s{i}" for i in range(12)]),
        reference_set(sources=["a"] * 12),
        reference_set(labels=(GOOD.labels + 1) % 4),
        reference_set(correct=~GOOD.correct),
        reference_set(embedding=-GOOD.embedding),
        reference_set(readout=Readout(GOOD.readout.weight, GOOD.readout.offset + 1)),
        reference_set(optimised=GOOD.routing),
        reference_set(embedder="another"),
        GOOD.select(np.arange(12)[::-1]),
    ]
    assert {x.fingerprint for x in same} == {GOOD.fingerprint}
    assert len({x.fingerprint for x in [GOOD, *other]}) == 1 + len(other)


def test_select_takes_a_mask_or_indices_and_keeps_their_order():
    assert GOOD.select([3, 1]).ids.tolist() == ["r3", "r1"]
    masked = GOOD.select(GOOD.labels == 1)
    np.testing.assert_array_equal(masked.features, GOOD.features[GOOD.labels == 1])
    np.testing.assert_array_equal(masked.readout.weight, GOOD.readout.weight[GOOD.labels == 1])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there is no reference"),
        ([1, 1], "'r1' occurs more than once"),
        ([12], "rows go from 0 to 11, not from 12 to 12"),
        ([-1], "rows go from 0 to 11"),
        ([0.5], "pass indices, or a mask of length 12"),
        ([True] * 11, "pass indices, or a mask of length 12"),
    ],
)
def test_select_refuses_rows_that_are_not_there(rows, message):
    with pytest.raises(ValueError, match=message):
        GOOD.select(rows)


def test_correct_only_keeps_what_the_frozen_model_answers_rightly():
    kept = GOOD.correct_only()
    assert kept.correct.all() and len(kept) == GOOD.correct.sum()


def test_stored_examples_can_be_dropped_without_a_change_of_fingerprint():
    references = reference_set(inputs={"image": np.ones((12, 2))})
    assert references.without_inputs().inputs == {}
    assert references.without_inputs().fingerprint == references.fingerprint


def test_adding_and_removing_again_gives_the_same_set():
    more = reference_set(5, seed=1, prefix="s")
    both = GOOD.add(more)
    assert both.ids.tolist() == [*GOOD.ids, *more.ids]
    assert both.remove(more.ids).fingerprint == GOOD.fingerprint
    assert both.remove(GOOD.ids.tolist()).fingerprint == more.fingerprint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "other"}, "model is 'mmmm.* here and 'other' there"),
        ({"embedder": "other"}, "embedder is"),
        ({"answers": tuple("abcd")}, "answers is"),
        ({"experts": tuple("abcde")}, "experts is"),
        ({"embedding": np.eye(7)[:5]}, r"a row of embedding is float32\[4\] here and float32\[7\] there"),
        ({"features": np.ones((5, 2))}, "a row of features"),
        ({"inputs": {"image": np.ones((5, 2))}}, r"a row of inputs.image is absent here and float64\[2\] there"),
        ({"prefix": "r"}, "both sets have the id 'r0', 'r1', 'r2', 'r3', 'r4'; remove it"),
    ],
)
def test_sets_that_do_not_fit_together_are_not_added(fields, message):
    with pytest.raises(ValueError, match=message):
        GOOD.add(reference_set(5, **{"prefix": "s"} | fields))


def test_a_set_with_optimised_routing_and_one_without_are_not_added():
    with pytest.raises(ValueError, match=r"a row of optimised is float32\[5\] here and absent there"):
        reference_set(optimised=GOOD.routing).add(reference_set(5, prefix="s"))


def test_unknown_ids_and_sources_are_named_and_nothing_is_removed():
    with pytest.raises(ValueError, match="'x' is not among the ids; nothing was removed"):
        GOOD.remove(["r1", "x"])
    with pytest.raises(ValueError, match="'image9' is not among the sources"):
        GOOD.drop_sources(["image9"])
    with pytest.raises(TypeError, match="references: ids must be a sequence of strings"):
        GOOD.remove("r1")
    with pytest.raises(TypeError, match="references: sources must be a sequence of strings"):
        GOOD.drop_sources("r-image1")


def test_a_source_is_dropped_with_all_that_was_made_from_it():
    left = GOOD.drop_sources(["r-image1"])
    assert left.ids.tolist() == [f"r{i}" for i in (0, 1, 2, 6, 7, 8, 9, 10, 11)]


def test_what_is_older_than_a_time_expires():
    assert GOOD.expire(9).ids.tolist() == ["r9", "r10", "r11"]


def duplicated(**fields):
    """Twenty references, then the first five of them again but for what fields say; time runs backwards."""
    first = reference_set(20, seed=2, time=-np.arange(20))
    again = dataclasses.replace(first.select(range(5)), ids=tuple("abcde"), time=-20 - np.arange(5), **fields)
    return first.add(again)


def test_of_near_duplicates_the_earliest_stays():
    kept = duplicated().deduplicate()
    assert kept.ids.tolist() == [*(f"r{i}" for i in range(5, 20)), *"abcde"]


@pytest.mark.parametrize(
    "fields",
    [
        {"labels": (reference_set(20, seed=2).labels[:5] + 1) % 4},
        {"features": np.random.default_rng(8).normal(size=(5, 3))},
        {"embedding": np.eye(4)[[0, 1, 2, 3, 0]]},
    ],
    ids=["label", "features", "embedding"],
)
def test_what_differs_in_label_features_or_embedding_is_no_duplicate(fields):
    assert len(duplicated(**fields).deduplicate()) == 25


def test_the_threshold_of_duplicates_is_a_cosine_where_embeddings_tell():
    cosines = np.array([1, 0.97, 0.93, 0.5])
    embedding = np.stack([cosines, np.sqrt(1 - cosines**2)], 1)
    references = reference_set(4, labels=[0] * 4, embedding=embedding, features=np.ones((4, 3)))
    assert references.deduplicate(0.95).ids.tolist() == ["r0", "r2", "r3"]  # r2 resembles r1, which is gone
    assert references.deduplicate(0.98).ids.tolist() == ["r0", "r1", "r3"]
    with pytest.raises(ValueError, match="similarity=1"):
        references.deduplicate(1)


def test_a_cap_keeps_the_extremes():
    places = np.array([0.5, 0.0, 0.51, 1.0, 0.49])
    embedding = np.stack([np.cos(places), np.sin(places)], 1)
    references = reference_set(5, embedding=embedding, features=np.ones((5, 1)))
    assert references.cap(3).ids.tolist() == ["r0", "r1", "r3"]
    assert references.cap(5) is references
    with pytest.raises(ValueError, match="size=0"):
        references.cap(0)


def test_a_cap_of_unrelated_points_covers_better_than_the_first_ones():
    references = reference_set(400, features=np.ones((400, 1)))
    capped = references.cap(40)

    def gap(chosen):
        return np.linalg.norm(references.embedding[:, None] - chosen.embedding, axis=-1).min(1).max()

    assert len(capped) == 40
    assert gap(capped) < 0.8 * gap(references.select(range(40)))


def test_no_source_has_more_than_its_share_and_keeps_its_latest():
    references = reference_set(9, time=[5, 1, 3, 2, 2, 2, 0, 0, 1])
    assert references.cap_per_source(2).ids.tolist() == ["r0", "r2", "r4", "r5", "r7", "r8"]
    with pytest.raises(ValueError, match="limit=0"):
        references.cap_per_source(0)


def test_a_difference_names_what_came_went_and_changed():
    other = reference_set(13, routing=reference_set(13).routing).remove(["r4"])
    before = GOOD.select(range(11))
    after = dataclasses.replace(
        GOOD.select([0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]), inputs={"image": np.ones((11, 1))}, optimised=None
    )
    after = dataclasses.replace(after, labels=changed(after.labels, 2, (after.labels[2] + 1) % 4))
    assert before.diff(after) == Diff(added=("r11",), removed=("r4",), changed=("r2",))
    assert str(before.diff(after)) == "1 added ('r11'), 1 removed ('r4'), 1 changed ('r2')"
    assert str(GOOD.diff(GOOD)) == "0 added, 0 removed, 0 changed"
    assert "'r0', 'r1', 'r2', 'r3', 'r4' and 7 more" in str(GOOD.diff(other.select([11])))


def test_a_refresh_takes_feedback_in_and_lets_the_old_go():
    feedback = reference_set(6, seed=5, prefix="s", time=np.arange(20, 26))
    corrected = dataclasses.replace(GOOD.select([11]), time=[27], labels=(GOOD.labels[[11]] + 1) % 4)
    fresh, diff = refresh(GOOD, feedback.add(corrected), size=8, per_source=2, max_age=20, now=28)
    assert fresh.ids.tolist() == ["r8", "r10", "s1", "s2", "s4", "s5", "r11"]  # r9 is its source's third
    assert fresh.labels[fresh.ids == "r11"] != GOOD.labels[11]
    assert diff.added == ("s1", "s2", "s4", "s5") and diff.changed == ("r11",)
    assert diff.removed == (*(f"r{i}" for i in range(8)), "r9")
    smaller, _ = refresh(GOOD, feedback.add(corrected), size=5, per_source=2, max_age=20, now=28)
    assert len(smaller) == 5 and set(smaller.ids) <= set(fresh.ids)


def test_feedback_of_another_model_is_refused_even_if_it_replaces_everything():
    with pytest.raises(ValueError, match="model is"):
        refresh(GOOD, reference_set(model="other"), size=9, per_source=9, max_age=99, now=0)


def test_a_refresh_that_would_leave_nothing_is_refused():
    with pytest.raises(ValueError, match="there is no reference"):
        refresh(GOOD, reference_set(3, prefix="s"), size=9, per_source=9, max_age=1, now=1000)


def test_credit_is_the_share_in_every_gain():
    value = credit(np.array([[0, 2], [2, 0]]), np.array([[0.25, 0.75], [1.0, 0.0]]), np.array([4.0, -1.0]), 4)
    np.testing.assert_array_equal(value, [1, 0, 2, 0])
    with pytest.raises(ValueError, match="gain is not finite"):
        credit(np.array([[0]]), np.array([[1.0]]), np.array([np.inf]), 1)
    with pytest.raises(ValueError, match="between 0 and 3"):
        credit(np.array([[4]]), np.array([[1.0]]), np.array([1.0]), 4)
