"""A thin wrapper of orbax: save, find, restore."""

import contextlib
import shutil
from pathlib import Path
from typing import TypeVar, cast

import jax
import orbax.checkpoint as ocp

from experiments.cli import UserError

State = TypeVar("State")


class Checkpoints:
    """The checkpoints of one run, newest last. Saving is asynchronous and atomic: a killed save leaves no trace."""

    def __init__(self, folder: Path, keep: int = 2):
        """Opens or creates the folder; keeps the newest `keep` checkpoints."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self._folder = folder

    @classmethod
    def open(cls, folder: Path) -> "Checkpoints":
        """Opens a folder that exists, to read.

        Raises:
          UserError: there is none.
        """
        if not folder.is_dir():
            raise UserError(f"run: {folder} does not exist; there is no checkpoint to load.")
        return cls(folder)

    def latest_step(self) -> int | None:
        """Returns the newest step that is complete, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state) -> None:
        """Saves a pytree of arrays under `step`; returns before it is on disk.

        Raises:
          UserError: the disk has no room for it; older checkpoints stay.
        """
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise UserError(f"output: {self._folder} has {free >> 20} MiB left, a checkpoint needs {needed >> 20} MiB.")
        with _explained(self._folder):
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, step: int, like: State) -> State:
        """Returns the state saved under `step`, with the shapes, dtypes and shardings of `like` (arrays or shapes).

        Raises:
          UserError: it is damaged.
        """
        try:
            return cast(State, self._manager.restore(step, args=ocp.args.StandardRestore(like)))
        except (OSError, ValueError, KeyError) as error:
            others = [other for other in self.steps() if other != step]
            raise UserError(
                f"run: checkpoint {self._folder / str(step)} cannot be read ({_first_line(error)}); move it away to go "
                f"on from {f'step {others[-1]}' if others else 'the start'}."
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error) -> None:
        """Waits until everything is on disk."""
        with _explained(self._folder):
            self._manager.wait_until_finished()
        self._manager.close()


@contextlib.contextmanager
def _explained(folder: Path):
    """Says in one sentence that a checkpoint could not be written; orbax and tensorstore raise both types."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(
            f"output: a checkpoint could not be written to {folder} ({_first_line(error)}); those before it are intact."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
