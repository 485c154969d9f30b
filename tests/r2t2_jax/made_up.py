"""Reference sets, decisions and records drawn at random, of any size and without a model."""

import dataclasses

import numpy as np

from r2t2_jax.decision import REROUTED, Decisions, Neighbors
from r2t2_jax.records import Hashes, Record, records
from r2t2_jax.references import ReferenceSet
from r2t2_jax.shapes import Readout

GROUPS, EXPERTS, ANSWERS = (2, 3), ("near", "far", "red", "green", "blue"), ("one", "two", "three", "four")
HASHES = Hashes(model="m" * 64, references="r" * 64, config="c" * 64, embedder="the question's words")


def simplex(rng, *lead: int) -> np.ndarray:
    """Weights whose groups sum to 1."""
    return np.concatenate([rng.dirichlet(np.ones(size), lead) for size in GROUPS], -1).astype(np.float32)


def reference_set(count: int = 12, *, seed: int = 0, prefix: str = "r", **fields) -> ReferenceSet:
    """References with three of each source and one unit of time between two of them."""
    rng = np.random.default_rng(seed)
    embedding = rng.normal(size=(count, 4))
    made = {
        "ids": [f"{prefix}{i}" for i in range(count)],
        "sources": [f"{prefix}-image{i // 3}" for i in range(count)],
        "labels": rng.integers(0, len(ANSWERS), count),
        "correct": rng.random(count) < 0.7,
        "time": np.arange(count),
        "routing": simplex(rng, count),
        "embedding": embedding / np.linalg.norm(embedding, axis=1, keepdims=True),
        "features": rng.normal(size=(count, 3)),
        "readout": Readout(rng.normal(size=(count, 5, 4)), rng.normal(size=(count, 4))),
        "model": "m" * 64,
        "embedder": "the question's words",
        "groups": GROUPS,
        "experts": EXPERTS,
        "answers": ANSWERS,
    }
    return ReferenceSet(**made | fields)


def decisions(count: int = 6, *, seed: int = 0, **fields) -> Decisions:
    """Re-routed decisions with three neighbours each among twelve references."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    neighbors = Neighbors(
        rng.integers(0, 12, (count, 3)),
        np.sort(rng.uniform(0.1, 0.9, (count, 3)).astype(np.float32)),
        rng.dirichlet(np.ones(3), count).astype(np.float32),
    )
    made = {
        "status": np.full(count, REROUTED),
        "routing": simplex(rng, count),
        "base_routing": simplex(rng, count),
        "logits": normal(count, 4),
        "base_logits": normal(count, 4),
        "proposed": simplex(rng, count),
        "loss_before": abs(normal(count)),
        "loss_after": abs(normal(count)),
        "neighbors": neighbors,
        "neighbor_routing": simplex(rng, count, 3),
    }
    return Decisions(**made | fields)


@dataclasses.dataclass(frozen=True)
class Config:
    """Something to record."""

    radius: float = float("inf")
    steps: tuple[int, ...] = (1, 2)
    name: str | None = None


def recorded(made: Decisions | None = None, **changes) -> list[Record]:
    """Records of decisions about inputs x0, x1, ..."""
    made = decisions() if made is None else made
    count = len(made.status)
    given = {
        "input_ids": [f"x{i}" for i in range(count)],
        "input_hashes": [f"{i:064}" for i in range(count)],
        "reference_ids": [f"r{i}" for i in range(12)],
        "experts": EXPERTS,
        "answers": ANSWERS,
        "strategy": "kernel regression",
        "hashes": HASHES,
        "config": Config(),
    }
    return records(made, **given | changes)
