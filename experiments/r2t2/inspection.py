"""A closer look at one method: which experts take over, after which step, where it helps, what it costs, and cases."""

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.r2t2.desk import Desk
from experiments.r2t2.references import Opened
from experiments.r2t2.results import Case, NeighborCase, Steps
from experiments.r2t2.scenes import CONDITIONS
from experiments.r2t2.trial import Seed, Trial, attempt
from pallas_kernels import router_descent
from r2t2_jax import records
from r2t2_jax.evaluate import pool
from r2t2_jax.models.scenes import ANSWERS, TEMPLATES, question_text
from r2t2_jax.references import ReferenceSet
from r2t2_jax.reroute import TILE, RerouteConfig, look_up, pose, propose
from r2t2_jax.strategies import SMALLEST, Memory


def transitions(seeds: Sequence[Seed], trials: Sequence[Trial]) -> dict[str, np.ndarray]:
    """Returns counts [e, e] of the expert with most weight before (row) and after, of fixed and broken answers."""
    num = len(seeds[0].trained.model.experts)
    counts = {"fixed": np.zeros((num, num), int), "broken": np.zeros((num, num), int)}
    for trial in trials:
        top = trial.decisions.base_routing.argmax(-1), trial.decisions.routing.argmax(-1)
        fixed, broken = ~trial.paired.before & trial.paired.after, trial.paired.before & ~trial.paired.after
        for kind, chosen in (("fixed", fixed), ("broken", broken)):
            np.add.at(counts[kind], tuple(expert[chosen] for expert in top), 1)
    return counts


def by_step(seeds: Sequence[Seed], descent: RerouteConfig) -> tuple[Steps, ...]:
    """Returns accuracy, fixed and broken after every step of the descent; models with an exact read-out only."""
    if not all(seed.trained.model.readout for seed in seeds):
        return ()
    rates = jnp.asarray(descent.settings.learning_rates())
    right = [[] for _ in range(len(rates) + 1)]
    for seed in seeds:
        seen, memory = seed.test.look, attempt(seed, seed.dev, descent, seed.references).memory
        problem = pose(
            memory,
            look_up(memory, jnp.asarray(seen.embedding), descent.neighbors),
            seen.routing,
            seen.features,
            seen.readout,
            None,
        )
        for steps in range(len(rates) + 1):
            routing = router_descent(
                jnp.log(jnp.maximum(seen.routing, SMALLEST)),
                *problem.readout,
                problem.labels,
                problem.weights,
                rates[:steps],
                groups=seed.references.groups,
            )[0]
            right[steps].append(np.asarray(seen.readout(np.asarray(routing)).argmax(-1)) == seed.test.scenes.label)
    after = [np.concatenate(parts) for parts in right]
    return (
        Steps(
            name="descent, all references",
            accuracy=np.array([x.mean() for x in after]),
            fixed=np.array([(~after[0] & x).mean() for x in after]),
            broken=np.array([(after[0] & ~x).mean() for x in after]),
        ),
    )


def by_condition(seeds: Sequence[Seed], trials: Sequence[Trial]) -> tuple[tuple[str, str, float, float, int], ...]:
    """Returns (condition, template, right before, right after, how many) over all seeds."""
    condition = np.concatenate([seed.test.scenes.condition for seed in seeds])
    template = np.concatenate([seed.test.scenes.question[:, 0] for seed in seeds])
    paired = pool([trial.paired for trial in trials])
    cells = []
    for i, condition_name in enumerate(CONDITIONS):
        for j, template_name in enumerate(TEMPLATES):
            here = (condition == i) & (template == j)
            if here.any():
                right = float(paired.before[here].mean()), float(paired.after[here].mean())
                cells.append((condition_name, template_name, *right, int(here.sum())))
    return tuple(cells)


