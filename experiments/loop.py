"""Training in reading order: data -> step -> log -> checkpoint.

A run is exact: started again after any interruption, it computes bit for bit what it would have computed without one.
Batch n is a function of n, a checkpoint holds everything else, and the logbook never runs behind the checkpoint.
"""

import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments.checkpoints import Checkpoints
from experiments.cli import UserError
from experiments.data import held_out_text, ordered_batches, shuffled_batches, training_text
from experiments.logbook import Logbook
from experiments.mesh import make_mesh, matmul_peak
from experiments.programs import Programs, check_fits
from experiments.runs import RunConfig, check_run, create_run
from mesanet_jax.flops import training_flops
from mesanet_jax.model import num_parameters
from mesanet_jax.train import (
    Metrics,
    TrainState,
    learning_rate,
)


def train(config: RunConfig) -> TrainState:
    """Trains, or goes on training, until config.num_steps are done; returns the final state.

    Raises:
      UserError: config, data, folder or devices do not fit, or the loss stopped being finite; what was saved stays.
    """
    tokenizer = check_run(config)
    mesh = make_mesh(config.mesh)
    check_fits(config, mesh)
    text = training_text(config.data, tokenizer)
    training = shuffled_batches(text, config.data)
    held_out = ordered_batches(held_out_text(config.data, tokenizer), config.data.batch_size)
    programs = Programs.make(config, mesh)
    create_run(config, text.fingerprint)  # from here on things are written
    with jax.set_mesh(mesh), Checkpoints(config.output / "checkpoints", config.keep) as checkpoints:
        state, first = _start(config, programs, checkpoints)
        with Logbook(config.output / "log.jsonl", first) as logbook, _Console(config, first) as console:
            console.say(_introduction(config, state, mesh, first))
            journal = _Journal(config, logbook, console, matmul_peak(mesh, config.model.dtype))
            for step in range(first, config.num_steps):
                batch = programs.place(training[step], config.micro_batches)
                begin = time.perf_counter()
                state, metrics = programs.train(state, batch)
                journal.note(step, metrics, begin)
                done = step + 1 == config.num_steps
                if done or (config.eval_every and (step + 1) % config.eval_every == 0):
                    journal.wait()
                    journal.settle(held_out_loss=_held_out_loss(state, held_out, programs, config.eval_batches))
                if done or (step + 1) % config.save_every == 0:
                    journal.settle()  # the logbook first, so that it never lacks a step that the checkpoint has
                    checkpoints.save(step + 1, state)
    return state


def _start(config: RunConfig, programs: Programs, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    """Returns the newest state of the run and the number of the step to do next."""
    latest = checkpoints.latest_step()
    if latest is None:
        return programs.init(jax.random.key(config.seed)), 0
    return checkpoints.restore(latest, programs.state_shapes()), latest


def _held_out_loss(state: TrainState, held_out, programs: Programs, num_batches: int) -> float:
    """Returns nats per target over the first held-out batches, the same ones every time."""
    batches = (programs.place(held_out[i], 1) for i in range(min(num_batches, len(held_out))))
    losses, targets = zip(*jax.device_get([programs.loss(state.params, batch) for batch in batches]), strict=True)
    return float(np.sum(losses, dtype=np.float64) / np.sum(targets, dtype=np.float64))


class _Pending(NamedTuple):
    """A step whose results may still be on their way."""

    step: int
    metrics: Metrics
    begin: float  # when it was handed to the device


class _Journal:
    """Writes each step's entry one step late, so that the device never waits for the terminal."""

    def __init__(self, config: RunConfig, logbook: Logbook, console: "_Console", peak: float):
        self._config, self._logbook, self._console, self._peak = config, logbook, console, peak
        self._schedule = learning_rate(config.optimizer, config.num_steps)
        self._pending: _Pending | None = None
        self._end = 0.0  # when the last step was done

    def note(self, step: int, metrics: Metrics, begin: float) -> None:
        """Takes in the step just handed to the device, and writes the one before."""
        self.settle()
        self._pending = _Pending(step, metrics, begin)

    def wait(self) -> None:
        """Waits for the step taken in last; what follows (an evaluation, say) does not count into its time."""
        if self._pending is not None and not isinstance(self._pending.metrics.loss, float):
            metrics = Metrics(*(float(x) for x in jax.device_get(self._pending.metrics)))
            begin, self._end = max(self._pending.begin, self._end), time.perf_counter()
            self._pending = _Pending(self._pending.step, metrics, begin)

    def settle(self, **more: float) -> None:
        """Writes the step taken in last, with more measurements of it."""
        self.wait()
        if self._pending is None:
            return
        entry = self._entry(self._pending) | more
        self._pending = None
        self._logbook.write(entry)
        self._console.step(entry)
        if not np.isfinite([entry["loss"], entry["grad_norm"]]).all():
            raise UserError(
                f"optimizer.peak_lr: the loss or gradient of step {entry['step']} is not finite, and nothing was saved "
                f"after it; start again with a new --output and a rate below {self._config.optimizer.peak_lr}."
            )

    def _entry(self, done: _Pending) -> dict[str, Any]:
        data, steps = self._config.data, done.metrics.solver_steps
        tokens_per_second = data.batch_size * data.length / (self._end - done.begin)
        flops = training_flops(self._config.model, data.length, None if np.isnan(steps) else steps)
        return {
            "step": done.step,
            **done.metrics._asdict(),
            "learning_rate": float(self._schedule(done.step)),
            "tokens_per_second": tokens_per_second,
            "flops_utilisation": tokens_per_second * flops / self._peak,
        }


class _Console:
    """A progress bar on a terminal, otherwise a line every so many steps."""

    def __init__(self, config: RunConfig, first: int):
        self._config = config
        self._bar = tqdm(
            total=config.num_steps, initial=first, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.write(text)

    def step(self, entry: dict[str, Any]) -> None:
        """Shows a step."""
        text = f"loss {entry['loss']:.4f}"
        if "held_out_loss" in entry:
            text += f", held out {entry['held_out_loss']:.4f}"
        self._bar.set_postfix_str(text)
        self._bar.update()
        step = entry["step"] + 1
        if self._bar.disable and (step % self._config.log_every == 0 or "held_out_loss" in entry):
            solver = "" if np.isnan(entry["solver_steps"]) else f", {entry['solver_steps']:.1f} solver steps"
            print(
                f"step {step}/{self._config.num_steps}  {text}, {entry['tokens_per_second']:,.0f} tokens/s{solver}",
                flush=True,
            )

    def __enter__(self) -> "_Console":
        return self

    def __exit__(self, *error) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


def _introduction(config: RunConfig, state: TrainState, mesh: jax.sharding.Mesh, first: int) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    begin = f"goes on at step {first}" if first else "starts"
    return (
        f"{config.output} {begin}: {num_parameters(state.params):,} parameters, {config.model.num_layers} layers of "
        f"{' + '.join(config.model.pattern)}, {mesh.size} x {kind} ({sizes})"
    )
