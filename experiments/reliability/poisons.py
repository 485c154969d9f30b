"""NaN from four places: is the step skipped, counted and named, does the run stop in time, and can it go on?"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import mesanet_jax.train
import pallas_kernels
from experiments import loop, programs
from experiments.cli import UserError
from experiments.mesanet.pretrain import TINY
from experiments.reliability.config import ReliabilityConfig
from experiments.reliability.courses import logged, same
from experiments.reliability.launched import write_corpus
from experiments.runs import RunConfig, open_run
from mesanet_jax.loss import Batch

ONCE, FIRST, LAST = 5, 10, 12  # one step that is poisoned, and a stretch of them
BAD = (ONCE, *range(FIRST, LAST + 1))
ROW = 3  # of a batch, where there is a poisoned token

Poison = Callable[[jax.Array], contextlib.AbstractContextManager]


class Nans(NamedTuple):
    """What came of all poisons."""

    failures: list[str]
    skipped: dict[str, list[str]]  # poison -> what the logbook said of each step that was skipped

    @property
    def found(self) -> str:
        """The figures in a sentence or two."""
        skipped, poisoned = sum(map(len, self.skipped.values())), len(self.skipped) * len(BAD)
        return (
            f"{skipped} of {poisoned} poisoned steps skipped, counted and named, in {len(self.skipped)} runs. Each run "
            f"stopped after {LAST + 1 - FIRST} in a row with a good checkpoint, and went on from there."
        )


def trial(config: ReliabilityConfig, scratch: Path, folder: Path) -> Nans:
    """Poisons a run in one place after the other."""
    corpus = write_corpus(scratch / "corpus")
    failures, skipped = [], {}
    for place in PLACES:
        run = small(corpus, folder / place.replace(" ", "-"), scratch / "compiled")
        with (folder / "printed.txt").open("a") as printed, contextlib.redirect_stdout(printed):
            failures += [f"{place}: {wrong}" for wrong in poison(run, place)]
        skipped[place] = [entry["why_skipped"] for entry in logged(run.output) if "why_skipped" in entry]
        print(f"  {place}: {next(iter(skipped[place]), 'nothing was skipped')}", flush=True)
    return Nans(failures, skipped)


def small(corpus: Path, output: Path, compiled: Path | None = None) -> RunConfig:
    """Returns the config of a run of a few steps."""
    sizes = {"num_layers": 1, "model_dim": 32, "num_heads": 2, "key_dim": 16, "value_dim": 16}
    return dataclasses.replace(
        TINY,
        output=output,
        model=dataclasses.replace(TINY.model, **sizes),
        data=dataclasses.replace(TINY.data, source=(str(corpus),), length=32, batch_size=4),
        num_steps=24,
        micro_batches=2,
        save_every=4,
        keep=3,
        eval_every=0,
        eval_batches=1,
        max_skips=LAST + 1 - FIRST,
        compile_cache=str(compiled or ""),
    )


def poison(config: RunConfig, place: str) -> Iterator[str]:
    """Trains with a poison until the run stops, then on until it is over; says what is wrong with either."""
    with poisoned(place, config):
        try:
            loop.train(config)
            yield "it did not stop"
        except UserError as error:
            if f"max_skips: {config.max_skips} steps in a row" not in str(error):
                yield f"it stopped because {error}"
        stopped = open_run(config.output)
        yield from _not_finite(stopped.params, "when it stopped")
        loop.train(dataclasses.replace(config, max_skips=100))
    yield from _wrong_entries(config, PLACES[place].name)
    ended = open_run(config.output)
    yield from _not_finite(ended.params, "at the end")
    if same(ended.params, stopped.params):
        yield "it did not go on learning"


def _not_finite(params, when: str) -> Iterator[str]:
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(params)):
        yield f"there were parameters that are not finite {when}"


def _wrong_entries(config: RunConfig, name: str) -> Iterator[str]:
    """Says which lines of the logbook are not those of a run that skipped just the poisoned steps."""
    entries = logged(config.output)
    if len(entries) != config.num_steps:
        yield f"there are {len(entries)} steps in the logbook"
    for entry in entries:
        step, bad = entry["step"], entry["step"] in BAD
        if entry["skipped"] != sum(step >= other for other in BAD):
            yield f"at step {step} {entry['skipped']} had been skipped"
        if bad != ("why_skipped" in entry) or (bad and name.format(row=ROW + 4 * step) not in entry["why_skipped"]):
            yield f"of step {step} the logbook says {entry.get('why_skipped', 'nothing')}"
        if not bad and entry["loss"] is None:
            yield f"the loss of step {step} is not finite"


class Place(NamedTuple):
    """Where the NaN comes from."""

    module: object  # the function that is replaced
    function: str
    poisoned: Callable  # (function, whether this step is bad, config) -> the function with the poison
    name: str  # what the logbook says, where {row} is the poisoned row


@contextlib.contextmanager
def poisoned(place: str, config: RunConfig) -> Iterator[None]:
    """Puts the poison into whatever is compiled, or read, meanwhile."""
    step = programs.train_step
    bad: list[Any] = [np.bool_(False)]  # of numpy: outside of a step it has to be a constant

    def watched(state, batch, **parts):
        bad[0] = jnp.isin(state.step, np.array(BAD))
        try:
            return step(state, batch, **parts)
        finally:
            bad[0] = np.bool_(False)

    module, name, replaced, _ = PLACES[place]
    function = functools.partial(replaced, getattr(module, name), lambda: bad[0], config)
    with mock.patch.object(programs, "train_step", watched), mock.patch.object(module, name, function):
        yield


def _loss(function, bad, config, *args):
    return jnp.where(bad(), jnp.nan, function(*args))


@jax.custom_vjp
def _nan_backwards(x, bad):
    """The identity, whose gradient is NaN if it is bad."""
    return x


_nan_backwards.defvjp(lambda x, bad: (x, bad), lambda bad, dx: (jnp.where(bad, jnp.nan, dx), None))


def _gradient(function, bad, config, q, k, v, log_decay, beta, ridge, *state, **choices):
    return function(q, k, v, log_decay, beta, _nan_backwards(ridge, bad()), *state, **choices)


def _kernel(function, bad, config, *args, **choices):
    out, *rest = function(*args, **choices)
    return out.at[0, 3, 1, 5].set(jnp.where(bad(), jnp.nan, out[0, 3, 1, 5])), *rest


class _Rows:
    """Rows of which some hold a token beyond the vocabulary."""

    def __init__(self, rows, config: RunConfig):
        self._rows, self._size, self._beyond = rows, config.data.batch_size, config.model.vocab_size

    def __getitem__(self, index: int) -> Batch:
        tokens, ids = self._rows[index]
        step, row = divmod(index, self._size)
        if row == ROW and step in BAD:
            tokens = np.where(np.arange(tokens.size) == 4, self._beyond, tokens)
        return Batch(tokens, ids)


def _rows(function, bad, config, *args):
    return _Rows(function(*args), config)


PLACES = {
    "the loss": Place(mesanet_jax.train, "total_loss", _loss, "the loss of micro-batch 0"),
    "a gradient": Place(pallas_kernels, "mesa_chunk", _gradient, "the gradient of params/"),
    "a token": Place(loop, "shuffled_rows", _rows, "to {row})"),
    "a kernel": Place(pallas_kernels, "mesa_chunk", _kernel, "the loss of micro-batch 0"),
}
