"""Named inputs with their source, for tests and benchmarks; nothing that runs in a model imports this file."""

import dataclasses
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of a call and the law its inputs are drawn from.

    Attributes:
      source: where these sizes or this kind of input come from.
      batch, length, num_heads, key_dim, value_dim: axes b, t, h, k, v.
      decay: gates are uniform between these two.
      reset: share of gates that are exactly 0, log_decay = -inf.
      beta: input strengths are uniform between these two.
      ridge: Lambda is uniform between these two.
      keys: "iid" unit vectors, "low_rank" (16 directions through SiLU, as trained heads show) or "repeated" (one key
        and one query for all tokens).
    """

    source: str
    batch: int = 1
    length: int = 130
    num_heads: int = 2
    key_dim: int = 16
    value_dim: int = 16
    decay: tuple[float, float] = (0.8, 1.0)
    reset: float = 0.0
    beta: tuple[float, float] = (0.05, 1.0)
    ridge: tuple[float, float] = (0.25, 1.25)
    keys: str = "iid"


CASES = {
    "one_token": Case(source="decoding; the closed form at T = 1", batch=2, length=1, key_dim=60, value_dim=60),
    "below_a_chunk": Case(source="design.md, section 2", length=63, key_dim=60, value_dim=36),
    "odd_length": Case(source="design.md, section 2", batch=2, length=500, value_dim=24, decay=(0.95, 1.0)),
    "paper_head": Case(source="every model of arXiv 2506.05233, G.4", length=70, key_dim=128, value_dim=128),
    "keeps_all": Case(source="gates at exactly 1: the ill-conditioned heads of App. O", decay=(1.0, 1.0)),
    "forgets_fast": Case(source="design.md, section 2", decay=(0.01, 0.01)),
    "all_gates": Case(source="strong and weak gates side by side, where cumulative sums cancel", decay=(0.01, 1.0)),
    "resets": Case(source="log_decay = -inf: hard resets inside a document", reset=0.1, decay=(0.97, 1.0)),
    "no_input": Case(source="beta = 0: nothing is written, the ridge alone is solved", beta=(0.0, 0.0)),
    "screaming": Case(
        source="arXiv 2506.05233, G.5: runs of one token; gamma at its bound 0.9975 for beta = 1",
        length=500,
        decay=(0.9975, 0.9975),
        beta=(1.0, 1.0),
        ridge=(0.25, 0.25),
        keys="repeated",
    ),
    "low_rank": Case(
        source="mesa_solver.md: rank-16 keys at gamma 1, where 30 plain steps do not converge",
        length=200,
        key_dim=32,
        value_dim=20,
        decay=(1.0, 1.0),
        ridge=(0.25, 0.25),
        keys="low_rank",
    ),
}

_BENCHMARK = Case(source="issue 2: T 2048, 4 heads, dim 64 and 128", length=2048, num_heads=4, key_dim=64, value_dim=64)
EASY = dataclasses.replace(_BENCHMARK, decay=(0.8, 0.99), ridge=(0.9, 1.1))
HARD = dataclasses.replace(_BENCHMARK, decay=(1.0, 1.0), ridge=(0.25, 0.25), keys="low_rank")


class Inputs(NamedTuple):
    """Arguments of `mesa_chunk` in their order, with the initial state as two arrays; numpy float64."""

    q: np.ndarray  # [b, t, h, k]
    k: np.ndarray  # [b, t, h, k]
    v: np.ndarray  # [b, t, h, v]
    log_decay: np.ndarray  # [b, t, h]
    beta: np.ndarray  # [b, t, h]
    ridge: np.ndarray  # [h, k]
    kk: np.ndarray  # [b, h, k, k]
    kv: np.ndarray  # [b, h, k, v]


def sample(case: Case, seed: int = 0) -> Inputs:
    """Draws the inputs of a case; the initial state is what a few earlier tokens could have left."""
    rng = np.random.default_rng(seed)
    tokens = (case.batch, case.length, case.num_heads)
    earlier = _unit(rng.normal(size=(case.batch, 4, case.num_heads, case.key_dim)))
    with np.errstate(divide="ignore"):  # log 0 = -inf is meant
        log_decay = np.log(np.where(rng.uniform(size=tokens) < case.reset, 0.0, rng.uniform(*case.decay, size=tokens)))
    return Inputs(
        q=_directions(rng, case, _unit),
        k=_directions(rng, case, _unit if case.keys == "iid" else _unit_silu),
        v=rng.normal(size=(*tokens, case.value_dim)),
        log_decay=log_decay,
        beta=rng.uniform(*case.beta, size=tokens),
        ridge=rng.uniform(*case.ridge, size=(case.num_heads, case.key_dim)),
        kk=np.einsum("bthi,bthj->bhij", earlier, earlier),
        kv=np.einsum("bthi,bthj->bhij", earlier, rng.normal(size=(case.batch, 4, case.num_heads, case.value_dim))),
    )


def _directions(rng: np.random.Generator, case: Case, finish) -> np.ndarray:
    """Queries or keys [b, t, h, k] of unit length."""
    lead = (case.batch, 1 if case.keys == "repeated" else case.length, case.num_heads)
    x = rng.normal(size=(*lead, case.key_dim))
    if case.keys == "low_rank":
        x = rng.normal(size=(*lead, 16)) @ rng.normal(size=(16, case.key_dim)) + 0.05 * x
    return np.ascontiguousarray(np.broadcast_to(finish(x), (case.batch, case.length, case.num_heads, case.key_dim)))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _unit_silu(x: np.ndarray) -> np.ndarray:
    return _unit(x / (1 + np.exp(-x)))
