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
      gate_bound: gates are multiplied by 1 - (1 - gate_bound) beta^2, so that full input strength forgets at least that
        much (arXiv 2506.05233, G.5).
      reset: share of gates that are exactly 0, log_decay = -inf.
      beta: input strengths are uniform between these two.
      ridge: Lambda is uniform between these two.
      keys: "iid" unit vectors, "low_rank" (16 directions through SiLU, as trained heads show), "repeated" (one key for
        all tokens), "silu" (normal of mean 0.3 through SiLU) or "bursts" (48 of every 96 tokens repeat one key).
      queries: the same for queries; None draws them as the keys, without SiLU.
    """

    source: str
    batch: int = 1
    length: int = 130
    num_heads: int = 2
    key_dim: int = 16
    value_dim: int = 16
    decay: tuple[float, float] = (0.8, 1.0)
    gate_bound: float = 1.0
    reset: float = 0.0
    beta: tuple[float, float] = (0.05, 1.0)
    ridge: tuple[float, float] = (0.25, 1.25)
    keys: str = "iid"
    queries: str | None = None


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

# How hard the systems are to solve, from an empty state: keys by what is remembered of them, from easy to hard.
_STUDY = Case(
    source="mesa_solver.md: kinds of keys by ranges of gates",
    length=1024,
    num_heads=1,
    key_dim=128,
    value_dim=128,
    gate_bound=0.9975,
    beta=(0.13, 0.87),  # mean and spread of the sigmoid of a standard normal
    queries="silu",
)
_MEMORIES = {  # gates and ridge
    "0.8-0.99": ((0.8, 0.99), (1.0, 3.0)),
    "0.95": ((0.95, 0.95), (1.0, 3.0)),
    "0.95-1": ((0.95, 1.0), (0.25, 0.75)),
    "0.99-1": ((0.99, 1.0), (0.25, 0.75)),
    "1": ((1.0, 1.0), (0.25, 0.75)),
}
STUDY = {
    f"{keys}, {memory}": dataclasses.replace(_STUDY, keys=keys, decay=decay, ridge=ridge)
    for keys in ("silu", "low_rank", "repeated", "bursts")
    for memory, (decay, ridge) in _MEMORIES.items()
} | {
    "silu, 0.01": dataclasses.replace(
        _STUDY, source="design.md, section 2: gates of 0.01", keys="silu", decay=(0.01, 0.01), ridge=(0.25, 0.75)
    ),
    "no input": dataclasses.replace(_STUDY, source="beta = 0", keys="silu", beta=(0.0, 0.0), ridge=(0.25, 0.75)),
    "one token": dataclasses.replace(_STUDY, source="decoding", keys="silu", length=1, ridge=(0.25, 0.75)),
}


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
    inputs = Inputs(
        q=_directions(rng, case, case.queries or case.keys, _unit if case.queries in (None, "iid") else _unit_silu),
        k=_directions(rng, case, case.keys, _unit if case.keys == "iid" else _unit_silu),
        v=rng.normal(size=(*tokens, case.value_dim)),
        log_decay=log_decay,
        beta=rng.uniform(*case.beta, size=tokens),
        ridge=rng.uniform(*case.ridge, size=(case.num_heads, case.key_dim)),
        kk=np.einsum("bthi,bthj->bhij", earlier, earlier),
        kv=np.einsum("bthi,bthj->bhij", earlier, rng.normal(size=(case.batch, 4, case.num_heads, case.value_dim))),
    )
    return inputs._replace(log_decay=log_decay + np.log1p(-(1 - case.gate_bound) * inputs.beta**2))


def _directions(rng: np.random.Generator, case: Case, kind: str, finish) -> np.ndarray:
    """Queries or keys [b, t, h, k] of unit length."""
    lead = (case.batch, 1 if kind == "repeated" else case.length, case.num_heads)
    x = rng.normal(size=(*lead, case.key_dim))
    if kind == "low_rank":
        x = rng.normal(size=(*lead, 16)) @ rng.normal(size=(16, case.key_dim)) + 0.05 * x
    elif kind == "silu":
        x = x + 0.3
    elif kind == "bursts":
        tokens = np.arange(case.length)
        x = x[:, np.where(tokens % 96 < 48, tokens - tokens % 96, tokens)]
    return np.ascontiguousarray(np.broadcast_to(finish(x), (case.batch, case.length, case.num_heads, case.key_dim)))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _unit_silu(x: np.ndarray) -> np.ndarray:
    return _unit(x / (1 + np.exp(-x)))


class Adversary(NamedTuple):
    """Heads that each mean harm in their own way, every one a sequence of its own; numpy, [h, ...]."""

    inputs: Inputs  # batch of 1 and one head each: [h, 1, t, 1, k] and so on
    segment_ids: np.ndarray  # [h, 1, t]
    dout: np.ndarray  # [h, 1, t, 1, v]


def adversary(num_heads: int, length: int, dim: int, seed: int = 0) -> Adversary:
    """Draws heads at the edges of what may be asked, combined at random; all exact answers fit into float32.

    Ridges from 1e-6 to 1e6, the same or not on all channels; input strengths of 0 and 1e4; keys that are all the same,
    zero, tiny or large; queries of zero; gates of 0, 1 and between; values of 1e20 under cotangents of 1e-20.
    """
    rng = np.random.default_rng(seed)
    tokens = (num_heads, length)

    def pick(*choices) -> np.ndarray:
        """One of the choices per head, each broadcast to the shape of the first."""
        which = rng.integers(len(choices), size=(num_heads, *[1] * (choices[0].ndim - 1)))
        return np.choose(which, np.broadcast_arrays(*choices))

    def some_zero(x: np.ndarray) -> np.ndarray:
        return x * (rng.uniform(size=tokens) < 0.7)[..., None]

    def scaled(x: np.ndarray, *scales: float) -> np.ndarray:
        return x * rng.choice(scales, size=(num_heads, 1, 1))

    keys, queries, values = (rng.normal(size=(*tokens, dim)) for _ in range(3))
    keys, queries = _unit(keys), _unit(queries)
    per_channel, per_head = (10 ** rng.uniform(-6, 6, size=(num_heads, n)) for n in (dim, 1))
    strengths, gates = rng.uniform(size=(2, *tokens))
    with np.errstate(divide="ignore"):
        log_decay = np.log(pick(gates, 1.0 * (gates < 0.8), 0 * gates, 1 + 0 * gates, 0.99 + 0.01 * gates))
    rows = scaled(_unit(rng.normal(size=(num_heads, 4, dim))), 0.0, 1.0, 1e3)
    value_scale = rng.choice([1.0, 1e20, 1e-20, 0.0], size=(num_heads, 1, 1))
    documents = np.cumsum(rng.uniform(size=tokens) < 0.1, axis=1) * rng.integers(2, size=(num_heads, 1))
    k = scaled(pick(keys, keys[:, :1], some_zero(keys), 0 * keys, np.repeat(keys[:, ::8], 8, 1)), 1.0, 1e-20, 1e3)
    inputs = Inputs(
        q=scaled(pick(queries, some_zero(queries), 0 * queries, keys), 1.0, 1e-20)[:, None, :, None],
        k=k[:, None, :, None],
        v=(values * value_scale)[:, None, :, None],
        log_decay=log_decay[:, None, :, None],
        beta=pick(strengths, 0 * strengths, 1e4 + 0 * strengths, 1e4 * (strengths < 0.3))[:, None, :, None],
        ridge=pick(per_channel, per_head, np.full_like(per_head, 1e-6), np.full_like(per_head, 1e6))[:, None],
        kk=np.einsum("hsi,hsj->hij", rows, rows)[:, None, None],
        kv=np.einsum("hsi,hsj->hij", rows, values[:, :4] * value_scale)[:, None, None],
    )
    small = np.where(value_scale == 1e20, 1e-20, rng.choice([1.0, 1e-20], size=(num_heads, 1, 1)))
    return Adversary(inputs, documents[:, None], (small * rng.normal(size=(*tokens, dim)))[:, None, :, None])
