"""What a run tells while it runs: each step into the logbook, onto the console, to the trackers."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from tqdm import tqdm

from experiments import goodput, hosts
from experiments.cli import UserError
from experiments.logbook import Logbook
from experiments.mesh import matmul_peak
from experiments.runs import RunConfig, flat
from experiments.trackers import Trackers
from mesanet_jax.flops import training_flops
from mesanet_jax.model import num_parameters
from mesanet_jax.train import Metrics, learning_rate


class _Pending(NamedTuple):
    """A step whose results may still be on their way."""

    step: int
    metrics: Metrics
    said: Any  # by all hosts
    begin: float  # when it was handed to the devices
    waited: float  # seconds that they had nothing to do before


class Journal:
    """Tells all who want to know; a step one step late, so that the devices never wait for the terminal."""

    def __init__(self, config: RunConfig, params: Any, mesh: jax.sharding.Mesh, done: int, began: float):
        """Opens the logbook of a run that has done so many steps, in a process that began at a time since 1970."""
        silent = not hosts.first()
        self._config, self._began, self._done = config, began, done
        self._names = ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        # all of them now: asked for one by one, each would queue behind a training step on the devices
        schedule = learning_rate(config.optimizer, config.num_steps)
        self._rates = np.asarray(jax.vmap(schedule)(np.arange(config.num_steps, dtype=np.int32)))
        self._exchange = hosts.Exchange(mesh)
        last_sign = goodput.last_sign(config.output)
        self._logbook = None if silent else Logbook(config.output / "log.jsonl", done)
        self._events = goodput.Events(config.output, silent)
        self._evaluated = hosts.from_first(self._logbook.last_evaluation if self._logbook else 0)
        self._trackers = Trackers(() if silent else config.track, config.output, config.output.name, flat(config), done)
        self._console = Console(config, done, silent)
        self._events.write("start", process_start=began, last_sign=last_sign, step=done, devices=mesh.size)
        self._peak = matmul_peak(mesh, config.model.dtype)
        self._pending: _Pending | None = None
        self._begin = self._end = 0.0  # of the last step
        self._profiling = False
        self.signal = 0  # number of the one that asks this host, or another, to leave
        self.say(_introduction(config, params, mesh, done))

    def say(self, text: str) -> None:
        """Prints a line."""
        self._console.say(text)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Takes the time until here as that of the start, and inside as that of the compiler."""
        start, begin = time.time() - self._began, time.perf_counter()
        with _counting_cached_programs() as cached:
            yield
        seconds = time.perf_counter() - begin
        self._events.write("compiled", start_seconds=start, compile_seconds=seconds, from_cache=len(cached))
        kept = f" ({len(cached)} programs kept from before)" if cached else ""
        self.say(f"ready for the first step after {start + seconds:.1f} s, {seconds:.1f} s of them compiling{kept}")

    def begin(self, step: int) -> None:
        """Takes the time when a step is handed to the devices."""
        window = self._config.profile_steps
        if window and window[0] <= step < window[1] and not self._profiling:
            self.wait()
            jax.profiler.start_trace(self._config.output / "profile")
            self._profiling = True
        self._begin = time.perf_counter()

    def note(self, step: int, metrics: Metrics, signal: int) -> None:
        """Takes in the step just handed to the devices and the signal to leave, if any; writes the step before."""
        # Only where the step before was waited for, because there was no batch yet, did the devices have nothing to do.
        idle = self._pending is not None and isinstance(self._pending.metrics.loss, float)
        waited = self._begin - self._end if idle else 0.0
        self.settle()
        self._pending = _Pending(step, metrics, self._exchange.say(signal, waited), self._begin, waited)
        if self._config.profile_steps and step + 1 >= self._config.profile_steps[1]:
            self._stop_profile()

    def wait(self) -> None:
        """Waits for the step taken in last; what follows (an evaluation, say) does not count into its time."""
        if self._pending is not None and not isinstance(self._pending.metrics.loss, float):
            metrics = Metrics(*(float(x) for x in jax.device_get(self._pending.metrics)))
            begin, self._end = max(self._pending.begin, self._end), time.perf_counter()
            self._pending = self._pending._replace(metrics=metrics, begin=begin)

    def settle(self) -> None:
        """Writes the step taken in last.

        Raises:
          UserError: more steps in a row were skipped than may be.
        """
        self.wait()
        if self._pending is None:
            return
        done, self._pending = self._pending, None
        word = self._exchange.hear(done.said)
        self.signal = self.signal or word.signal
        entry = self._entry(done, word)
        self._write(entry)
        self._check_skips(entry)

    @contextlib.contextmanager
    def beside_steps(self, event: str, done: int) -> Iterator[None]:
        """Writes what is pending, to the disk itself, then times what the steps have to wait for."""
        self.settle()
        if self._logbook is not None:
            self._logbook.sync()
        begin = time.perf_counter()
        yield
        self._events.write(event, step=done, seconds=time.perf_counter() - begin)

    def evaluated(self, done: int) -> bool:
        """True if the state after so many steps has been evaluated."""
        return self._evaluated == done

    def evaluate(self, done: int, held_out_loss: float | None) -> None:
        """Writes the evaluation of the state after so many steps, if there is one."""
        if held_out_loss is not None:
            self._evaluated = done
            self._write({"step": done - 1, "held_out_loss": held_out_loss})

    def end(self, done: int, signal: int) -> None:
        """Says what became of the time, and what to do if a signal of that number was the end."""
        memory = goodput.peak_memory()
        self._events.write("end", step=done, signal=signal, **memory)
        if hosts.first():
            held = ", ".join(f"{name.split('_')[0]} {size / 2**30:.2f} GiB" for name, size in memory.items())
            with contextlib.suppress(UserError):  # of a damaged file; the training is done all the same
                self.say(f"{goodput.describe(goodput.goodput(self._config.output))}; memory at most: {held}")
        if signal:
            self.say(f"signal {signal}: all {done} steps are saved; the same command goes on")

    def _stop_profile(self) -> None:
        if self._profiling:
            self.wait()
            jax.profiler.stop_trace()
            self._profiling = False
            self.say(f"profile: {self._config.output / 'profile'}")

    def _write(self, entry: dict[str, Any]) -> None:
        if self._logbook is not None:
            self._logbook.write(entry)
        self._trackers.write(entry)
        self._console.show(entry)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self._stop_profile()
        self._console.close()
        self._events.close()
        self._trackers.close()
        if self._logbook is not None:
            self._logbook.close()

    def _entry(self, done: _Pending, word: hosts.Word) -> dict[str, Any]:
        data, metrics, steps = self._config.data, done.metrics, done.metrics.solver_steps
        seconds = self._end - done.begin
        tokens_per_second = data.batch_size * data.length / seconds
        flops = training_flops(self._config.model, data.length, None if np.isnan(steps) else steps)
        measured = {name: x for name, x in metrics._asdict().items() if not name.startswith(("skipped", "bad"))}
        entry = {
            "step": done.step,
            **measured,
            "learning_rate": float(self._rates[int(done.step - metrics.skipped + bool(metrics.skipped_in_a_row))]),
            "skipped": int(metrics.skipped),
            "seconds": seconds,
            "waited_seconds": done.waited,
            "tokens_per_second": tokens_per_second,
            "flops_utilisation": tokens_per_second * flops / self._peak,
        }
        if jax.process_count() > 1:
            entry |= {"slowest_host": word.slowest, "slowest_seconds": word.seconds}
        if metrics.skipped_in_a_row:
            entry |= {"skipped_in_a_row": int(metrics.skipped_in_a_row), "why_skipped": self._reason(done)}
        return entry

    def _reason(self, done: _Pending) -> str:
        """Names what was not finite, as far as it can be told."""
        metrics, size = done.metrics, self._config.data.batch_size
        reasons = []
        if metrics.bad_micro_batch >= 0:
            part = size // self._config.micro_batches
            row = done.step * size + int(metrics.bad_micro_batch) * part
            reasons.append(f"the loss of micro-batch {int(metrics.bad_micro_batch)} (rows {row} to {row + part - 1})")
        if metrics.bad_gradient >= 0:
            reasons.append(f"the gradient of {self._names[int(metrics.bad_gradient)]}")
        if not reasons and metrics.bad_parameter >= 0:
            reasons.append(f"the update of {self._names[int(metrics.bad_parameter)]}")
        return " and ".join(reasons or ["the gradient's norm"]) + " is not finite"

    def _check_skips(self, entry: dict[str, Any]) -> None:
        if entry.get("skipped_in_a_row", 0) < self._config.max_skips:
            return
        raise UserError(
            f"max_skips: {entry['skipped_in_a_row']} steps in a row had to be skipped, the last one, {entry['step']}, "
            f"because {entry['why_skipped']}; the checkpoints before are good: start again with a new --output and "
            f"--optimizer.peak-lr below {self._config.optimizer.peak_lr:g}, or raise --max-skips to go on."
        )


