"""One optimizer step as a pure function of state and batch."""

import dataclasses
import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mesanet_jax import sharding
from mesanet_jax.loss import Batch, targets_and_weights, total_loss
from mesanet_jax.model import MesaNet, apply_with_report
from pallas_kernels import dispatch

# parameters, or what holds them, whose gradients are float32 whatever the type of the activations
_IN_FLOAT32 = frozenset({"scale", "bias", "ridge", "decay", "forget_gate", "input_gate", "recurrence_gate"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as in the paper (arXiv 2506.05233, appendix G.3).

    Attributes:
      peak_lr: learning rate after warm-up.
      start_lr: learning rate of the first step.
      final_fraction: share of peak_lr that the cosine ends at.
      warmup_steps: steps of linear warm-up.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decay of matrices; embedding, norms, biases, ridge and the decays of hawk have none.
      clip_norm: largest norm of a gradient.
    """

    peak_lr: float = 1e-3
    start_lr: float = 1e-6
    final_fraction: float = 0.1
    warmup_steps: int = 2000
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self):
        for field, value in dataclasses.asdict(self).items():
            if not math.isfinite(value):
                raise ValueError(f"OptimizerConfig: {field}={value} must be finite.")
        if self.peak_lr <= 0:
            raise ValueError(f"OptimizerConfig: peak_lr={self.peak_lr} must be positive.")
        for field in ("warmup_steps", "start_lr", "weight_decay", "final_fraction"):
            if getattr(self, field) < 0:
                raise ValueError(f"OptimizerConfig: {field}={getattr(self, field)} must not be negative.")
        if self.warmup_steps != int(self.warmup_steps):
            raise ValueError(f"OptimizerConfig: warmup_steps={self.warmup_steps} must be a whole number.")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.eps > 0 and self.clip_norm > 0):
            raise ValueError("OptimizerConfig: b1 and b2 must lie in [0, 1), eps and clip_norm above 0.")


class Skipped(NamedTuple):
    """Steps that changed no parameter and no moment, because something was not finite."""

    total: jax.Array  # [] int32
    in_a_row: jax.Array  # [] int32, up to the last step


class TrainState(NamedTuple):
    """Everything that training changes. Randomness is a function of (seed, step), so no key is carried."""

    step: jax.Array  # [] int32, batches taken in
    params: dict
    opt_state: optax.OptState
    skipped: Skipped


class Metrics(NamedTuple):
    """Measurements of one step, each a scalar; the solver's are NaN for a model without mesa layers."""

    loss: jax.Array  # nats per target token
    grad_norm: jax.Array  # before clipping
    num_targets: jax.Array
    solver_steps: jax.Array  # mean over tokens, heads and layers
    solver_residual: jax.Array  # worst relative residual
    skipped: jax.Array  # steps so far, this one included
    skipped_in_a_row: jax.Array
    bad_micro_batch: jax.Array  # the first whose loss is not finite, or -1
    bad_gradient: jax.Array  # the first, in the order of jax.tree.leaves(params), that is not finite, or -1
    bad_parameter: jax.Array  # the first, in the same order, that the update would have made so, or -1


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine that ends after num_steps."""
    return optax.warmup_cosine_decay_schedule(
        init_value=config.start_lr,
        peak_value=config.peak_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=max(num_steps, config.warmup_steps + 1),
        end_value=config.final_fraction * config.peak_lr,
    )


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Returns clipped AdamW with the schedule and decay mask of the config."""
    adamw = optax.adamw(
        learning_rate(config, num_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def init_train_state(key: jax.Array, model: MesaNet, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step; jit it with shardings to create it in place."""
    params = nn.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32)))
    return TrainState(jnp.int32(0), params, optimizer.init(params), Skipped(jnp.int32(0), jnp.int32(0)))


def train_state_shardings(model: MesaNet, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh):
    """Returns the sharding of every array of a TrainState; moments lie where their parameters do."""
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    params = sharding.parameter_shardings(boxed, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, nn.unbox(boxed)),
        params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, params, opt_state, Skipped(replicated, replicated))


def train_step(
    state: TrainState, batch: Batch, *, model: MesaNet, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """Does one update from micro-batches: batch arrays are [a, b, t + 1].

    Gradients are summed over micro-batches and divided by the number of target tokens once, so that splitting a batch
    changes nothing but rounding. A loss, a gradient or an updated parameter that is not finite leaves parameters and
    moments as they are: the step is skipped and counted, and neither the schedule nor the bias correction of the
    optimizer moves on.
    """
    grads, losses, watched = _gradients(state.params, batch, model)
    num_targets = jnp.maximum(watched.num_targets, 1)
    grads = jax.tree.map(lambda g: g / num_targets, grads)
    squares = jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)])
    loss, grad_norm = jnp.sum(losses) / num_targets, jnp.sqrt(jnp.sum(squares))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updated = (optax.apply_updates(state.params, updates), opt_state)
    finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(updated[0])])
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.all(finite)
    params, opt_state = jax.tree.map(functools.partial(jnp.where, good), updated, (state.params, state.opt_state))
    skipped = Skipped(state.skipped.total + ~good, jnp.where(good, 0, state.skipped.in_a_row + 1))
    metrics = Metrics(
        loss=loss,
        grad_norm=grad_norm,
        num_targets=watched.num_targets,
        solver_steps=watched.solver_steps / watched.solves,  # 0 / 0 is the NaN that says "no mesa layer"
        solver_residual=jnp.where(watched.solves > 0, watched.solver_residual, jnp.nan),
        skipped=skipped.total,
        skipped_in_a_row=skipped.in_a_row,
        bad_micro_batch=_first_not_finite(losses),
        bad_gradient=_first_not_finite(squares),
        bad_parameter=_first(~finite),
    )
    return TrainState(state.step + 1, params, opt_state, skipped), metrics


def _gradients(params, batch: Batch, model: MesaNet) -> tuple[dict, jax.Array, "_Watched"]:
    """Returns gradients of the summed loss, the loss of each micro-batch [a] and what was watched.

    Replicas add up their gradients once, when each is through with its rows. Left to themselves, compilers do it in
    every layer of every micro-batch, and some for TPUs together with the sum along fsdp: whole, where a share would do.
    """

    def of_a_replica(params, batch: Batch):
        def accumulate(carry, micro: Batch):
            grads, watched = carry
            (loss, micro_watched), micro_grads = jax.value_and_grad(_loss, has_aux=True)(params, micro, model)
            return (jax.tree.map(jnp.add, grads, micro_grads), _merge(watched, micro_watched)), loss

        nothing = _Watched(*(jnp.float32(0) for _ in _Watched._fields))
        (grads, watched), losses = jax.lax.scan(accumulate, (jax.tree.map(jnp.zeros_like, params), nothing), batch)
        return grads, losses, watched

    def of_all(replica, axis: str):
        grads, losses, watched = replica
        once = len(losses) == 1 and dispatch.platform() != "cpu"  # where XLA aborts at sums in bfloat16 by hand
        sent = _as_computed(grads, model.config.dtype) if once else grads
        sums, losses, merged = jax.lax.psum((sent, losses, watched), axis)
        grads = jax.tree.map(lambda g, total: total.astype(g.dtype), grads, sums)
        return grads, losses, merged._replace(solver_residual=jax.lax.pmax(watched.solver_residual, axis))

    return sharding.on_replicas(of_a_replica, of_all, params, batch)


def _as_computed(grads, dtype: str):
    """Returns gradients of one micro-batch in the type that they were computed in, which loses nothing."""

    def narrowed(path, g):
        return g if _IN_FLOAT32 & {name.key for name in path[-2:]} else g.astype(dtype)

    return jax.tree_util.tree_map_with_path(narrowed, grads)


def _first_not_finite(values: jax.Array) -> jax.Array:
    return _first(~jnp.isfinite(values))


def _first(marks: jax.Array) -> jax.Array:
    """Returns the place of the first mark that is true, -1 if none is."""
    return jnp.where(jnp.any(marks), jnp.argmax(marks), -1)


class _Watched(NamedTuple):
    """What micro-batches are summed (or, for the residual, maximised) over."""

    num_targets: jax.Array
    solver_steps: jax.Array
    solver_residual: jax.Array
    solves: jax.Array


def _merge(a: _Watched, b: _Watched) -> _Watched:
    merged = _Watched(*map(jnp.add, a, b))
    return merged._replace(solver_residual=jnp.maximum(a.solver_residual, b.solver_residual))


def _loss(params, batch: Batch, model: MesaNet) -> tuple[jax.Array, _Watched]:
    targets, weights = targets_and_weights(batch)
    logits, _, report = apply_with_report(model, params, batch.tokens[:, :-1], None, batch.segment_ids[:, :-1])
    steps = residual = solves = jnp.float32(0)
    if report is not None:
        steps, residual = jnp.sum(report.num_steps, dtype=jnp.float32), jnp.max(report.residual)
        solves = jnp.float32(report.num_steps.size)
    return total_loss(logits, targets, weights), _Watched(jnp.sum(weights), steps, residual, solves)


def _decayed(params):
    """True for parameters with weight decay: those whose last name is not one of the undecayed."""
    undecayed = {"embedding", "scale", "bias", "ridge", "decay"}
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in undecayed, params)
