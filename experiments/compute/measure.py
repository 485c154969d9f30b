"""Loss, recall, arithmetic and time of a run under each setting of its solver, and of runs that do not solve.

All settings read the same documents with the same weights, so what differs is what the solver does.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.clock import Timing, take_turns
from experiments.cli import UserError
from experiments.curves import solver
from experiments.curves.bands import (
    Grid,
    log_edges,
)
from experiments.curves.material import Progress, stretched
from experiments.curves.scores import Scores, score, whole_window
from experiments.data import Document
from experiments.mesh import compiler_options
from experiments.runs import Run
from mesanet_jax import MesaNet, MesaNetConfig
from mesanet_jax.explain import systems
from mesanet_jax.flops import forward_flops

OWN, BASELINE = "own setting", "run"  # ways to limit the steps
LIMITS = ("step budget", "tolerance")
UNIT = "nats per token"


class Texts(NamedTuple):
    """What is read: documents, and passages of them twice in a row."""

    documents: list[Document]
    length: int
    twice: list[Document]
    passage: int  # tokens of a passage


class Effort(NamedTuple):
    """A run under one setting."""

    way: str  # OWN, one of LIMITS, or BASELINE
    label: str
    config: MesaNetConfig
    scores: Scores
    twice: Scores  # of the passages
    trace: solver.Trace | None  # of the solver, if there is one
    flops: float  # multiply-adds per token, counted twice
    timing: Timing  # of one batch

    @property
    def steps(self) -> float:
        """Solver steps per token, head and mesa layer."""
        return self.trace.mean_steps() if self.trace else 0.0

    @property
    def name(self) -> str:
        """Way and label together."""
        return self.label if self.way in (OWN, BASELINE) else f"{self.way} {self.label}"


class Heads(NamedTuple):
    """What the systems of each head are like; layers are the mesa layers from the bottom up."""

    half_life: np.ndarray  # [l, h] tokens after which half of what was held is forgotten
    places: np.ndarray  # [p] tokens read
    condition: np.ndarray  # [l, h, p] condition number, the median over documents


def texts(run: Run, documents: Sequence[Document], length: int) -> Texts:
    """Returns the documents, and their first passages twice: half a trained length each, so that both are in range."""
    passage = min(run.config.data.length // 2, max(len(document.tokens) for document in documents) - 1)
    twice = [_twice(document, passage) for document in documents if len(document.tokens) > passage]
    return Texts(list(documents), length, twice, passage)


def efforts(
    runs: dict[str, Run],
    read: Texts,
    *,
    step_budgets: Sequence[int],
    tolerances: Sequence[float],
    batch_size: int,
    rounds: int,
    progress: Progress,
) -> list[Effort]:
    """Measures the first run under its own setting and all others, and the other runs as they are.

    Args:
      runs: by name; the first has mesa layers.
      read: what they read.
      step_budgets: steps that are spent on every token.
      tolerances: relative residuals to stop at, within the run's own budget.
      batch_size: documents that are read at once.
      rounds: how often a batch is timed; all take turns.
      progress: says how far it is.

    Raises:
      UserError: a run predicts what is not a number.
    """
    (name, run), *others = runs.items()
    own = stretched(run, read.length)
    shapes = [(OWN, OWN, own, run)]
    shapes += [
        (way, label, dataclasses.replace(own, solver=config), run)
        for way, label, config in solver.settings(own.solver, step_budgets, tolerances)
    ]
    shapes += [(BASELINE, name, stretched(other, read.length), other) for name, other in others]
    batch = _batch(read, batch_size)
    calls = {i: _call(config, run.params, batch) for i, (_, _, config, run) in enumerate(shapes)}
    print(f"times {len(calls)} settings, which are compiled first", flush=True)
    timings = take_turns(calls, rounds)
    found = []
    for i, (way, label, config, run) in enumerate(shapes):
        watch = progress.watch(f"{name}, {way} {label}" if run is runs[name] else label)
        sizes = {"batch_size": batch_size, "watch": watch}
        try:
            scores, trace = _measure(config, run.params, read.documents, read.length, **sizes)
            twice, _ = _measure(config, run.params, read.twice, max(read.length, 2 * read.passage), **sizes)
        except ValueError as error:
            raise UserError(f"runs: {run.name} cannot be scored, {error}.") from None
        flops = _flops(config, scores, trace.mean_steps() if trace else None)
        found.append(Effort(way, label, config, scores, twice, trace, flops, timings[i]))
    return found


def heads(run: Run, read: Texts, most: int = 8) -> Heads:
    """Returns how long each head remembers, and how its systems grow harder along the longest documents."""
    longest = sorted(read.documents, key=lambda document: -len(document.tokens))[:most]
    longest = [document for document in longest if 2 * len(document.tokens) >= len(longest[0].tokens)]
    span = min(read.length, min(len(document.tokens) for document in longest))
    places = np.unique(np.append(2 ** np.arange(int(np.log2(span)) + 1), span))
    tokens = jnp.asarray(np.stack([document.tokens[:span] for document in longest]), jnp.int32)
    model = MesaNet(stretched(run, read.length))
    found = jax.jit(lambda params, x: systems(model, params, x, places - 1))(run.params, tokens)
    forgets = -np.asarray(found.log_decay, np.float64).mean(axis=(1, 2))  # [l, h]
    condition = np.moveaxis(np.median(np.asarray(found.condition), axis=1), 1, 2)
    return Heads(np.log(2) / np.maximum(forgets, 1e-12), places, condition)


def _twice(document: Document, passage: int) -> Document:
    """BOS, the passage, and the passage again."""
    tokens, sizes = document.tokens[1 : passage + 1], document.token_bytes[1 : passage + 1]
    return Document(
        document.name,
        np.concatenate([document.tokens[:1], tokens, tokens]),
        np.concatenate([document.token_bytes[:1], sizes, sizes]),
    )


def _measure(config: MesaNetConfig, params, documents: list[Document], length: int, **sizes):
    """Scores, and the solver's trace if there is one."""
    if solver.has_solver(config):
        grid = Grid(log_edges(length, per_octave=1), "tokens", UNIT)
        return solver.measure(config, params, documents, grid, **sizes)
    apply = _compiled(config)
    return score(lambda tokens: apply(params, tokens), documents, length=length, **sizes), None


def _flops(config: MesaNetConfig, scores: Scores, steps: float | None) -> float:
    """FLOPs per token that was scored, by the length of its document: attention grows with that."""
    lengths, number = np.unique(np.bincount(scores.document), return_counts=True)
    each = [forward_flops(config, int(length), steps) for length in lengths]
    return float(np.average(each, weights=lengths * number))


def _compiled(config: MesaNetConfig):
    model = MesaNet(config)
    return jax.jit(lambda params, tokens: model.apply(params, tokens)[0], compiler_options=compiler_options())


def _call(config: MesaNetConfig, params, tokens: jax.Array):
    apply = _compiled(config)
    return lambda: apply(params, tokens).block_until_ready()


def _batch(read: Texts, batch_size: int) -> jax.Array:
    """The longest documents, as a batch of the scores would hold them."""
    longest = sorted(read.documents, key=lambda document: -len(document.tokens))[:batch_size]
    tokens = np.zeros((batch_size, read.length), np.int32)
    for row, document in enumerate(longest):
        window = whole_window(row, document.tokens, read.length)
        tokens[row, : len(window.tokens)] = window.tokens
    return jnp.asarray(tokens)
