"""A run is a folder: config, fingerprints, tokenizer, log.jsonl and checkpoints. This file creates and opens it."""

import contextlib
import dataclasses
import fcntl
import json
import os
import time
import typing
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding

from experiments.checkpoints import Checkpoints
from experiments.cli import UserError
from experiments.data import DataConfig
from experiments.hosts import HostsConfig
from experiments.mesh import MeshConfig
from experiments.tokenizers import Tokenizer, load_tokenizer
from mesanet_jax import MesaNet, MesaNetConfig
from mesanet_jax.train import OptimizerConfig, init_train_state, make_optimizer

# Fields that a run may go on with other values of. `eval_every` and `eval_batches` say what is evaluated; another mesh,
# which other hosts make, adds numbers up in another order, so the curve goes on with other rounding. The rest leaves
# every bit as it is.
FREE_FIELDS = {"output", "mesh", "hosts", "save_every", "keep", "log_every", "eval_every", "eval_batches"} | {
    "max_skips",
    "grace_seconds",
    "compile_cache",
    "profile_steps",
    "track",
}
DRAFT = "config.draft"
LEFT_BEHIND = {DRAFT, "tokenizer.json", "fingerprints.json"}  # by a start that was killed, the draft first
HIDDEN = {".writable", ".claimed"}
PATIENCE = 60.0  # seconds until what one host has written is seen by the others, on a network file system


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run.

    Attributes:
      output: folder of the run; if it holds one already, that run goes on from its last checkpoint.
      model: the architecture.
      data: the text.
      optimizer: AdamW and its schedule.
      mesh: how devices share the work.
      num_steps: optimizer steps; the schedule ends there.
      micro_batches: parts that a batch is computed in, one after another, to save memory.
      seed: initial parameters.
      save_every: steps between checkpoints.
      keep: checkpoints that are kept.
      eval_every: steps between held-out losses; 0 only at the end.
      eval_batches: held-out batches that loss is taken over.
      log_every: steps between lines on the console.
      max_skips: steps in a row that may be skipped, because something was not finite, before the run stops.
      hosts: the processes of the run.
      grace_seconds: time after SIGTERM or Ctrl-C to save everything in.
      compile_cache: folder that compiled programs are kept in between starts; empty keeps none.
      profile_steps: first step to profile and the one after the last, into the run's folder `profile`.
      track: where the logbook is copied to, live.
    """

    output: Path = Path("runs/tiny")
    model: MesaNetConfig = MesaNetConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    num_steps: int = 28610
    micro_batches: int = 1
    seed: int = 0
    save_every: int = 1000
    keep: int = 2
    eval_every: int = 1000
    eval_batches: int = 16
    log_every: int = 10
    max_skips: int = 5
    hosts: HostsConfig = HostsConfig()
    grace_seconds: float = 25.0
    compile_cache: str = ""
    profile_steps: tuple[int, int] | None = None
    track: tuple[Literal["tensorboard", "trackio"], ...] = ()

    def __post_init__(self):
        for field in ("num_steps", "micro_batches", "save_every", "keep", "eval_batches", "log_every", "max_skips"):
            if getattr(self, field) < 1:
                raise ValueError(f"RunConfig: {field}={getattr(self, field)} must be at least 1.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"RunConfig: seed={self.seed} must lie between 0 and 2**32 - 1.")
        if self.eval_every < 0:
            raise ValueError(f"RunConfig: eval_every={self.eval_every} is negative; 0 evaluates only at the end.")
        if not self.grace_seconds > 0:
            raise ValueError(f"RunConfig: grace_seconds={self.grace_seconds} must be positive.")
        if self.profile_steps and not 0 <= self.profile_steps[0] < self.profile_steps[1]:
            raise ValueError(f"RunConfig: profile_steps={self.profile_steps} must be a step and a later one.")
        if self.data.batch_size % self.micro_batches:
            raise ValueError(
                f"RunConfig: micro_batches={self.micro_batches} does not divide data.batch_size={self.data.batch_size}."
            )


class Run(NamedTuple):
    """A trained model with all that is needed to use it."""

    name: str
    path: Path
    config: RunConfig
    model: MesaNet
    params: dict
    tokenizer: Tokenizer
    step: int


def open_run(path: Path, step: int | None = None) -> Run:
    """Loads the model of a run at a checkpoint (by default the last), on one device.

    Raises:
      UserError: the folder is not a run, or has no such checkpoint.
    """
    config = _read_config(path)
    model = MesaNet(config.model)
    tokenizer = stored_tokenizer(path, config)
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    shapes = jax.eval_shape(lambda key: init_train_state(key, model, optimizer), jax.random.key(0))
    here = SingleDeviceSharding(jax.devices()[0])  # wherever it was trained
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    with Checkpoints.open(path / "checkpoints") as checkpoints:
        found = checkpoints.newest(like, print) if step is None else (checkpoints.restore(step, like), step)
    if found is None:
        raise UserError(f"run: {path} has no checkpoint yet.")
    state, step = found
    return Run(path.name or str(path), path, config, model, state.params, tokenizer, step)


def check_run(config: RunConfig) -> Tokenizer:
    """Checks that the output is new or holds the same run, and returns the run's tokenizer; writes nothing.

    Raises:
      UserError: the folder holds something else or another run, or the tokenizer does not fit.
    """
    folder = config.output
    if (folder / "config.json").exists():
        _check_same(_read_config(folder), config)
        tokenizer = stored_tokenizer(folder, config)
    else:
        names = {p.name for p in folder.iterdir()} - HIDDEN if folder.is_dir() else set()
        if names - (LEFT_BEHIND if DRAFT in names else set()):
            raise UserError(f"output: {folder} is not empty and not a run; give a new folder.")
        tokenizer = load_tokenizer(config.data.tokenizer, config.data.bos_token)
    if config.model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size: {config.model.vocab_size} is below the {tokenizer.vocab_size} tokens of the tokenizer; "
            f"pass --model.vocab-size {tokenizer.vocab_size}."
        )
    return tokenizer


def create_run(config: RunConfig, text: int) -> None:
    """Makes the folder of a checked run, its config last; or checks that the run in it was trained on the same text.

    Args:
      config: the run.
      text: fingerprint of the text it is trained on.

    Raises:
      UserError: the folder cannot be written, or the text has changed.
    """
    folder = config.output
    _check_writable(folder)
    if (folder / "config.json").exists():
        _check_text(config, text)
        return
    draft = folder / DRAFT
    draft.write_text(json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n")
    tokenizer = b""
    if config.data.tokenizer:
        tokenizer = Path(config.data.tokenizer).read_bytes()
        (folder / "tokenizer.json").write_bytes(tokenizer)
    fingerprints = {"text": text, "tokenizer": zlib.crc32(tokenizer)}
    (folder / "fingerprints.json").write_text(json.dumps(fingerprints))
    os.replace(draft, folder / "config.json")


def join_run(config: RunConfig, text: int) -> None:
    """Checks on another host that the folder is the one in which the first host has made the run.

    Raises:
      UserError: it is not, or this host reads another text.
    """
    deadline = time.monotonic() + PATIENCE
    while not (config.output / "config.json").exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"output: {config.output.absolute()} of this host is not the folder that host 0 writes to; give one "
                f"that all hosts share."
            )
        time.sleep(0.5)
    _check_text(config, text)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a folder; the system forgets the claim of a process that dies.

    Raises:
      UserError: another one is at it.
    """
    with (folder / ".claimed").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"output: another process trains in {folder}; end it, or give another folder.") from None
        except OSError:  # a file system without locks
            pass
        yield


