"""Named inputs with their source, for tests and benchmarks; nothing that runs in a model imports this file."""

import dataclasses

import numpy as np

from pallas_kernels.router_descent.contract import Inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of a call and the law its inputs are drawn from.

    Attributes:
      source: where these sizes or this kind of input come from.
      batch, neighbors, answers, steps: axes b, m, y, s.
      groups: sizes of the groups of experts; they add up to the axis e.
      learning_rate: of the first step; the rest follow a cosine down to 1e-3 of it.
      size: standard deviation of the read-outs. At 3 the routing decides answers, at 30 softmaxes saturate.
      absent: share of neighbours whose weight is 0; the first of each input is never absent.
      masked: share of answers whose offset is -inf; labels are never masked.
      off: whether the last expert starts at -inf; its group needs another.
    """

    source: str
    batch: int = 5
    neighbors: int = 3
    answers: int = 7
    steps: int = 3
    groups: tuple[int, ...] = (6,)
    learning_rate: float = 1.0
    size: float = 3.0
    absent: float = 0.0
    masked: float = 0.0
    off: bool = False


CASES = {
    "moai": Case(
        source="arXiv 2502.20395, App. C: 5 neighbours, 10 steps; MoAI has 3 experts per modality",
        neighbors=5,
        answers=21,
        steps=10,
        groups=(3, 3),
    ),
    "mova": Case(
        source="arXiv 2502.20395: MoVA has 7 experts under one gate, of which some are off", groups=(7,), off=True
    ),
    "ball": Case(
        source="eq. 9: all within a distance, so their number varies", neighbors=8, absent=0.5, groups=(1, 2, 3)
    ),
    "choices": Case(source="multiple choice: few of the answers are on offer", answers=9, masked=0.6, groups=(3, 3)),
    "confident": Case(source="logits of a trained model, where softmaxes saturate", size=30.0),
    "one_of_each": Case(
        source="nothing to choose from and nothing to learn", batch=1, neighbors=1, groups=(1,), answers=1
    ),
    "no_steps": Case(source="the loss before re-routing", steps=0, groups=(3, 3)),
}

# what the benchmark times: the paper's setting on a test set of 3000 inputs, and a generous neighbourhood
BENCHMARK = Case(
    source="the paper's five neighbours and ten steps (appendix C), six experts, a test of 3,000",
    batch=3000,
    neighbors=5,
    answers=21,
    steps=10,
)

# (neighbours, experts, answers) of one tile of the TPU kernel; 55, 8, 64 is the largest to stay on the chip
TILES = (
    (5, 6, 21),
    (20, 6, 21),
    (5, 8, 32),
    (16, 8, 32),
    (5, 8, 128),
    (32, 8, 64),
    (55, 8, 64),
    (64, 8, 128),
    (3, 7, 1000),
)


def sample(case: Case, seed: int = 0) -> Inputs:
    """Draws the inputs of a case in numpy float64; weights of one input add up to 1 before some are set to 0."""
    rng = np.random.default_rng(seed)
    b, m, y, e = case.batch, case.neighbors, case.answers, sum(case.groups)
    log_routing = rng.normal(size=(b, e))
    if case.off:
        log_routing[:, -1] = -np.inf
    labels = rng.integers(0, y, size=(b, m), dtype=np.int32)
    is_label = np.arange(y) == labels[..., None]
    masked = (rng.uniform(size=(b, m, y)) < case.masked) & ~is_label
    weights = rng.uniform(0.1, 1.0, size=(b, m))
    is_absent = (rng.uniform(size=(b, m)) < case.absent) & (np.arange(m) > 0)
    weights = np.where(is_absent, 0, weights / weights.sum(1, keepdims=True))
    decline = np.cos(np.pi * np.arange(case.steps) / max(case.steps, 1))
    return Inputs(
        log_routing=log_routing,
        readout=case.size * rng.normal(size=(b, m, e, y)),
        offset=np.where(masked, -np.inf, rng.normal(size=(b, m, y))),
        labels=labels,
        weights=weights,
        learning_rates=case.learning_rate * (1e-3 + (1 - 1e-3) * (1 + decline) / 2),
    )
