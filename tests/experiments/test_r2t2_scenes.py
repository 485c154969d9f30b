"""Scenes are what they say: the same bits every time, answers that are right, and handwriting that nobody shares."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from experiments.r2t2.scenes import CONDITIONS, DIGIT, EMPTY, PALETTE, POOLS, SPLITS, _ask, _contents, _render, make
from r2t2_jax.models.scenes import ANSWERS, COLORS, NO_COLOR, NO_SHAPE, SHAPES, TEMPLATES

SIZE = 2000


@functools.cache
def drawn(split="reference", size=SIZE, seed=0):
    return make(split, size, seed)


@functools.cache
def asked():
    """Scenes as contents and colours, and what is asked about them."""
    rng = np.random.default_rng(0)
    contents, colors = _contents(SIZE, rng)
    digit = rng.integers(10, size=SIZE)
    return contents, colors, digit, *_ask(contents, colors, digit, rng)


def fields(scenes):
    return [getattr(scenes, field.name) for field in dataclasses.fields(scenes)]


def test_the_same_arguments_give_the_same_bits_and_others_do_not():
    first, again = make("dev", 50, 3), make("dev", 50, 3)
    for a, b in zip(fields(first), fields(again), strict=True):
        np.testing.assert_array_equal(a, b)
    for other in (make("dev", 50, 4), make("test", 50, 3)):
        assert (other.image != first.image).any() and (other.label != first.label).any()


def test_no_handwriting_is_in_two_pools():
    sources = {split: set(drawn(split).source.tolist()) for split in SPLITS}
    for a, b in itertools.combinations(SPLITS, 2):
        if {a, b} != {"train", "reference"}:
            assert not sources[a] & sources[b], (a, b)
    assert POOLS["train"] == POOLS["reference"] and POOLS["test"][1] == 1797
    assert all(len(sources[split]) > 0.9 * (POOLS[split][1] - POOLS[split][0]) for split in ("dev", "test"))


def test_a_scene_has_one_digit_and_no_colour_twice():
    contents, colors, *_ = asked()
    assert ((contents == DIGIT).sum(1) == 1).all()
    assert all(len(set(row)) == 4 for row in colors.tolist())
    places = np.bincount(np.nonzero(contents == DIGIT)[1], minlength=4) / SIZE
    np.testing.assert_allclose(places, 0.25, atol=0.03)
    others = contents[contents != DIGIT]
    np.testing.assert_allclose((others == EMPTY).mean(), 0.2, atol=0.02)
    np.testing.assert_allclose(np.bincount(others[others != EMPTY]) / (others != EMPTY).sum(), 0.25, atol=0.02)


def answers(cells, tints, digit, template, shape, color):
    """What can be answered, from a description of the scene in words; a question must have one answer."""
    names = [None if cell == EMPTY else "digit" if cell == DIGIT else SHAPES[cell] for cell in cells]
    things = [(name, COLORS[tint], i % 2) for i, (name, tint) in enumerate(zip(names, tints, strict=True)) if name]
    side = next(side for name, _, side in things if name == "digit")
    shape, color = (*SHAPES, None)[shape], (*COLORS, None)[color]
    yes_no = {True: "yes", False: "no"}
    return {
        "read digit": lambda: {str(digit)},
        "color of digit": lambda: {c for name, c, _ in things if name == "digit"},
        "color of shape": lambda: {c for name, c, _ in things if name == shape},
        "shape of color": lambda: {name for name, c, _ in things if c == color},
        "count shape": lambda: {str(sum(name == shape for name, *_ in things))},
        "is color present": lambda: {yes_no[any(c == color for _, c, _ in things)]},
        "is digit left of color": lambda: {yes_no[side < s] for _, c, s in things if c == color and s != side},
    }[TEMPLATES[template]]()


def test_every_answer_is_the_one_that_the_scene_gives():
    for cells, tints, digit, question, label in zip(*asked(), strict=True):
        assert answers(cells, tints, digit, *question) == {ANSWERS[label]}, (cells, tints, question)


def test_questions_name_what_they_ask_about_and_nothing_else():
    *_, question, _ = asked()
    names_shape = np.isin(question[:, 0], [TEMPLATES.index("color of shape"), TEMPLATES.index("count shape")])
    names_color = np.isin(
        question[:, 0],
        [TEMPLATES.index(x) for x in ("shape of color", "is color present", "is digit left of color")],
    )
    np.testing.assert_array_equal(question[:, 1] != NO_SHAPE, names_shape)
    np.testing.assert_array_equal(question[:, 2] != NO_COLOR, names_color)


def test_templates_come_about_evenly_and_yes_as_often_as_no():
    *_, question, label = asked()
    share = np.bincount(question[:, 0], minlength=len(TEMPLATES)) / SIZE
    assert share.min() > 0.1 and share.max() < 0.2
    for template in ("is color present", "is digit left of color"):
        told = label[question[:, 0] == TEMPLATES.index(template)]
        assert 0.45 < (told == ANSWERS.index("yes")).mean() < 0.55
    counts = label[question[:, 0] == TEMPLATES.index("count shape")]
    assert set(counts.tolist()) >= {0, 1, 2}


@pytest.mark.parametrize("split", SPLITS)
def test_conditions_come_evenly_but_what_is_trained_on_is_clean(split):
    share = np.bincount(drawn(split).condition, minlength=len(CONDITIONS)) / SIZE
    expected = np.eye(5)[0] if split == "train" else np.full(5, 0.2)
    np.testing.assert_allclose(share, expected, atol=0 if split == "train" else 0.03)


def test_pictures_and_labels_have_the_types_a_model_takes():
    scenes = drawn()
    assert scenes.image.shape == (SIZE, 32, 32, 3) and scenes.image.dtype == np.uint8
    assert scenes.question.shape == (SIZE, 3) and scenes.question.dtype == np.int32
    for column in (scenes.label, scenes.condition, scenes.source):
        assert column.shape == (SIZE,) and column.dtype == np.int32
    assert len(scenes) == SIZE and set(scenes.inputs) == {"image", "question"}
    assert scenes.label.min() >= 0 and scenes.label.max() < len(ANSWERS)


def test_things_are_drawn_where_they_are_and_in_their_colours():
    rng = np.random.default_rng(1)
    contents, colors = _contents(200, rng)
    image = _render(contents, colors, np.ones((200, 8, 8)), rng)
    ground = image.reshape(200, -1, 3).min(1)
    cells = (
        image.reshape(200, 2, 16, 2, 16, 3).transpose(0, 1, 3, 2, 4, 5).reshape(200, 4, 256, 3) - ground[:, None, None]
    )
    lit = cells.max(2)
    np.testing.assert_array_equal(lit.max(-1) > 0.1, contents != EMPTY)
    likeness = (
        lit
        @ PALETTE.T
        / np.linalg.norm(PALETTE, axis=1)
        / np.maximum(np.linalg.norm(lit, axis=-1, keepdims=True), 1e-9)
    )
    seen = contents != EMPTY
    assert (likeness.argmax(-1) == colors)[seen].mean() > 0.99


def test_each_condition_is_what_its_name_says():
    scenes = drawn()
    image = scenes.image / 255
    roughness = np.square(np.diff(image, axis=2)).mean((1, 2, 3))
    saturation = np.ptp(image, axis=-1).mean((1, 2))
    contrast = image.std((1, 2, 3))

    def mean(values, condition):
        return values[scenes.condition == CONDITIONS.index(condition)].mean()

    assert mean(roughness, "noise") > 3 * mean(roughness, "clean")
    assert mean(roughness, "blur") < 0.6 * mean(roughness, "clean")
    assert mean(saturation, "stripes") > 1.5 * mean(saturation, "clean")
    assert mean(saturation, "washed out") < 0.2 * mean(saturation, "clean")
    assert mean(contrast, "washed out") < 0.3 * mean(contrast, "clean")


def test_rows_are_taken_together():
    scenes = drawn()
    part = scenes.take([5, 2])
    for some, whole in zip(fields(part), fields(scenes), strict=True):
        np.testing.assert_array_equal(some, whole[[5, 2]])


def test_batches_go_through_all_once_but_for_the_rest():
    scenes = drawn("dev", 53)
    batches = list(scenes.batches(10, np.random.default_rng(0)))
    assert [len(labels) for _, labels in batches] == [10] * 5
    rows = {image.tobytes(): i for i, image in enumerate(scenes.image)}
    seen = [rows[image.tobytes()] for inputs, _ in batches for image in inputs["image"]]
    assert len(set(seen)) == 50 and seen != sorted(seen)
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), scenes.label[seen])
