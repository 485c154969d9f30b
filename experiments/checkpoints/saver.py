"""Saving behind training: arrays -> draft -> manifest -> sealed -> older ones deleted. All that knows orbax is here."""

import contextlib
import itertools
import json
import logging
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from experiments.checkpoints import disk, manifest, peers
from experiments.checkpoints.likeness import described
from experiments.checkpoints.manifest import Array, File, Manifest
from experiments.checkpoints.writing import FILE_BYTES, TRAVELLING_BYTES, Written

PATIENCE = 600  # seconds that processes wait for one another
_turns = itertools.count()  # the same in all processes, for all save in the same order


def _without_latecomers(hook: Callable) -> Callable:
    def unraisablehook(args) -> None:
        if args.exc_type is not RuntimeError or str(args.exc_value) != "Event loop is closed":
            hook(args)

    return unraisablehook


# What orbax fails at is raised and ends in a sentence. It would also log the same traceback several times, asyncio log
# those of the arrays after the first, and Python print those of writers that come back when all has been given up.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname or record.levelno < logging.ERROR)
logging.getLogger("asyncio").addFilter(lambda record: "in OCDBT database" not in record.getMessage())
sys.unraisablehook = _without_latecomers(sys.unraisablehook)


class Saver:
    """Saves into one folder, one checkpoint at a time. What fails in the background is raised by `finish`, once."""

    def __init__(self, folder: Path, keep: int):
        """Keeps the newest `keep` checkpoints of the folder."""
        self._folder, self._keep = folder.absolute(), keep
        self._orbax, self._travelling = _checkpointer(TRAVELLING_BYTES), TRAVELLING_BYTES
        self._barrier = ocp.multihost.get_barrier_sync_fn()
        self._pool = ThreadPoolExecutor(2, "seal")  # one waits for orbax, one looks after what it has written
        self._sealing: Future | None = None

    def start(self, step: int, state, about: dict[str, Any]) -> None:
        """Takes the arrays over and returns; `state` may then be changed or given away."""
        json.dumps(about)  # what cannot be written is better refused here than in the background
        arrays = described(state)
        _check_names(arrays)
        turn = next(_turns)
        draft = disk.draft(self._folder, step, turn)
        self._make_room(state)
        self._orbax.save(draft, args=ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=FILE_BYTES))
        writing = self._pool.submit(self._orbax.wait_until_finished)
        self._sealing = self._pool.submit(self._seal, draft, step, arrays, about, turn, writing)

    def has_ended(self) -> bool:
        """True if `finish` would not wait."""
        return self._sealing is None or self._sealing.done()

    def finish(self) -> None:
        """Waits until what was started is sealed.

        Raises:
          OSError, ValueError: it could not be written; nothing is left of it.
        """
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            sealing.result()

    def close(self) -> None:
        """Ends the threads; what was started is finished."""
        self._pool.shutdown()
        self._orbax.close()

    def _seal(
        self, draft: Path, step: int, arrays: list[Array], about: dict[str, Any], turn: int, writing: Future
    ) -> None:
        """Runs in the background, in every process, so without devices: they meet at barriers of the coordinator."""
        failed, written = None, Written()
        parts = {
            "arrays": lambda: self._follow(draft, written, writing),
            "digests": lambda: self._write_part(draft, written),
            "manifest": lambda: self._finish(draft, step, arrays, about),
        }
        for name, action in parts.items():
            try:
                if failed is None:
                    action()
            except Exception as error:  # raised when all have been met: none may wait for this process
                failed = error
            self._meet(f"{name}-{turn}")
        if failed is not None:
            if peers.is_first():
                disk.sweep(self._folder)
            raise failed
        if not (self._folder / str(step)).exists():
            raise OSError("process 0 could not seal it")

    def _meet(self, name: str) -> None:
        """Waits for the other processes."""
        try:
            self._barrier(key=f"checkpoint-{name}", timeout_ms=PATIENCE * 1000)
        except jax.errors.JaxRuntimeError:
            raise TimeoutError("another process is gone") from None

    def _make_room(self, state) -> None:
        """Lets the largest array through: orbax refuses what is larger than all that may be on its way."""
        largest = 1 + max(map(_piece_bytes, jax.tree.leaves(state)), default=0)
        if largest > self._travelling:
            self._orbax.close()
            self._orbax, self._travelling = _checkpointer(largest), largest

    def _follow(self, draft: Path, written: Written, writing: Future) -> None:
        """Waits for the arrays and looks after those that this process has already written."""
        while not wait([writing], timeout=0.05).done:
            with contextlib.suppress(OSError):  # looking is no duty; orbax appends to the draft's name while it writes
                written.look(draft.parent.glob(f"{draft.name}*/ocdbt.process_{jax.process_index()}/d/*"))
        writing.result()

    def _write_part(self, draft: Path, written: Written) -> None:
        """Writes the digests of the files that this process wrote."""
        own, sizes = jax.process_index(), manifest.sizes(draft)
        files = {name: File(sizes[name], written.digest(draft / name)) for name in sizes if _owner(name) == own}
        manifest.write_durably(_part(draft, own), json.dumps(files))

    def _finish(self, draft: Path, step: int, arrays: list[Array], about: dict[str, Any]) -> None:
        if peers.is_first():
            manifest.write(draft, Manifest(step, time.time(), about, arrays, _take_parts(draft)))
            disk.seal(draft, step)
            disk.delete_older(self._folder, step, self._keep)


def _checkpointer(travelling: int) -> ocp.AsyncCheckpointer:
    """Returns what writes arrays, at most so many bytes at a time."""
    # Compression makes float32 parameters 7 % smaller, at five times the processor time, which training would lose.
    handler = ocp.BasePyTreeCheckpointHandler(use_compression=False, save_concurrent_bytes=travelling)
    # Folders made in the background leave threads waiting for them, ten minutes long, where they cannot be made.
    options = ocp.AsyncOptions(create_directories_asynchronously=False)
    return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(handler_impl=handler), async_options=options)


def _piece_bytes(leaf) -> int:
    """Bytes of what one device has of an array, which is the same in every process."""
    if isinstance(leaf, jax.Array):
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return np.asarray(leaf).nbytes


def _owner(name: str) -> int:
    """Returns which process wrote a file; each has a folder for its arrays, and the first does the rest."""
    folder = re.match(r"ocdbt\.process_(\d+)/", name)
    return int(folder[1]) if folder and int(folder[1]) < jax.process_count() else 0


def read(folder: Path, like):
    """Returns the arrays of a verified checkpoint, placed as those of `like`; what has no place goes to one device."""
    like = jax.tree.map(_placed, like)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        args = ocp.args.PyTreeRestore(like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))
        return reader.restore(folder.absolute(), args=args)


def _placed(leaf):
    if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(jax.local_devices()[0]))
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf  # orbax knows no scalars of numpy


def _check_names(arrays: list[Array]) -> None:
    """Raises ValueError if two arrays would be saved as one: orbax joins keys by dots and does not look for twins."""
    names = [array.path.replace("/", ".") for array in arrays]
    twin = next((name for name, count in Counter(names).items() if count > 1), None)
    if twin is not None:
        raise ValueError(f"two arrays are called {twin}; rename one")


def _take_parts(draft: Path) -> dict[str, File]:
    """Returns the digests of all files, and deletes the parts they come from."""
    files = {}
    for process in range(jax.process_count()):
        part = _part(draft, process)
        files |= {name: File(*file) for name, file in json.loads(part.read_text()).items()}
        part.unlink()
    return dict(sorted(files.items()))


def _part(draft: Path, process: int) -> Path:
    return draft / f"{manifest.NAME}.{process}"
