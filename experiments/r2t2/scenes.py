"""Rendered scenes with one real handwritten digit each, questions about them, and five conditions they are seen under.

A scene has four cells: one holds a digit (of scikit-learn's handwritten digits), the others a shape or nothing, all in
different colours. What is trained on is clean; references and tests are drawn evenly from the five CONDITIONS, so that
a router that never saw them has something to learn. Handwriting is split by image (POOLS): training and references
share theirs, development and test have their own.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from sklearn.datasets import load_digits

from r2t2_jax.models.scenes import COLORS, NO_COLOR, NO_SHAPE, SHAPES, TEMPLATES

CELL = 16
CONDITIONS = ("clean", "noise", "stripes", "blur", "washed out")
PALETTE = np.array([[0.9, 0.15, 0.15], [0.15, 0.8, 0.2], [0.2, 0.35, 0.95], [0.9, 0.85, 0.15], [0.8, 0.2, 0.85]])
EMPTY, DIGIT = -1, len(SHAPES)  # beside the numbers of shapes, what a cell can hold
POOLS = {"train": (0, 1100), "reference": (0, 1100), "dev": (1100, 1350), "test": (1350, 1797)}
SPLITS = ("train", "reference", "dev", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenes:
    """Examples, one row each.

    Attributes:
      image: [n, 32, 32, 3] uint8.
      question: [n, 3] int32: template, shape asked about (or NO_SHAPE), colour asked about (or NO_COLOR).
      label: [n] int32, an index of models.scenes.ANSWERS.
      condition: [n] int32, an index of CONDITIONS.
      source: [n] int32, which handwritten digit is in the picture.
    """

    image: np.ndarray
    question: np.ndarray
    label: np.ndarray
    condition: np.ndarray
    source: np.ndarray

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """What a model sees."""
        return {"image": self.image, "question": self.question}

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows) -> "Scenes":
        """Returns some of the rows."""
        return Scenes(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})

    def batches(self, size: int, rng: np.random.Generator) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        """Yields (inputs, labels) in random order, without the rest that fills no batch."""
        order = rng.permutation(len(self))
        for rows in order[: len(self) // size * size].reshape(-1, size):
            yield {name: x[rows] for name, x in self.inputs.items()}, self.label[rows]


def make(split: str, size: int, seed: int) -> Scenes:
    """Draws scenes, questions and conditions; the same arguments give the same bits."""
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    images, digits = _handwriting()
    source = _shuffled_handwriting()[slice(*POOLS[split])]
    source = rng.choice(source, size)
    contents, colors = _contents(size, rng)
    question, label = _ask(contents, colors, digits[source], rng)
    condition = rng.integers(len(CONDITIONS), size=size) if split != "train" else np.zeros(size, int)
    image = _render(contents, colors, images[source], rng)
    image = np.clip(_seen_under(image, condition, rng), 0, 1)
    return Scenes(
        image=np.round(255 * image).astype(np.uint8),
        question=question.astype(np.int32),
        label=label.astype(np.int32),
        condition=condition.astype(np.int32),
        source=source.astype(np.int32),
    )


def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    """Returns [1797, 8, 8] pictures between 0 and 1 and what they show."""
    pixels, digits = load_digits(return_X_y=True)
    return np.asarray(pixels).reshape(-1, 8, 8) / 16, np.asarray(digits)


def _shuffled_handwriting() -> np.ndarray:
    """The same order for every seed and split: the file is sorted by writer."""
    return np.random.default_rng(0).permutation(1797)


def _contents(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns what each of the four cells holds, and in which colour; every colour stands at most once."""
    contents = rng.integers(len(SHAPES), size=(size, 4))
    contents[rng.random((size, 4)) < 0.2] = EMPTY
    contents[np.arange(size), rng.integers(4, size=size)] = DIGIT
    colors = rng.permuted(np.tile(np.arange(len(COLORS)), (size, 1)), axis=1)[:, :4]
    return contents, colors


# --- questions ---


