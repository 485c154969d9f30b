"""Checkpoints of one run: save, find the newest that is whole, restore."""

import contextlib
import functools
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax

from experiments.checkpoints import disk, likeness, manifest, peers
from experiments.checkpoints.manifest import DamageError, Manifest
from experiments.cli import UserError

State = TypeVar("State")


class Checkpoints:
    """The checkpoints of one run.

    Saving is asynchronous and atomic: a checkpoint is sealed, with digests of all its files, or it is not there. What
    is read is verified first. Several processes call the same methods in the same order.
    """

    def __init__(self, folder: Path, keep: int = 2):
        """Opens or creates the folder, to write; keeps the newest `keep` checkpoints.

        Raises:
          UserError: the folder cannot be made.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output: {folder} cannot be made ({error.strerror}); give another folder.") from None
        self._folder, self._keep, self._writable = folder, keep, True

    @classmethod
    def open(cls, folder: Path) -> "Checkpoints":
        """Opens a folder that exists, to read: nothing in it is renamed, deleted or created.

        Raises:
          UserError: there is none.
        """
        if not folder.is_dir():
            raise UserError(f"run: {folder} does not exist; there is no checkpoint to load.")
        self = cls.__new__(cls)
        self._folder, self._keep, self._writable = folder, 0, False
        return self

    def steps(self) -> list[int]:
        """Returns the steps of all sealed checkpoints, oldest first; their content is not looked at."""
        return disk.sealed(self._folder)

    def latest_step(self) -> int | None:
        """Returns the newest step that is sealed, or None."""
        return max(self.steps(), default=None)

    def newest(self, like: State, say: Callable[[str], None]) -> tuple[State, int] | None:
        """Returns the newest state whose content is what was saved, and its step; None if nothing was ever saved.

        Args:
          like: shapes, dtypes and shardings of the arrays, as for `restore`.
          say: is told, in process 0, one line for each newer one that is passed over. Opened to write, a damaged one
            is set aside, so that its step can be saved again.

        Raises:
          UserError: there are checkpoints and all are damaged, or the arrays are not those asked for.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for step in reversed(peers.of_first(disk.entries(self._folder))):
            try:
                content = self._verified(step)
            except DamageError as damage:
                damaged[step] = str(damage)
            else:
                self._pass_over(damaged, step, say)
                return self._read(content, like), step
        self._refuse_to_forget(damaged)
        self._tell_left_out(0, "training starts from the beginning", say)
        return None

    def save(self, step: int, state, **about) -> None:
        """Saves a pytree of arrays under `step`; returns before it is on disk.

        A step that is sealed and whole is left as it is; anything else in its place is set aside.

        Args:
          step: what it is found under.
          state: the arrays; they may be changed or donated as soon as this returns.
          about: what the manifest shall say of it besides, values that JSON can hold.

        Raises:
          UserError: the disk has no room for it, or the save before failed; older checkpoints stay.
        """
        self.wait()
        if step in peers.of_first(disk.entries(self._folder)) and self._is_whole(step):
            return
        with _explained(self._folder):
            if peers.is_first():
                self._make_way(step)
        self._check_room(state)
        with _explained(self._folder):
            self._saver.start(step, state, about)

    def check(self) -> None:
        """Waits for nothing. Several processes, of which one knows before another, find out together at the next save.

        Raises:
          UserError: what was to be saved could not be written, as far as is known by now; said once.
        """
        if jax.process_count() == 1 and "_saver" in vars(self) and self._saver.has_ended():
            self.wait()

    def wait(self) -> None:
        """Waits until everything is on disk and sealed.

        Raises:
          UserError: it could not be written; said once, after which the step can be saved again.
        """
        if "_saver" in vars(self):
            with _explained(self._folder):
                self._saver.finish()

    def restore(self, step: int, like: State, *, cast: bool = False) -> State:
        """Returns the state saved under `step`, verified.

        Args:
          step: one of `steps()`.
          like: a pytree of arrays or shapes: what is asked for, and where it is placed.
          cast: convert arrays of other dtypes.

        Raises:
          UserError: there is no such checkpoint, it is damaged, or its arrays are not those asked for.
        """
        self.wait()
        others = [other for other in self.steps() if other != step]
        instead = f"take another, there are {others}" if others else "there is no other"
        if step not in disk.entries(self._folder):
            raise UserError(f"run: {self._folder} has no checkpoint {step}; {instead}.")
        try:
            content = self._verified(step)
        except DamageError as damage:
            raise UserError(f"run: checkpoint {self._folder / str(step)} is damaged: {damage}; {instead}.") from None
        return self._read(content, like, allow_cast=cast)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Waits until everything is on disk and sealed."""
        try:
            self.wait()
        except UserError as failure:
            if isinstance(error, UserError):
                raise UserError(f"{error} Besides, {failure}") from error
            raise
        finally:
            if "_saver" in vars(self):
                self._saver.close()

    @functools.cached_property
    def _saver(self):
        from experiments.checkpoints import saver  # orbax takes twice as long to import as jax; looking needs neither

        return saver.Saver(self._folder, self._keep)

    def _verified(self, step: int) -> Manifest:
        """Returns the manifest of a checkpoint that is whole; each process reads its share of the files.

        Raises:
          DamageError: it is not, in all processes alike.
        """
        found, content = None, None
        try:
            content = manifest.read(self._folder / str(step), step)
            sizes = {name: file.size for name, file in content.files.items()}
            manifest.verify(self._folder / str(step), content, peers.share(sizes))
        except DamageError as damage:
            found = str(damage)
        damages = [damage for damage in peers.gathered(found) if damage is not None]
        if content is None or damages:
            raise DamageError(damages[0])
        return content

    def _is_whole(self, step: int) -> bool:
        with contextlib.suppress(DamageError):
            self._verified(step)
            return True
        return False

    def _read(self, content: Manifest, like: State, *, allow_cast: bool = False) -> State:
        from experiments.checkpoints import saver

        folder = self._folder / str(content.step)
        difference = likeness.difference(content.arrays, likeness.described(like), allow_cast)
        if difference is not None:
            raise UserError(f"run: checkpoint {folder} {difference}.")
        try:
            return typing.cast(State, saver.read(folder, like))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"run: checkpoint {folder} is whole but cannot be read ({manifest.reason(error)})."
            ) from error

    def _pass_over(self, damaged: dict[int, str], taken: int, say: Callable[[str], None]) -> None:
        self._tell_left_out(taken, f"step {taken} is taken instead", say)
        for step, damage in damaged.items():
            if peers.is_first():
                say(
                    f"{self._folder / str(step)} is damaged: {damage}; {self._set_aside(step)}"
                    f"step {taken} is taken instead."
                )
        peers.of_first(None)  # nobody goes on before everything is in its place

    def _set_aside(self, step: int) -> str:
        if not self._writable:
            return ""
        try:
            return f"it is kept as {disk.set_aside(self._folder, step)}, and "
        except OSError as error:
            return f"it cannot be set aside ({error.strerror}), and "

    def _tell_left_out(self, taken: int, instead: str, say: Callable[[str], None]) -> None:
        if peers.is_first():
            for step in disk.drafts(self._folder):
                if step > taken:
                    say(f"{self._folder / str(step)} was still being saved when the run ended; {instead}.")
            for path in disk.strangers(self._folder):
                say(f"{path} is not looked at, its name is not that of a step; {instead}.")

    def _refuse_to_forget(self, damaged: dict[int, str]) -> None:
        """Raises if there are, or were, checkpoints: going on from nothing would throw the training away."""
        if damaged:
            step, damage = next(iter(damaged.items()))
            raise UserError(
                f"run: every checkpoint in {self._folder} is damaged, step {step} because {damage}; put a copy back, "
                f"or give another --output to start from the beginning."
            )
        if peers.of_first(bool(disk.strangers(self._folder) or disk.aside(self._folder))):
            raise UserError(
                f"run: {self._folder} has no checkpoint under the name of its step, but others; put one back under "
                f"its step, or give another --output to start from the beginning."
            )

    def _make_way(self, step: int) -> None:
        disk.sweep(self._folder)
        if step in disk.entries(self._folder):
            disk.set_aside(self._folder, step)

    def _check_room(self, state) -> None:
        needed = sum(getattr(x, "nbytes", 0) for x in jax.tree.leaves(state))
        free = peers.of_first(shutil.disk_usage(self._folder).free)
        if free < needed:
            left, size = manifest.in_units(free), manifest.in_units(needed)
            raise UserError(f"output: {self._folder} has {left} left, a checkpoint needs {size}; make room.")


@contextlib.contextmanager
def _explained(folder: Path):
    """Says in one sentence that a checkpoint could not be written; orbax and tensorstore raise both types."""
    try:
        yield
    except (OSError, ValueError, DamageError) as error:
        why = manifest.reason(error)
        raise UserError(
            f"output: a checkpoint could not be written to {folder} ({why}); those before it are intact."
        ) from error
