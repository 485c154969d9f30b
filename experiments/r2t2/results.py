"""What an evaluation measures, as data: the report draws it, the CSV files repeat it."""

import dataclasses
from typing import NamedTuple

import numpy as np

from r2t2_jax.evaluate import Paired


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One way to answer, on the test of every seed.

    Attributes:
      section: "strategies", "same labels" (baselines that use the references' labels otherwise) or "oracles".
      name: short.
      note: what it is, half a sentence.
      seeds: one Paired per seed.
      rerouted: share of inputs whose routing was changed, mean over seeds.
      forecast: expected gain from leaving each reference out once, mean over seeds; None where there is none.
    """

    section: str
    name: str
    note: str
    seeds: tuple[Paired, ...]
    rerouted: float
    forecast: float | None = None


class Point(NamedTuple):
    """One setting of an ablation, on the development set."""

    label: str
    gain: float
    low: float
    high: float
    fixed: float
    broken: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablation:
    """What one choice changes, all others as in the strategy it belongs to."""

    title: str
    note: str
    points: tuple[Point, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """Accuracy on the test after each gradient step, pooled over seeds."""

    name: str
    accuracy: np.ndarray  # [s + 1]
    fixed: np.ndarray
    broken: np.ndarray


class NeighborCase(NamedTuple):
    """A neighbour as a case page shows it."""

    image: np.ndarray | None  # [32, 32, 3] uint8; None where nothing private is stored
    question: str
    answer: str
    similarity: float
    weight: float
    routing: np.ndarray  # [e]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One decision to look at."""

    id: str
    kind: str  # "fixed", "broken", "kept" or "abstained"
    image: np.ndarray  # [32, 32, 3] uint8
    condition: str
    question: str
    truth: str
    before: str
    after: str
    base_routing: np.ndarray  # [e]
    routing: np.ndarray  # [e]
    neighbors: tuple[NeighborCase, ...]
    sentence: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """A whole evaluation.

    Attributes:
      rows: every way to answer; the first is the strategy that was chosen on the development set.
      experts: names, for the routing bars and the matrices.
      transitions: {"fixed": [e, e], "broken": [e, e]} counts of the expert with most weight, before (row) and after.
      steps: curves of the strategies that take steps.
      ablations: on the development set.
      by_condition: (condition, template, accuracy before, accuracy after, count) of the chosen strategy.
      latency: (what, milliseconds per input, share of all) of its parts.
      cases: decisions to look at.
      choices: (what was tuned, candidates, chosen) on the development set.
    """

    rows: tuple[Row, ...]
    experts: tuple[str, ...]
    transitions: dict[str, np.ndarray]
    steps: tuple[Steps, ...]
    ablations: tuple[Ablation, ...]
    by_condition: tuple[tuple[str, str, float, float, int], ...]
    latency: tuple[tuple[str, float, float], ...]
    cases: tuple[Case, ...]
    choices: tuple[tuple[str, str, str], ...]
