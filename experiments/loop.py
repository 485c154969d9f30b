"""Training in reading order: data -> step -> log -> checkpoint.

A run is exact: started again after any interruption, it computes bit for bit what it would have computed without one.
The batch of step n is a function of n, a checkpoint holds everything else, and the logbook never runs behind the
checkpoint. On several hosts all do the same, and the first one writes.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import grain
import jax
import numpy as np

from experiments import hosts
from experiments.checkpoints import Checkpoints
from experiments.data import held_out_text, ordered_batches, shuffled_rows, training_text
from experiments.feed import Feed
from experiments.goodput import process_start
from experiments.journal import Journal
from experiments.mesh import keep_compiled, make_mesh
from experiments.preemption import Preempted, Preemption
from experiments.programs import Programs, check_fits, split
from experiments.runs import RunConfig, check_run, claimed, create_run, flat, join_run
from experiments.trackers import check as check_trackers
from mesanet_jax.train import TrainState


def train(config: RunConfig) -> TrainState:
    """Trains, or goes on training, until config.num_steps are done; returns the final state.

    Raises:
      UserError: config, data, folder, hosts or devices do not fit, or too many steps in a row had to be skipped; what
        was saved stays.
      Preempted: a signal asked this process to leave, and everything is saved.
    """
    began = process_start()
    check_trackers(config.track)
    hosts.start(config.hosts, {name: x for name, x in flat(config).items() if name != "hosts.index"})
    with hosts.leaving_with_the_others():
        return _train(config, began)


def _train(config: RunConfig, began: float) -> TrainState:
    keep_compiled(config.compile_cache)
    mesh = make_mesh(config.mesh)
    check_fits(config, mesh)
    text, held_out = hosts.together(lambda: _read(config))
    programs = Programs.make(config, mesh)
    # from here on things are written
    hosts.first_then_others(lambda: create_run(config, text.fingerprint), lambda: join_run(config, text.fingerprint))
    with (
        claimed(config.output) if hosts.first() else contextlib.nullcontext(),
        jax.set_mesh(mesh),
        Checkpoints(config.output / "checkpoints", config.keep) as checkpoints,
        Feed(shuffled_rows(text, config.data), config, programs) as feed,
        hosts.leaving_with_the_others(),
    ):
        state, done = _newest(config, programs, checkpoints)
        with Journal(config, state.params, mesh, done, began) as journal:
            if done == config.num_steps and journal.evaluated(done):
                return state
            compiled = _compile(config, programs, state, journal)
            batches = ordered_batches(held_out, config.data.batch_size)
            with Preemption(config.grace_seconds, jax.process_count() == 1) as preemption:
                run = _Run(config, programs, compiled, batches, feed, checkpoints, journal, preemption)
                state, done = _go_on(run, state, done)
                finished = done == config.num_steps and journal.evaluated(done)
                signal = 0 if finished else journal.signal or preemption.signal
                journal.end(done, signal)
        if signal:
            raise Preempted(signal)
    return state


class _Compiled(NamedTuple):
    """The programs of a run, ready before the first step: afterwards nothing keeps a signal waiting for long."""

    train: Callable
    loss: Callable


class _Run(NamedTuple):
    """All that steps, evaluations and saves need."""

    config: RunConfig
    programs: Programs
    compiled: _Compiled
    held_out: grain.MapDataset
    feed: Feed
    checkpoints: Checkpoints
    journal: Journal
    preemption: Preemption


def _go_on(run: _Run, state: TrainState, done: int) -> tuple[TrainState, int]:
    """Trains until all is done or a signal came; returns the state, which is saved, and the steps that it has done."""
    saved = done
    while _evaluated_if_due(run, state, done) and (batch := _next_batch(run, done)) is not None:
        run.checkpoints.check()  # what cannot be saved is told at once, not when it is time for the next
        run.journal.begin(done)
        state, metrics = run.compiled.train(state, batch)
        run.journal.note(done, metrics, run.preemption.signal)
        done += 1
        if done % run.config.save_every == 0:
            with run.journal.beside_steps("saved", done):  # the logbook first: it lacks no step of a checkpoint
                _save(run, state, done)
            saved = done
    with run.journal.beside_steps("saved", done):
        if saved < done:
            _save(run, state, done)
        run.checkpoints.wait()
    return state, done


def _evaluated_if_due(run: _Run, state: TrainState, done: int) -> bool:
    """Evaluates if it is time to; False if all hosts have heard a signal."""
    if not run.journal.signal and _evaluation_due(run.config, done) and not run.journal.evaluated(done):
        run.journal.settle()
        if not run.journal.signal:
            with run.journal.beside_steps("evaluated", done):
                loss = _held_out_loss(run, state)
            run.journal.evaluate(done, loss)
    return not run.journal.signal


def _next_batch(run: _Run, done: int):
    """Returns the batch of the next step; None after the last one, and where a signal came while it was waited for."""
    if run.feed.empty():
        run.journal.wait()  # so that it is known from when on the devices have nothing to do
    return run.feed.take(done, run.preemption.at_once) if done < run.config.num_steps else None


def _save(run: _Run, state: TrainState, done: int) -> None:
    mesh = jax.sharding.get_abstract_mesh()
    run.checkpoints.save(done, state, mesh=dict(mesh.shape), hosts=jax.process_count())


def _read(config: RunConfig):
    """Returns windows of training and of held-out text, of a run that may begin or go on."""
    tokenizer = check_run(config)
    return training_text(config.data, tokenizer), held_out_text(config.data, tokenizer)


def _newest(config: RunConfig, programs: Programs, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    """Returns the newest state of the run and the number of steps that it has done."""
    found = checkpoints.newest(programs.state_shapes(), hosts.say)
    return found or (programs.init(jax.random.key(config.seed)), 0)


def _compile(config: RunConfig, programs: Programs, state: TrainState, journal: Journal) -> _Compiled:
    with journal.compiling():
        return _Compiled(
            programs.train.lower(state, programs.batch_shapes(config)).compile(),
            programs.loss.lower(state.params, programs.batch_shapes(config, parts=1)).compile(),
        )


def _evaluation_due(config: RunConfig, done: int) -> bool:
    return done == config.num_steps or bool(done and config.eval_every and done % config.eval_every == 0)


def _held_out_loss(run: _Run, state: TrainState) -> float | None:
    """Returns nats per target over the first held-out batches, the same ones every time; None if it was stopped."""
    losses, targets = [], []
    for i in range(min(run.config.eval_batches, len(run.held_out))):
        if run.preemption.at_once():
            return None
        batch = run.programs.place(split(run.held_out[i], 1))
        loss, number = jax.device_get(run.compiled.loss(state.params, batch))
        losses.append(loss)
        targets.append(number)
    return float(np.sum(losses, dtype=np.float64) / np.sum(targets, dtype=np.float64))