def latency(
    seed: Seed, config: RerouteConfig, memory: Memory, rounds: int = 20
) -> tuple[tuple[str, float, float], ...]:
    """Returns (part, milliseconds per input, share) of a full tile, medians over rounds that take turns."""
    model, params = seed.trained.model, seed.trained.params
    inputs = jax.tree.map(jnp.asarray, seed.test.scenes.take(np.arange(TILE) % len(seed.test.scenes)).inputs)
    rows = np.arange(TILE) % len(seed.test.scenes)
    seen = jax.tree.map(lambda x: jnp.asarray(x[rows]), seed.test.look)
    find = jax.jit(lambda embedding, memory: look_up(memory, embedding, config.neighbors))
    neighbors = find(seen.embedding, memory)
    strategy = jax.jit(
        lambda seen, memory, neighbors: propose(
            pose(memory, neighbors, seen.routing, seen.features, seen.readout, None), memory, config, model.groups
        )
    )
    forward, router, features = (jax.jit(f) for f in (model.forward, model.router, model.features))
    embed = jax.jit(seed.embedder.embed)
    parts: dict[str, Callable[[], object]] = {
        "frozen model: router and answer": lambda: (router(params, inputs), forward(params, inputs, seen.routing)),
        "features for the re-router": lambda: features(params, inputs),
        "embedding": lambda: embed(params, inputs),
        "nearest neighbours": lambda: find(seen.embedding, memory),
        "strategy": lambda: strategy(seen, memory, neighbors),
        "answer under the new routing": lambda: forward(params, inputs, seen.routing),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(rounds + 1):
        for name, part in parts.items():
            start = time.perf_counter()
            jax.block_until_ready(part())
            if turn:  # the first turn compiles
                seconds[name].append(time.perf_counter() - start)
    medians = {name: 1000 * float(np.median(x)) / TILE for name, x in seconds.items()}
    total = sum(medians.values())
    return tuple((name, each, each / total) for name, each in medians.items())


def cases(seed: Seed, references: ReferenceSet, config: RerouteConfig, trial: Trial, most: int) -> tuple[Case, ...]:
    """Returns decisions to look at: answers fixed and broken, abstentions, and re-routings that changed no answer.

    Args:
      seed: whose test.
      references: what the method learned from; the decisions' neighbours are rows of it.
      config: the method.
      trial: what it did.
      most: about how many cases.
    """
    decisions, paired, scenes = trial.decisions, trial.paired, seed.test.scenes
    kinds = {
        "fixed": ~paired.before & paired.after,
        "broken": paired.before & ~paired.after,
        "abstained": ~decisions.rerouted,
        "kept": decisions.rerouted & (decisions.answers == decisions.base_answers),
    }
    share = {"fixed": 0.4, "broken": 0.3, "abstained": 0.15, "kept": 0.15}
    rng, chosen = np.random.default_rng(0), []
    for kind, mask in kinds.items():
        rows = np.flatnonzero(mask)
        rows = rng.permutation(rows)[: max(1, round(share[kind] * most))]
        chosen += [(kind, int(row)) for row in rows]
    opened = Opened(references, seed.embedder)
    desk = Desk(seed.trained, opened, trial.memory, config)
    made = []
    for kind, row in chosen:
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], decisions)
        record = desk.record(one, scenes.take([row]).inputs, [f"scene-{row}"])[0]
        made.append(_case(seed, references, kind, row, one, record))
    return tuple(made)


def _case(seed: Seed, references: ReferenceSet, kind: str, row: int, one, record: records.Record) -> Case:
    scenes = seed.test.scenes
    return Case(
        id=f"scene-{row}",
        kind=kind,
        image=scenes.image[row],
        condition=CONDITIONS[scenes.condition[row]],
        question=question_text(scenes.question[row]),
        truth=ANSWERS[scenes.label[row]],
        before=ANSWERS[one.base_answers[0]],
        after=ANSWERS[one.answers[0]],
        base_routing=one.base_routing[0],
        routing=one.routing[0],
        neighbors=tuple(
            _neighbor(seed, references, one, place) for place in range(min(4, one.neighbors.indices.shape[1]))
        ),
        sentence=records.sentence(record),
    )


def _neighbor(seed: Seed, references: ReferenceSet, one, place: int) -> NeighborCase:
    number = int(str(references.ids[one.neighbors.indices[0, place]]).removeprefix("scene-"))
    scenes = seed.reference_scenes
    return NeighborCase(
        image=scenes.image[number],
        question=question_text(scenes.question[number]),
        answer=ANSWERS[scenes.label[number]],
        similarity=float(one.neighbors.similarity[0, place]),
        weight=float(one.neighbors.weights[0, place]),
        routing=one.neighbor_routing[0, place],
    )
