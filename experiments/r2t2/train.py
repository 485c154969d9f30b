"""Train the experts, routers and read-outs that R2-T2 then re-routes without ever changing them.

  python -m experiments.r2t2.train                              two minutes on two cores, downloads nothing
  python -m experiments.r2t2.references --run runs/r2t2/seed0   what the frozen model makes of labelled examples
  python -m experiments.r2t2.evaluate --runs runs/r2t2/seed0    what re-routing gains, what it breaks, and why

Six experts learn alone to answer questions about clean scenes and are frozen (stage 1). Read-outs and routers then
learn on top of them (stage 2): first with experts drawn at random, as MoAI does, then end to end.
"""

import dataclasses
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import cli
from experiments.r2t2 import scenes
from experiments.r2t2.folder import create, save_model
from experiments.r2t2.scenes import Scenes
from r2t2_jax.models.scenes import ANSWERS, ScenesConfig, ScenesModel
from r2t2_jax.models.scenes.experts import EXPERTS, Expert
from r2t2_jax.models.scenes.model import GROUPS, see
from r2t2_jax.models.scenes.readouts import AffineReadout, DeepReadout, Router
from r2t2_jax.shapes import Readout


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What is trained.

    Attributes:
      output: folder of the run; must not exist yet or be empty.
      seed: of scenes, initial parameters and order.
      num_scenes: clean scenes to learn from.
      expert_epochs: passes over them in which each expert learns alone.
      warm_epochs: passes of the read-outs with experts drawn at random.
      router_epochs: passes of read-outs and routers together.
      batch_size: scenes per step of the experts; read-outs take twice as many.
      expert_lr, warm_lr, router_lr: peak learning rates of the three phases (Adam, cosine schedule to 0).
      readouts: which members of the family to train; they share the experts.
    """

    output: Path = Path("runs/r2t2/seed0")
    seed: int = 0
    num_scenes: int = 16_000
    expert_epochs: int = 8
    warm_epochs: int = 1
    router_epochs: int = 25
    batch_size: int = 128
    expert_lr: float = 4e-3
    warm_lr: float = 2e-3
    router_lr: float = 2e-3
    readouts: tuple[str, ...] = ("affine", "deep")

    def __post_init__(self):
        for field in ("expert_epochs", "router_epochs", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"TrainConfig: {field}={getattr(self, field)} must be at least 1.")
        if self.warm_epochs < 0:
            raise ValueError(f"TrainConfig: warm_epochs={self.warm_epochs} must not be negative.")
        if self.num_scenes < 2 * self.batch_size:
            raise ValueError(f"TrainConfig: num_scenes={self.num_scenes} is less than two batches; make more scenes.")
        if not self.readouts or set(self.readouts) - set(GROUPS):
            raise ValueError(f"TrainConfig: readouts={self.readouts} must be some of {tuple(GROUPS)}.")


def main(config: TrainConfig) -> None:
    """Trains, says how good each model is on clean scenes, and saves."""
    create(config.output, dataclasses.asdict(config) | {"output": str(config.output)})
    begin = time.monotonic()
    data = scenes.make("train", config.num_scenes, config.seed)
    print(f"{len(data):,} clean scenes; six experts learn alone", flush=True)
    experts = train_experts(config, data)
    consulted = consult(experts, data)
    for readout in config.readouts:
        train = train_affine if readout == "affine" else train_deep
        params = {"params": experts | train(config, data, *consulted)}
        save_model(config.output, ScenesConfig(readout=readout), params)
        print(f"{readout} model: {accuracy(readout, params, data.take(slice(0, 2000))):.1%} of scenes it learned from")
    print(f"Trained in {(time.monotonic() - begin) / 60:.1f} minutes: {config.output}")


def accuracy(readout: str, params, data: Scenes) -> float:
    """Returns the share of right answers of the model's own routing."""
    model = ScenesModel(ScenesConfig(readout=readout))
    return float((jax.jit(model.apply)(params, data.inputs).argmax(-1) == data.label).mean())


# --- stage 1 ---


class Alone(nn.Module):
    """An expert with an answer of its own."""

    kind: str

    @nn.compact
    def __call__(self, image, question):
        """Returns logits [b, y]."""
        return nn.Dense(len(ANSWERS))(Expert(self.kind, name="expert")(image, question)[1])


