"""Rows to hold re-routing against: the same labels used otherwise, and oracles that cheat."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.r2t2.results import Row
from experiments.r2t2.trial import Seed, attempt
from r2t2_jax import baselines
from r2t2_jax.evaluate import Paired, reachable, wrong_labels
from r2t2_jax.models.scenes import ANSWERS, COLORS, SHAPES
from r2t2_jax.neighbors import NeighborConfig, nearest, weigh
from r2t2_jax.reroute import RerouteConfig, pose
from r2t2_jax.strategies import STRATEGIES, StrategyConfig

DIGITS, COUNTS = list(range(10)), list(range(4))
COLOR, SHAPE = ([ANSWERS.index(name) for name in names] for names in (COLORS, SHAPES))
YES_OR_NO = [ANSWERS.index("yes"), ANSWERS.index("no")]
POSSIBLE = (DIGITS, COLOR, COLOR, SHAPE, COUNTS, YES_OR_NO, YES_OR_NO)  # answers to each of TEMPLATES
ORACLE = RerouteConfig(
    strategy="oracle", neighbors=NeighborConfig(k=1), settings=StrategyConfig(learning_rate=5.0), guarded=False
)


def same_labels(seeds: list[Seed], descent: RerouteConfig) -> tuple[Row, ...]:
    """Returns baselines that know the references' labels, or no labels at all, like the strategies.

    Args:
      seeds: models with exact read-outs, or linearised ones.
      descent: settings of the descent that random neighbours are given to.
    """
    routings: dict[str, tuple[str, Callable[[Seed], np.ndarray]]] = {
        "uniform": ("all experts alike", lambda seed: baselines.uniform(seed.references.groups, len(seed.test.scenes))),
        "best single routing": ("one for all inputs, fitted to the references", _single),
        "best router bias": ("one shift of all routings' logits, fitted", _shifted),
        "best per template": ("one routing for each kind of question, fitted", _per_template),
        "sharpened": ("descent on the entropy of the model's own answer, no labels", _sharpened),
        "random neighbours": ("the same descent on references drawn at random", lambda seed: _random(seed, descent)),
    }
    rows = [_row("same labels", name, note, seeds, find) for name, (note, find) in routings.items()]
    voted = tuple(_vote(seed, descent) for seed in seeds)
    note = "the label most neighbours have, without the model"
    return (*rows, Row(section="same labels", name="neighbours' vote", note=note, seeds=voted, rerouted=0.0))


def oracles(seeds: list[Seed]) -> tuple[Row, ...]:
    """Returns upper bounds: descent on the test's own label, existence, and descent on a wrong label."""
    told = tuple(attempt(seed, seed.test, ORACLE, seed.references, seed.test.scenes.label).paired for seed in seeds)
    rows = [Row(section="oracles", name="oracle", note="descent on the test's own label", seeds=told, rerouted=1.0)]
    if all(seed.trained.model.readout for seed in seeds):
        exists = tuple(_exists(seed) for seed in seeds)
        note = "some routing of a grid answers rightly"
        rows.append(Row(section="oracles", name="existence oracle", note=note, seeds=exists, rerouted=1.0))
    null = tuple(_null(seed) for seed in seeds)
    note = "how often descent on a random wrong answer of the same kind reaches it"
    return (*rows, Row(section="oracles", name="null oracle", note=note, seeds=null, rerouted=1.0))


def _row(section: str, name: str, note: str, seeds: list[Seed], find: Callable[[Seed], np.ndarray]) -> Row:
    return Row(
        section=section, name=name, note=note, seeds=tuple(_answered(seed, find(seed)) for seed in seeds), rerouted=1.0
    )


def _answered(seed: Seed, routing: np.ndarray) -> Paired:
    """Answers the test under other routings; deep models through their own forward pass."""
    scenes = seed.test.scenes
    base = np.asarray(_logits(seed, seed.test.look.routing).argmax(-1)) == scenes.label
    return Paired(base, np.asarray(_logits(seed, routing).argmax(-1)) == scenes.label)


def _logits(seed: Seed, routing: np.ndarray) -> np.ndarray:
    if seed.trained.model.readout:
        return np.asarray(seed.test.look.readout(np.asarray(routing)))
    forward, inputs = jax.jit(seed.trained.model.forward), seed.test.scenes.inputs
    parts = [
        forward(
            seed.trained.params, {name: x[start : start + 500] for name, x in inputs.items()}, routing[start:][:500]
        )
        for start in range(0, len(routing), 500)
    ]
    return np.concatenate([np.asarray(part) for part in parts])


def _single(seed: Seed) -> np.ndarray:
    return np.broadcast_to(baselines.best_global(seed.references), seed.test.look.routing.shape)


def _shifted(seed: Seed) -> np.ndarray:
    logits = jnp.log(seed.test.look.routing) + baselines.best_shift(seed.references)
    return np.asarray(baselines.on_simplex(logits, seed.references.groups))


def _per_template(seed: Seed) -> np.ndarray:
    fitted = baselines.best_per_group(seed.references, seed.reference_scenes.question[:, 0])
    return fitted[seed.test.scenes.question[:, 0]]


def _sharpened(seed: Seed) -> np.ndarray:
    look = seed.test.look
    return np.asarray(baselines.sharpen(look.routing, jax.tree.map(jnp.asarray, look.readout), seed.references.groups))


def _random(seed: Seed, descent: RerouteConfig) -> np.ndarray:
    memory = attempt(seed, seed.dev, descent, seed.references).memory
    look = seed.test.look
    drawn = baselines.random_neighbors(len(look.routing), len(seed.references), descent.neighbors.k, seed=0)
    problem = pose(memory, jax.tree.map(jnp.asarray, drawn), look.routing, look.features, look.readout, None)
    return np.asarray(STRATEGIES["descent"](problem, memory, descent.settings, seed.references.groups))


def _vote(seed: Seed, descent: RerouteConfig) -> Paired:
    memory = attempt(seed, seed.dev, descent, seed.references).memory
    found = nearest(jnp.asarray(seed.test.look.embedding), memory.embedding, descent.neighbors.k)
    neighbors = jax.device_get(weigh(*found, descent.neighbors, memory.bandwidth))
    answers = baselines.vote(neighbors, seed.references.labels, len(ANSWERS))
    base = _answered(seed, seed.test.look.routing).before
    return Paired(base, answers == seed.test.scenes.label)


def _exists(seed: Seed) -> Paired:
    base = _answered(seed, seed.test.look.routing).before
    return Paired(base, reachable(seed.test.look.readout, seed.references.groups, seed.test.scenes.label))


def _null(seed: Seed) -> Paired:
    """Counts a wrong answer as the one that is wanted."""
    template, wanted = seed.test.scenes.question[:, 0], np.empty_like(seed.test.scenes.label)
    for kind, answers in enumerate(POSSIBLE):
        wanted[template == kind] = wrong_labels(seed.test.scenes.label[template == kind], [answers], seed=0)
    decisions = attempt(seed, seed.test, ORACLE, seed.references, wanted).decisions
    return Paired(decisions.base_answers == wanted, decisions.answers == wanted)