def _ask(contents, colors, digit, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns a question [n, 3] for each scene, of a template drawn evenly among those it allows, and its answer."""
    question, label = np.empty((len(contents), 3), int), np.empty(len(contents), int)
    for row, (cells, tints) in enumerate(zip(contents, colors, strict=True)):
        for template in rng.permutation(len(TEMPLATES)):
            asked = _question(TEMPLATES[template], cells, tints, digit[row], rng)
            if asked is not None:
                question[row], label[row] = (template, *asked[:2]), asked[2]
                break
    return question, label


def _question(template: str, cells, tints, digit: int, rng) -> tuple[int, int, int] | None:
    """Returns (shape asked about, colour asked about, answer), or None where the scene does not allow the question."""
    first_color, first_shape, yes, no = 10, 10 + len(COLORS), 19, 20
    place = int(np.flatnonzero(cells == DIGIT)[0])
    shaped = np.flatnonzero((cells != DIGIT) & (cells != EMPTY))
    if template == "read digit":
        return NO_SHAPE, NO_COLOR, digit
    if template == "color of digit":
        return NO_SHAPE, NO_COLOR, first_color + tints[place]
    if template == "color of shape":
        once = [cell for cell in shaped if (cells == cells[cell]).sum() == 1]
        if not once:
            return None
        cell = rng.choice(once)
        return cells[cell], NO_COLOR, first_color + tints[cell]
    if template == "shape of color":
        if not shaped.size:
            return None
        cell = rng.choice(shaped)
        return NO_SHAPE, tints[cell], first_shape + cells[cell]
    if template == "count shape":
        shape = rng.integers(len(SHAPES))
        return shape, NO_COLOR, (cells == shape).sum()
    if template == "is color present":
        present = tints[cells != EMPTY]
        absent = np.setdiff1d(np.arange(len(COLORS)), present)
        truth = bool(rng.integers(2))
        return NO_SHAPE, rng.choice(present if truth else absent), yes if truth else no
    beside = [cell for cell in shaped if cell % 2 != place % 2]
    if not beside:
        return None
    cell = rng.choice(beside)
    return NO_SHAPE, tints[cell], yes if place % 2 < cell % 2 else no


# --- pictures ---


def _render(contents, colors, digits, rng: np.random.Generator) -> np.ndarray:
    """Returns [n, 32, 32, 3] between 0 and 1: coloured things on a dark ground."""
    size = len(contents)
    masks = _shape_masks()
    variants = rng.integers(masks.shape[1], size=(size, 4))
    drawn = masks[np.maximum(contents % DIGIT, 0), variants] * (contents != EMPTY)[..., None, None]
    rows, cells = np.nonzero(contents == DIGIT)
    drawn[rows, cells] = _enlarge(digits, rng)
    ground = rng.uniform(0.0, 0.15, size=(size, 1, 1, 1, 1))
    tint = PALETTE[colors] * rng.uniform(0.8, 1.0, size=(size, 4, 1))
    pixels = ground + drawn[..., None] * (tint[:, :, None, None] - ground)
    pixels = pixels.reshape(size, 2, 2, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    return pixels.reshape(size, 2 * CELL, 2 * CELL, 3)


def _shape_masks() -> np.ndarray:
    """Returns [shape, variant, 16, 16]: three sizes at nine places each."""
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    variants = [(x - right, y - down, radius) for right in (-2, 0, 2) for down in (-2, 0, 2) for radius in (4, 5, 6)]
    draw = {
        "circle": lambda x, y, r: x**2 + y**2 <= r**2,
        "square": lambda x, y, r: np.maximum(abs(x), abs(y)) <= r * 0.85,
        "triangle": lambda x, y, r: (y <= r * 0.8) & (2 * abs(x) <= y + r),
        "cross": lambda x, y, r: (np.minimum(abs(x), abs(y)) <= r * 0.3) & (np.maximum(abs(x), abs(y)) <= r),
    }
    return np.array([[draw[shape](*variant) for variant in variants] for shape in SHAPES], float)


def _enlarge(digits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns 8 by 8 digits at 12 by 12, bilinear, at one of nine places of a 16 by 16 cell each."""
    at = np.linspace(0, 7, 12)
    low = np.minimum(at.astype(int), 6)
    weight = np.zeros((12, 8))
    weight[np.arange(12), low], weight[np.arange(12), low + 1] = 1 - (at - low), at - low
    large = np.einsum("ia,nab,jb->nij", weight, digits, weight)
    cell = np.zeros((len(digits), CELL, CELL))
    place = rng.integers(1, 4, size=(len(digits), 2))
    for row, (top, left) in enumerate(place):
        cell[row, top : top + 12, left : left + 12] = large[row]
    return cell


def _seen_under(image: np.ndarray, condition: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the pictures as each condition shows them."""
    out = image.copy()
    noisy, striped, blurred, washed = (np.flatnonzero(condition == i) for i in range(1, 5))
    out[noisy] += rng.normal(0, 0.28, size=out[noisy].shape)
    out[striped] = _stripes(out[striped], rng)
    for _ in range(4):
        out[blurred] = _blur(out[blurred])
    grey = out[washed].mean(-1, keepdims=True)
    out[washed] = 0.4 + 0.2 * (grey + 0.3 * (out[washed] - grey))
    return out


def _stripes(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds waves of color, of random direction and phase."""
    size = len(image)
    y, x = np.mgrid[: 2 * CELL, : 2 * CELL]
    angle, phase = rng.uniform(0, np.pi, (size, 1, 1)), rng.uniform(0, 2 * np.pi, (size, 1, 1))
    wave = np.sin(2 * np.pi / 6 * (np.cos(angle) * x + np.sin(angle) * y) + phase)
    tint = rng.normal(size=(size, 1, 1, 3))
    tint -= tint.mean(-1, keepdims=True)  # no brighter and no darker: experts that see no color see no stripes
    return image + 0.45 * wave[..., None] * tint / np.abs(tint).max(-1, keepdims=True)


def _blur(image: np.ndarray) -> np.ndarray:
    """Averages with the neighbouring pixels, weights 1 2 1."""
    for axis in (1, 2):
        padded = np.pad(image, [(0, 0)] + [(1, 1) if a == axis else (0, 0) for a in (1, 2)] + [(0, 0)], mode="edge")
        before, after = (np.take(padded, np.arange(k, k + 2 * CELL), axis) for k in (0, 2))
        image = (before + 2 * image + after) / 4
    return image