def train_experts(config: TrainConfig, data: Scenes) -> dict:
    """Returns the parameters of every expert, named as in ScenesModel. The six losses share one compiled step."""
    learners = [Alone(kind) for kind in EXPERTS]
    example = see({name: x[:2] for name, x in data.inputs.items()})
    keys = jax.random.split(jax.random.key(config.seed), len(learners))
    params = [learner.init(key, *example) for learner, key in zip(learners, keys, strict=True)]
    num_steps = config.expert_epochs * (len(data) // config.batch_size)
    schedule = optax.warmup_cosine_decay_schedule(0, config.expert_lr, min(100, num_steps // 2), num_steps)

    def loss(params, inputs, labels):
        logits = [learner.apply(p, *see(inputs)) for learner, p in zip(learners, params, strict=True)]
        return sum(cross_entropy(x, labels) for x in logits)

    optimizer, step = _optimise(loss, schedule)
    moments, rng = optimizer.init(params), np.random.default_rng([config.seed, 1])
    for epoch in range(config.expert_epochs):
        for inputs, labels in data.batches(config.batch_size, rng):
            params, moments, value = step(params, moments, inputs, labels)
        print(f"  pass {epoch + 1} of {config.expert_epochs}, mean loss {float(value) / len(learners):.3f}", flush=True)
    return {f"experts_{i}": p["params"]["expert"] for i, p in enumerate(params)}


def cross_entropy(logits, labels):
    """Mean over the batch, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _optimise(loss, schedule):
    """Returns Adam and a compiled step (params, moments, *batch) -> (params, moments, loss)."""
    optimizer = optax.adam(schedule)

    @jax.jit
    def step(params, moments, *batch):
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(params, updates), moments, value

    return optimizer, step


# --- stage 2 ---


def consult(experts: dict, data: Scenes, batch_size: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens [n, e, t, d] and vectors [n, e, d] of the frozen experts, computed once for all of stage 2."""

    @jax.jit
    def ask(inputs):
        image, question = see(inputs)
        words = [
            Expert(kind).apply({"params": experts[f"experts_{i}"]}, image, question) for i, kind in enumerate(EXPERTS)
        ]
        return jnp.stack([tokens for tokens, _ in words], 1), jnp.stack([vector for _, vector in words], 1)

    starts = range(0, len(data), batch_size)
    parts = [ask({name: x[start : start + batch_size] for name, x in data.inputs.items()}) for start in starts]
    tokens, vectors = (np.concatenate([np.asarray(part) for part in kind]) for kind in zip(*parts, strict=True))
    return tokens, vectors


def train_affine(config: TrainConfig, data: Scenes, tokens: np.ndarray, vectors: np.ndarray) -> dict:
    """Returns the parameters of router and read-out."""
    router, readout = Router(len(EXPERTS)), AffineReadout()
    keys = jax.random.split(jax.random.key(config.seed + 1))
    example = see({name: x[:2] for name, x in data.inputs.items()})
    params = {
        "router": router.init(keys[0], *example)["params"],
        "readout": readout.init(keys[1], vectors[:2])["params"],
    }

    def logits(params, inputs, vectors, routing):
        routing = router.apply({"params": params["router"]}, *see(inputs)) if routing is None else routing
        weight, offset = readout.apply({"params": params["readout"]}, vectors)
        return Readout(weight, offset)(routing)

    return _learn_to_read(config, logits, params, data, vectors, GROUPS["affine"])


def train_deep(config: TrainConfig, data: Scenes, tokens: np.ndarray, vectors: np.ndarray) -> dict:
    """Returns the parameters of the deep read-out, whose gates are its router."""
    module = DeepReadout(GROUPS["deep"])
    example = see({name: x[:2] for name, x in data.inputs.items()})
    params = {"deep": module.init(jax.random.key(config.seed + 2), *example, tokens[:2])["params"]}

    def logits(params, inputs, tokens, routing):
        return module.apply({"params": params["deep"]}, *see(inputs), tokens, routing)

    return _learn_to_read(config, logits, params, data, tokens, GROUPS["deep"])


def _learn_to_read(config: TrainConfig, logits, params, data: Scenes, words: np.ndarray, groups) -> dict:
    """Trains with experts drawn at random, one of each group, then end to end."""
    size, rng = 2 * config.batch_size, np.random.default_rng([config.seed, 2])
    for epochs, peak, drawn in (
        (config.warm_epochs, config.warm_lr, True),
        (config.router_epochs, config.router_lr, False),
    ):

        def loss(params, inputs, words, labels, routing):
            return cross_entropy(logits(params, inputs, words, routing), labels)

        schedule = optax.cosine_decay_schedule(peak, max(epochs * (len(data) // size), 1))
        optimizer, step = _optimise(loss, schedule)
        moments = optimizer.init(params)
        for rows in np.concatenate([_batches(len(data), size, rng) for _ in range(epochs)] or [np.empty((0, size))]):
            rows = rows.astype(int)
            inputs = {name: x[rows] for name, x in data.inputs.items()}
            routing = _one_of_each(groups, size, rng) if drawn else None
            params, moments, _ = step(params, moments, inputs, words[rows], data.label[rows], routing)
    return params


def _batches(num: int, size: int, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(num)[: num // size * size].reshape(-1, size)


def _one_of_each(groups: tuple[int, ...], size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns routings [size, e] that choose one expert of each group."""
    return np.concatenate([np.eye(n, dtype=np.float32)[rng.integers(n, size=size)] for n in groups], axis=1)


if __name__ == "__main__":
    cli.run(main, TrainConfig)