class Console:
    """A progress bar on a terminal, otherwise a line every so many steps; nothing on hosts but the first."""

    def __init__(self, config: RunConfig, first: int, silent: bool = False):
        """Takes the number of the step that comes next."""
        self._config, self._silent = config, silent
        self._bar = tqdm(
            total=config.num_steps,
            initial=first,
            unit="step",
            dynamic_ncols=True,
            disable=silent or not sys.stderr.isatty(),
        )

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self._silent:
            with contextlib.suppress(BrokenPipeError):  # nobody reads any more, which is no reason to stop training
                self._bar.write(text)

    def show(self, entry: dict[str, Any]) -> None:
        """Shows a step or an evaluation."""
        of = f"step {entry['step'] + 1}/{self._config.num_steps}"
        if "held_out_loss" in entry:
            self.say(f"{of}  held out {entry['held_out_loss']:.4f}")
            return
        if "why_skipped" in entry:
            self.say(f"step {entry['step']} skipped: {entry['why_skipped']}")
        text = f"loss {entry['loss']:.4f}"
        self._bar.set_postfix_str(text)
        self._bar.update()
        if self._bar.disable and (entry["step"] + 1) % self._config.log_every == 0:
            self.say(f"{of}  {text}, {_speed(entry)}")

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


@contextlib.contextmanager
def _counting_cached_programs() -> Iterator[list[str]]:
    """Yields a list that grows by one for each program that need not be compiled."""
    found: list[str] = []

    def note(event: str, **_) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            found.append(event)

    jax.monitoring.register_event_listener(note)
    yield found
    jax.monitoring.unregister_event_listener(note)


def _introduction(config: RunConfig, params: Any, mesh: jax.sharding.Mesh, done: int) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    begin = f"goes on at step {done}" if done else "starts"
    begin = "has done all its steps" if done == config.num_steps else begin
    return (
        f"{config.output} {begin}: {num_parameters(params):,} parameters, {config.model.num_layers} layers of "
        f"{' + '.join(config.model.pattern)}, {mesh.size} x {kind} on {jax.process_count()} hosts ({sizes})"
    )


def _speed(entry: dict[str, Any]) -> str:
    parts = [f"{entry['tokens_per_second']:,.0f} tokens/s", f"{entry['flops_utilisation']:.0%} of matmul peak"]
    if not np.isnan(entry["solver_steps"]):
        parts.append(f"{entry['solver_steps']:.1f} solver steps")
    if entry.get("slowest_seconds", 0) > 0.1 * entry["seconds"]:
        parts.append(f"host {entry['slowest_host']} kept all waiting for {entry['slowest_seconds']:.1f} s")
    return ", ".join(parts)
