"""Exact nearest neighbours against the matrix product that they cannot do without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.clock import ratio, take_turns
from experiments.cli import UserError
from r2t2_jax.neighbors import nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchRow:
    """How many times the product's time a search takes, by the best round, and the quartiles."""

    references: int
    width: int
    queries: int
    k: int
    ratio: float
    quartiles: tuple[float, float]


def compare(width: int, rounds: int, *, references: int = 45_000, queries: int = 256, k: int = 20) -> SearchRow:
    """Times both in turns, after comparing the search with a full sort in numpy.

    Args:
      width: of the embedding; 384 is a small sentence embedder, 4,096 the paper's.
      rounds: turns that both take.
      references: by default all of the paper's.
      queries: a batch of inputs.
      k: neighbours.

    Raises:
      UserError: the search is wrong.
    """
    rng = np.random.default_rng(0)
    known, asked = (rng.normal(size=(n, width)).astype(np.float32) for n in (references, queries))
    known, asked = (jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in (known, asked))
    search = jax.jit(nearest, static_argnums=2)
    product = jax.jit(lambda a, b: jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST))
    cosine = np.asarray(product(asked[:8], known))
    if not np.array_equal(np.asarray(search(asked, known, k)[0])[:8], np.argsort(-cosine, kind="stable")[:, :k]):
        raise UserError("bench: nearest does not find what a full sort finds; no time is worth printing.")
    times = take_turns(
        {
            "search": lambda: jax.block_until_ready(search(asked, known, k)),
            "product": lambda: jax.block_until_ready(product(asked, known)),
        },
        rounds,
    )
    best, low, high = ratio(times["search"], times["product"])
    return SearchRow(references=references, width=width, queries=queries, k=k, ratio=best, quartiles=(low, high))


def lines(rows: list[SearchRow]) -> list[str]:
    """One sentence per width."""
    return [
        f"{row.k} nearest of {row.references:,} in {row.width} dimensions, {row.queries} queries: {row.ratio:.2f} "
        f"times the matrix product alone (quartiles {row.quartiles[0]:.2f}-{row.quartiles[1]:.2f})."
        for row in rows
    ]
