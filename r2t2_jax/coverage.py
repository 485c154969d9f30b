"""Which of many points stand for the others: near-duplicates and farthest points, block by block.

Points are rows of arrays scaled so that unrelated ones are sqrt(2) apart; their similarity is 1 - distance^2 / 2, which
is the cosine where they are unit vectors.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

BLOCK = 512  # rows compared with all others at a time, so that 50,000 points need 100 MB and not 10 GB


def standardise(features: Float[np.ndarray, "r f"]) -> Float[np.ndarray, "r f"]:
    """Returns features as points: every one that varies counts alike, and two rows are sqrt(2) apart on average."""
    centred = features - features.mean(0, dtype=np.float64)
    spread = centred.std(0)
    varies = spread > 1e-6 * np.abs(features).max(0, initial=0)  # less than that is the rounding of a constant
    scaled = np.divide(centred, spread, out=np.zeros_like(centred), where=varies)
    return (scaled / np.sqrt(max(varies.sum(), 1))).astype(np.float32)


def first_of_each(
    spaces: Sequence[Float[np.ndarray, "r d"]], labels: Int[np.ndarray, "r"], similarity: float
) -> Bool[np.ndarray, "r"]:
    """Returns which rows have no near-duplicate among the rows kept before them.

    Near-duplicates have the same label and are more similar than `similarity` in every one of the spaces.
    """
    keep = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows, kept = np.flatnonzero(labels == label), np.empty(0, int)
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            fresh = block[~_alike(spaces, block, kept, similarity).any(1)]
            kept = np.concatenate([kept, fresh[_first_in_block(_alike(spaces, fresh, fresh, similarity))]])
        keep[kept] = True
    return keep


def _first_in_block(alike: Bool[np.ndarray, "n n"]) -> Bool[np.ndarray, "n"]:
    keep = np.ones(len(alike), bool)
    for i, row in enumerate(alike):
        if keep[i]:
            keep[i + 1 :] &= ~row[i + 1 :]
    return keep


def _alike(spaces, rows, others, similarity) -> Bool[np.ndarray, "n k"]:
    alike = np.ones((len(rows), len(others)), bool)
    for points in spaces:
        alike &= _squared_distance(points[rows], points[others]) < 2 * (1 - similarity)
    return alike


def farthest_first(points: Float[np.ndarray, "r d"], size: int) -> Int[np.ndarray, "size"]:
    """Returns `size` rows: the one nearest to the mean, then always the row farthest from all chosen before.

    No point is farther from the chosen ones than twice what the best choice of as many could do (Gonzalez 1985). Equal
    distances go to the lower row, so the same points give the same choice. Distances only shrink while rows are chosen:
    those of the last update bound them from above, and a row that beats every bound is the next one whatever the
    others' distances have become. So one matrix product serves many choices.
    """
    centre = points.mean(0, keepdims=True, dtype=np.float64).astype(np.float32)
    chosen = [np.argmin(_squared_distance(points, centre), axis=0)]
    distance = np.full(len(points), np.inf, np.float32)  # squared, to the nearest chosen row
    while sum(map(len, chosen)) < size:
        for start in range(0, len(points), 64 * BLOCK):
            part = slice(start, start + 64 * BLOCK)
            np.minimum(distance[part], _squared_distance(points[part], points[chosen[-1]]).min(1), out=distance[part])
        distance[chosen[-1]] = -1  # chosen rows are out, below the duplicates of them at 0
        chosen.append(_certain_choices(points, distance))
    return np.concatenate(chosen)[:size]


def _certain_choices(points, bounds) -> Int[np.ndarray, "n"]:
    """Returns the next choices that follow from the bounds without looking at rows outside the most promising."""
    order = np.argsort(-bounds, kind="stable")  # best first, lower row first among equals
    rows, rest = np.sort(order[:BLOCK]), order[BLOCK : BLOCK + 1]
    distance, between = bounds[rows], _squared_distance(points[rows], points[rows])
    rival = (bounds[rest[0]], -rest[0]) if len(rest) else (-1, 0)
    choices = []
    while len(choices) < len(rows):
        best = int(distance.argmax())
        if (distance[best], -rows[best]) <= rival:
            break
        choices.append(best)
        distance = np.minimum(distance, between[best])
        distance[best] = -1
    return rows[choices]


def _squared_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "k d"]) -> Float[np.ndarray, "n k"]:
    square = (-2 * a) @ b.T
    square += np.einsum("nd,nd->n", a, a)[:, None]
    square += np.einsum("kd,kd->k", b, b)
    return np.maximum(square, 0, out=square)