def _check_text(config: RunConfig, text: int) -> None:
    if _fingerprints(config.output)["text"] != text:
        raise UserError(
            f"data.source: the text of {' + '.join(config.data.source)} is not the one that the run in {config.output} "
            f"was started with; bring it back or give another --output."
        )


def stored_tokenizer(folder: Path, config: RunConfig) -> Tokenizer:
    """Returns the tokenizer that a run was trained with, from the copy in its folder.

    Raises:
      UserError: the copy is not what it was.
    """
    if not config.data.tokenizer:
        return load_tokenizer("")
    file = folder / "tokenizer.json"
    if not file.is_file() or zlib.crc32(file.read_bytes()) != _fingerprints(folder)["tokenizer"]:
        raise UserError(f"tokenizer: {file} is not the file the checkpoint was trained with; put that back.")
    return load_tokenizer(str(file), config.data.bos_token)


def _fingerprints(folder: Path) -> dict[str, int]:
    file = folder / "fingerprints.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        raise UserError(f"run: {file} is missing or damaged; put it back, or give another --output.") from None


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError as error:
        raise UserError(f"output: {folder} cannot be written ({error.strerror}); give another folder.") from None


def _check_same(saved: RunConfig, config: RunConfig) -> None:
    """Raises for the first field that differs between a run and the command that would go on with it."""
    before, now = flat(saved), flat(config)
    for field, value in now.items():
        if field.split(".")[0] not in FREE_FIELDS and before[field] != value:
            raise UserError(
                f"{field}: the run in {saved.output} was started with {before[field]!r}, not {value!r}; "
                f"give the same value or another --output."
            )


def flat(config, prefix: str = "") -> dict[str, Any]:
    """Returns the values of a nested dataclass by their names on the command line."""
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name
        values |= flat(value, name + ".") if dataclasses.is_dataclass(value) else {name: value}
    return values


def _read_config(folder: Path) -> RunConfig:
    file = folder / "config.json"
    try:
        return dataclasses.replace(_build(RunConfig, json.loads(file.read_text(encoding="utf-8"))), output=folder)
    except FileNotFoundError:
        raise UserError(f"run: {folder} is not a run, it has no config.json.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"run: {file} is not the config of a run of this version ({error}).") from None


def _build(cls, values: dict[str, Any]):
    """Turns the dictionary of a nested frozen dataclass back into it."""
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = _build(hint, value)
        elif isinstance(value, list):
            value = tuple(value)
        elif typing.get_origin(hint) is tuple and isinstance(value, str):
            value = (value,)  # of a version that knew only one
        elif hint is Path:
            value = Path(value)
        arguments[name] = value
    return cls(**arguments)
