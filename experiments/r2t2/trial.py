"""One seed's model, references and scenes, looked at once; methods are then tried on what was seen."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from experiments.cli import UserError
from experiments.r2t2 import scenes
from experiments.r2t2.folder import Trained
from experiments.r2t2.references import collect
from experiments.r2t2.scenes import Scenes
from r2t2_jax.calibrate import Forecast, prepare
from r2t2_jax.decision import Decisions
from r2t2_jax.embedders import Embedder
from r2t2_jax.evaluate import Paired
from r2t2_jax.references import ReferenceSet
from r2t2_jax.reroute import Look, RerouteConfig, decide, look, reroute
from r2t2_jax.strategies import Memory


class Seen(NamedTuple):
    """Scenes and what the frozen model makes of them."""

    scenes: Scenes
    look: Look


class Seed(NamedTuple):
    """All that an evaluation of one run needs."""

    trained: Trained
    embedder: Embedder
    references: ReferenceSet  # all labelled ones
    correct: ReferenceSet  # those that the frozen model answers rightly
    reference_scenes: Scenes
    dev: Seen
    test: Seen


class Trial(NamedTuple):
    """A method tried on some scenes."""

    paired: Paired
    decisions: Decisions
    forecast: Forecast
    memory: Memory


def open_seed(trained: Trained, num_references: int, num_dev: int, num_test: int, picture: float) -> Seed:
    """Draws the scenes of a run's seed and lets the frozen model look at all of them."""
    seed = trained.settings["seed"]
    references, dev, test = (
        scenes.make(split, size, seed)
        for split, size in (("reference", num_references), ("dev", num_dev), ("test", num_test))
    )
    opened = collect(trained, references, picture)
    see = functools.partial(_see, trained, opened.embedder)
    correct = opened.references.correct_only()
    return Seed(trained, opened.embedder, opened.references, correct, references, see(dev), see(test))


def _see(trained: Trained, embedder: Embedder, data: Scenes, batch_size: int = 500) -> Seen:
    program = jax.jit(functools.partial(look, trained.model, embedder=embedder))
    parts = []
    for start in range(0, len(data), batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), len(data) - 1)
        parts.append(jax.device_get(program(trained.params, data.take(rows).inputs)))
    return Seen(data, jax.tree.map(lambda *x: np.concatenate(x)[: len(data)], *parts))


def attempt(
    seed: Seed, seen: Seen, config: RerouteConfig, references: ReferenceSet, labels: np.ndarray | None = None
) -> Trial:
    """Re-routes scenes; models with an exact read-out are not run again, the others are.

    Args:
      seed, seen: whose scenes.
      config: the method.
      references: what it learns from.
      labels: what the oracle is told.

    Raises:
      UserError: the references are too few to learn from.
    """
    try:
        memory, forecast = prepared(references, config)
    except ValueError as error:  # too few of them, or of too few sources
        raise UserError(f"num_references: {error}") from None
    trained = seed.trained
    if trained.model.readout is None:
        decisions = reroute(
            trained.model,
            trained.params,
            memory,
            seen.scenes.inputs,
            config,
            embedder=seed.embedder,
            labels=labels,
        )
    else:
        decisions = jax.device_get(_decide_all(seen.look, memory, labels, config, trained.model.groups))
    right = decisions.base_answers == seen.scenes.label, decisions.answers == seen.scenes.label
    return Trial(Paired(*right), decisions, forecast, memory)


prepared = functools.lru_cache(maxsize=64)(prepare)  # by identity of the references, which nothing changes


@functools.partial(jax.jit, static_argnums=(3, 4))
def _decide_all(seen: Look, memory: Memory, labels, config: RerouteConfig, groups: tuple[int, ...]) -> Decisions:
    return decide(seen, memory, config, groups, seen.readout, labels=labels)
