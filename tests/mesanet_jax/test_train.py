"""Loss, schedule and the optimizer step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pallas_kernels
from mesanet_jax import SIZES, MesaNet
from mesanet_jax.flops import forward_flops, training_flops
from mesanet_jax.loss import Batch, targets_and_weights, total_loss
from mesanet_jax.mixers import MIXERS
from mesanet_jax.train import (
    OptimizerConfig,
    _as_computed,
    _loss,
    init_train_state,
    learning_rate,
    make_optimizer,
    train_step,
)
from pallas_kernels import SolverConfig
from tests import tolerances

SMALL = dataclasses.replace(
    SIZES["tiny"], vocab_size=31, num_layers=1, model_dim=32, num_heads=2, key_dim=16, value_dim=16
)
OPTIMIZER = OptimizerConfig(peak_lr=1e-2, warmup_steps=2)


def model_config(pattern):
    """One layer of each mixer."""
    return dataclasses.replace(SMALL, pattern=pattern, num_layers=len(pattern))


@functools.cache
def compiled(pattern=("mesa",)):
    """Returns a fresh state and the jitted step."""
    model = MesaNet(model_config(pattern))
    optimizer = make_optimizer(OPTIMIZER, 50)
    state = init_train_state(jax.random.key(0), model, optimizer)
    return state, jax.jit(functools.partial(train_step, model=model, optimizer=optimizer))


def batch(micro_batches: int = 1) -> Batch:
    """Eight rows of 21 tokens, some packed, one padded."""
    tokens = jax.random.randint(jax.random.key(3), (8, 21), 0, SMALL.vocab_size)
    ids = jnp.zeros((8, 21), jnp.int32).at[2, 9:].set(1).at[5, 15:].set(-1)
    return jax.tree.map(lambda x: x.reshape(micro_batches, -1, 21), Batch(tokens, ids))


def test_targets_stay_inside_documents_and_leave_out_padding():
    ids = jnp.array([[0, 0, 1, 1, -1]])
    targets, weights = targets_and_weights(Batch(jnp.array([[9, 1, 9, 2, 0]]), ids))
    np.testing.assert_array_equal(targets, [[1, 9, 2, 0]])
    np.testing.assert_array_equal(weights, [[1, 0, 1, 0]])  # 9 begins a document and 0 is padding


def test_loss_is_the_sum_of_negative_log_probabilities_and_ignores_a_nan_of_no_weight():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [jnp.nan] * 3]]))
    loss = total_loss(logits, jnp.array([[1, 2, 0]]), jnp.array([[1.0, 1.0, 0.0]]))
    assert float(loss) == pytest.approx(-np.log(0.25) - np.log(0.8), rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int32, jnp.uint32])
def test_a_target_is_found_whatever_type_its_number_has(dtype):
    logits = jax.random.normal(jax.random.key(0), (1, 3, 257))
    targets = np.array([[0, 5, 7]])
    expected = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], axis=-1).sum()
    found = total_loss(logits, jnp.asarray(targets, dtype), jnp.ones((1, 3)))
    assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("target", [-1, 3, 300])
def test_a_target_beyond_the_vocabulary_is_nan_and_not_nothing(target):
    assert jnp.isnan(total_loss(jnp.zeros((1, 1, 3)), jnp.array([[target]]), jnp.ones((1, 1))))


def test_splitting_a_batch_into_micro_batches_changes_only_rounding():
    state, step = compiled()
    (whole, metrics), (parts, metrics_of_parts) = step(state, batch(1)), step(state, batch(4))
    assert float(metrics_of_parts.loss) == pytest.approx(float(metrics.loss), rel=1e-6)
    assert metrics.num_targets == metrics_of_parts.num_targets == 8 * 20 - 1 - 6
    for a, b in zip(jax.tree.leaves(parts.opt_state), jax.tree.leaves(whole.opt_state), strict=True):
        tolerances.assert_near(a, b, tolerances.MODEL["gradient"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_gradient_that_replicas_send_in_the_type_it_was_computed_in_loses_nothing(mixer, tied):
    model = MesaNet(dataclasses.replace(SMALL, pattern=(mixer,), dtype="bfloat16", tied_embedding=tied))
    params = init_train_state(jax.random.key(0), model, optax.identity()).params
    grads = jax.grad(lambda p: _loss(p, jax.tree.map(lambda x: x[0], batch()), model)[0])(params)
    sent = _as_computed(grads, "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x.astype(jnp.float32), sent), grads)
    size_sent, size = (sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (sent, grads))
    assert size_sent < 0.6 * size


def spoilt_by_a_token(good: Batch) -> Batch:
    """An id beyond the vocabulary in the third micro-batch; its embedding is NaN."""
    return good._replace(tokens=good.tokens.at[2, 1, 4].set(SMALL.vocab_size))


def test_a_batch_that_gives_nan_changes_nothing_and_is_counted_and_named():
    state, step = compiled()
    after_one, _ = step(state, batch(4))
    skipped, metrics = step(after_one, spoilt_by_a_token(batch(4)))
    assert np.isnan(metrics.loss) and (skipped.skipped.total, skipped.skipped.in_a_row, skipped.step) == (1, 1, 2)
    assert (metrics.skipped, metrics.skipped_in_a_row, metrics.bad_micro_batch) == (1, 1, 2)
    assert metrics.bad_gradient >= 0
    for a, b in ((skipped.params, after_one.params), (skipped.opt_state, after_one.opt_state)):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    (went_on, metrics), (undisturbed, _) = step(skipped, batch(4)), step(after_one, batch(4))
    assert (metrics.skipped, metrics.skipped_in_a_row, metrics.bad_micro_batch, metrics.bad_gradient) == (1, 0, -1, -1)
    jax.tree.map(np.testing.assert_array_equal, went_on.params, undisturbed.params)
    jax.tree.map(np.testing.assert_array_equal, went_on.opt_state, undisturbed.opt_state)


def test_an_update_that_leaves_the_finite_numbers_changes_nothing_and_is_named():
    state, _ = compiled()
    too_fast = dataclasses.replace(OPTIMIZER, start_lr=3e38, peak_lr=3e38, warmup_steps=0, weight_decay=10.0)
    optimizer = make_optimizer(too_fast, 50)
    step = jax.jit(functools.partial(train_step, model=MesaNet(model_config(("mesa",))), optimizer=optimizer))
    found, metrics = step(state, batch())
    assert np.isfinite(metrics.loss) and np.isfinite(metrics.grad_norm) and metrics.bad_gradient == -1
    assert metrics.skipped == 1 and metrics.bad_parameter >= 0
    jax.tree.map(np.testing.assert_array_equal, found.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, found.opt_state, state.opt_state)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("peak_lr", float("nan"), "peak_lr=nan must be finite"),
        ("weight_decay", float("inf"), "weight_decay=inf must be finite"),
        ("final_fraction", -5.0, "final_fraction=-5.0 must not be negative"),
        ("warmup_steps", 2.5, "warmup_steps=2.5 must be a whole number"),
    ],
)
def test_settings_of_the_optimizer_that_cannot_be_right_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**{field: value})


@jax.custom_vjp
def nan_backwards(x):
    """The identity, with a gradient of NaN."""
    return x


nan_backwards.defvjp(lambda x: (x, None), lambda _, dx: (jnp.full_like(dx, jnp.nan),))


@pytest.mark.parametrize("place", ["one number of its output", "its gradient to the ridge"])
def test_a_nan_of_the_kernel_changes_nothing_and_is_named(monkeypatch, place):
    mesa_chunk, forward = pallas_kernels.mesa_chunk, "output" in place

    def broken(q, k, v, log_decay, beta, ridge, state, **choices):
        out, *rest = mesa_chunk(q, k, v, log_decay, beta, ridge if forward else nan_backwards(ridge), state, **choices)
        return (out.at[0, 3, 1, 5].set(jnp.nan) if forward else out, *rest)

    monkeypatch.setattr(pallas_kernels, "mesa_chunk", broken)
    state, _ = compiled()
    model, optimizer = MesaNet(SMALL), make_optimizer(OPTIMIZER, 50)
    found, metrics = jax.jit(functools.partial(train_step, model=model, optimizer=optimizer))(state, batch())
    jax.tree.map(np.testing.assert_array_equal, found.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, found.opt_state, state.opt_state)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)]
    assert metrics.skipped == 1 and metrics.bad_micro_batch == (0 if forward else -1)
    assert forward or "ridge" in names[int(metrics.bad_gradient)]


@pytest.mark.parametrize("pattern", [("mesa",), ("attention",)], ids="+".join)
def test_a_model_learns_a_batch_by_heart(pattern):
    state, step = compiled(pattern)
    losses = []
    for _ in range(50):
        state, metrics = step(state, batch())
        losses.append(float(metrics.loss))
    assert losses[0] > 3
    assert losses[-1] < 0.5


def test_solver_metrics_are_true_for_mesa_and_nan_without_it():
    _, metrics = compiled()[1](compiled()[0], batch())
    assert 0 < metrics.solver_steps <= SMALL.solver.max_steps
    assert 0 < metrics.solver_residual <= 1.001 * SMALL.solver.tolerance
    _, metrics = compiled(("attention",))[1](compiled(("attention",))[0], batch())
    assert np.isnan(metrics.solver_steps) and np.isnan(metrics.solver_residual)


def test_weight_decay_spares_embedding_norms_biases_and_ridge():
    config = dataclasses.replace(OPTIMIZER, weight_decay=0.5, start_lr=1e-2, warmup_steps=0)
    model = MesaNet(SMALL)
    optimizer = make_optimizer(config, 50)
    state = init_train_state(jax.random.key(0), model, optimizer)
    nothing = jax.tree.map(jnp.zeros_like, state.params)
    updates, _ = optimizer.update(nothing, state.opt_state, state.params)
    decayed = {path[-1].key for path, u in jax.tree_util.tree_leaves_with_path(updates) if jnp.abs(u).max() > 0}
    assert decayed == {"kernel", "taps"}


def test_the_schedule_warms_up_to_the_peak_and_ends_at_a_tenth():
    schedule = learning_rate(OptimizerConfig(peak_lr=1e-3, warmup_steps=10), 100)
    assert float(schedule(0)) == pytest.approx(1e-6, rel=1e-4)
    assert float(schedule(5)) == pytest.approx(5.005e-4)
    assert float(schedule(10)) == pytest.approx(1e-3)
    assert float(schedule(55)) == pytest.approx(5.5e-4)
    assert float(schedule(100)) == pytest.approx(1e-4)


def test_gradients_are_clipped_to_norm_one_before_they_enter_the_moments():
    state, _ = compiled()
    huge = jax.tree.map(lambda x: 1e6 * jnp.ones_like(x), state.params)
    _, opt_state = make_optimizer(OPTIMIZER, 50).update(huge, state.opt_state, state.params)
    first_moment = optax.tree_utils.tree_get(opt_state, "mu")
    assert float(optax.tree.norm(first_moment)) == pytest.approx(1 - OPTIMIZER.b1, rel=1e-5)


def test_flops_agree_with_the_specification():
    # solver of the 1b model at 30 steps and key size 128 is 0.661 GFLOP a token; the rest is twice the parameters
    config = dataclasses.replace(SIZES["1b"], solver=SolverConfig(preconditioner="none"))
    steps = forward_flops(config, 2048, 30) - forward_flops(config, 2048, 0)
    assert 30 / 31 * steps == pytest.approx(0.661e9, rel=2e-3)  # the last application is the residual that is reported
    solver = forward_flops(config, 2048) - forward_flops(config, 2048, 0)
    dense = 2 * 937.5e6
    assert forward_flops(config, 2048, 0) == pytest.approx(dense, rel=0.05)
    assert training_flops(config, 2048) == pytest.approx(3 * forward_flops(config, 2048, 0) + 2 * solver)


def test_both_solves_of_a_training_step_share_one_factor():
    plain, nested = (
        dataclasses.replace(SIZES["1b"], solver=SolverConfig(preconditioner=name)) for name in ("none", "nested")
    )
    factor = forward_flops(nested, 2048, 5) - forward_flops(plain, 2048, 5)
    # 2.375 applications of 66 kFLOP for each of 28 layers of 12 heads
    assert factor == pytest.approx(28 * 12 * 2.375 * 65_536, rel=1e-3)
    assert training_flops(nested, 2048, 5) - training_flops(plain, 2048, 5) == pytest.approx(factor)
    assert forward_flops(nested, 1, 5) == forward_flops(plain, 1, 5)  # a single token has nobody to share one with
