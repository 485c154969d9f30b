"""Trains a small model on all examples of a task, many times over, and tests it after every time."""

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.mesh import compiler_options
from experiments.synthetic.examples import IGNORED, Examples
from mesanet_jax.sharding import batch_sharding, parameter_shardings
from mesanet_jax.train import OptimizerConfig, make_optimizer

GOOD_ENOUGH = 0.999  # score that ends training


class Choice(NamedTuple):
    """What sweeps try."""

    peak_lr: float  # learning rate after warm-up
    weight_decay: float  # of matrices
    seed: int  # of parameters and order


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How long and how a model learns.

    Attributes:
      epochs: times that every example is seen.
      least_steps: steps at least; where examples are few they are seen more often for it.
      batch_size: examples per step.
      warmup_steps: steps of linear warm-up, at most a tenth of all.
      final_lr: learning rate at the end.
      b2: decay of the second moment.
    """

    epochs: int = 200
    least_steps: int = 0
    batch_size: int = 32
    warmup_steps: int = 750
    final_lr: float = 1e-5
    b2: float = 0.98

    def __post_init__(self):
        if min(self.epochs, self.batch_size) < 1:
            raise ValueError(f"FitConfig: epochs={self.epochs} and batch_size={self.batch_size} must be at least 1.")
        if self.least_steps < 0:
            raise ValueError(f"FitConfig: least_steps={self.least_steps} is negative; 0 asks for no more than epochs.")
        if self.final_lr <= 0:
            raise ValueError(f"FitConfig: final_lr={self.final_lr} must be positive.")

    def most_epochs(self, steps: int) -> int:
        """Returns the epochs of so many steps after which training ends at the latest."""
        return max(self.epochs, -(-self.least_steps // steps))

    def optimizer(self, choice: Choice, num_steps: int) -> optax.GradientTransformation:
        """Returns AdamW with warm-up and cosine.

        Raises:
          ValueError: a number is out of its range.
        """
        if not 0 <= choice.seed < 2**32:
            raise ValueError(f"seed={choice.seed} must lie between 0 and 2**32 - 1.")
        schedule = OptimizerConfig(
            peak_lr=choice.peak_lr,
            start_lr=min(1e-7, abs(choice.peak_lr)),
            final_fraction=min(1.0, self.final_lr / abs(choice.peak_lr or 1.0)),
            warmup_steps=min(self.warmup_steps, num_steps // 10),
            b2=self.b2,
            weight_decay=choice.weight_decay,
        )
        return make_optimizer(schedule, num_steps)


class Fitted(NamedTuple):
    """What came of it."""

    params: dict
    predictions: np.ndarray  # [n, t] int32, the most likely ids of the last test
    num_epochs: int
    loss: float  # nats per target, over the last epoch
    seconds: float


def fit(
    apply: Callable[..., jax.Array],
    boxed: Callable[[jax.Array], dict],
    train: Examples,
    test: Examples,
    accuracy: Callable[[np.ndarray], float],
    config: FitConfig,
    choice: Choice,
    mesh: jax.sharding.Mesh,
) -> Fitted:
    """Trains on every example once an epoch, in an order drawn from the seed, until the test is as good as perfect.

    Args:
      apply: (parameters, inputs [b, t]) to logits [b, t, y].
      boxed: key to parameters with their logical axes.
      train, test: the examples; a batch that is not full is left out of training.
      accuracy: of the most likely ids [n, t] at the positions of the test, 1 at most.
      config, choice: the fit.
      mesh: devices that share every batch.
    """
    begin, steps = time.perf_counter(), len(train.inputs) // config.batch_size
    epochs = config.most_epochs(steps)
    optimizer = config.optimizer(choice, steps * epochs)
    rng, done, loss, predictions = np.random.default_rng(choice.seed), 0, math.nan, None
    with jax.set_mesh(mesh):
        params = jax.eval_shape(boxed, jax.random.key(choice.seed))
        init = jax.jit(lambda key: nn.unbox(boxed(key)), out_shardings=parameter_shardings(params, mesh))
        params = init(jax.random.key(choice.seed))
        state = params, jax.jit(optimizer.init)(params)
        epoch = jax.jit(partial(_epoch, apply, optimizer), donate_argnums=0, compiler_options=compiler_options())
        test_now = predictor(apply, test.inputs, config.batch_size, mesh)
        while done < epochs and (predictions is None or accuracy(predictions) < GOOD_ENOUGH):
            order = rng.permutation(len(train.inputs))[: steps * config.batch_size]
            state, loss = epoch(state, *(_batches(x, order, config.batch_size, mesh) for x in train))
            predictions = test_now(state[0])
            done += 1
    assert predictions is not None
    return Fitted(state[0], predictions, done, float(loss), time.perf_counter() - begin)


def predictor(
    apply: Callable[..., jax.Array], inputs: np.ndarray, batch_size: int, mesh: jax.sharding.Mesh
) -> Callable[[dict], np.ndarray]:
    """Returns the function from parameters to the most likely ids [n, t] for inputs [n, t]."""
    batches = _batches(inputs, np.arange(len(inputs)), batch_size, mesh)

    @partial(jax.jit, compiler_options=compiler_options())
    def predict(params, batches):
        return jax.lax.map(lambda x: jnp.argmax(apply(params, x), axis=-1).astype(jnp.int32), batches)

    def call(params) -> np.ndarray:
        with jax.set_mesh(mesh):
            return np.asarray(predict(params, batches)).reshape(-1, inputs.shape[1])[: len(inputs)]

    return call


def _batches(x: np.ndarray, order: np.ndarray, size: int, mesh: jax.sharding.Mesh) -> jax.Array:
    """Rows in an order as [steps, b, t] on the devices, the last batch filled up with row 0."""
    order = np.concatenate([order, np.zeros(-len(order) % size, order.dtype)])
    return jax.device_put(x[order].reshape(-1, size, x.shape[1]), batch_sharding(mesh, 1))


def _epoch(apply, optimizer, state, inputs: jax.Array, targets: jax.Array):
    """Returns the state after one step for each batch [steps, b, t], and the mean loss."""

    def step(state, batch):
        params, opt_state = state
        loss, grads = jax.value_and_grad(_loss)(params, apply, *batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    state, losses = jax.lax.scan(step, state, (inputs, targets))
    return state, jnp.mean(losses)


def _loss(params, apply, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Nats per target."""
    losses = optax.softmax_cross_entropy_with_integer_labels(apply(params, inputs), jnp.maximum(targets, 0))
    asked = targets != IGNORED
    return jnp.sum(losses, where=asked) / jnp.maximum(jnp.sum(asked), 1)
