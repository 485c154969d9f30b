"""Batches on their way to the devices: read ahead in a thread, each host its own rows only."""

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Self, cast

import grain
import numpy as np

from experiments.programs import Programs, split
from experiments.runs import RunConfig
from mesanet_jax.loss import Batch

AHEAD = 2  # batches that wait to be asked for


class Feed:
    """Batches in order; that of step n is rows n * batch_size and following of the data, whatever hosts there are."""

    def __init__(self, rows: grain.MapDataset, config: RunConfig, programs: Programs):
        """Takes an endless dataset whose items are Batches of one row [t + 1]."""
        self._rows, self._programs, self._config = rows, programs, config
        self._here = programs.rows_here(config)
        self._ready: queue.Queue[Batch | Exception] = queue.Queue(AHEAD)
        self._thread: threading.Thread | None = None
        self._closed = False

    def empty(self) -> bool:
        """True if `take` would wait."""
        return self._ready.empty()

    def take(self, step: int, asked: Callable[[], bool]) -> Batch | None:
        """Waits for the batch of the next step, [a, b, t + 1] on the devices; None if `asked` says to leave meanwhile.

        Args:
          step: where to begin, at the first call; then one more each time.
          asked: looked at several times a second.
        """
        if self._thread is None:
            # a daemon, because a read that hangs must not keep the process from leaving
            self._thread = threading.Thread(target=self._read_from, args=(step,), name="feed", daemon=True)
            self._thread.start()
        while not asked():
            with contextlib.suppress(queue.Empty):
                batch = self._ready.get(timeout=0.1)
                if isinstance(batch, Exception):
                    raise batch
                return batch
        return None

    def _read_from(self, step: int) -> None:
        for number in range(step, self._config.num_steps):
            try:
                batch = self._read(number)
            except Exception as error:  # whatever it is, it is raised where the batch is asked for
                batch = error
            while not self._closed:
                with contextlib.suppress(queue.Full):
                    self._ready.put(batch, timeout=0.1)
                    break
            if self._closed:
                return

    def _read(self, step: int) -> Batch:
        data = self._config.data
        shape = (data.batch_size, data.length + 1)
        batch = Batch(np.zeros(shape, np.int32), np.full(shape, -1, np.int32))
        for row in self._here:
            window = cast(Batch, self._rows[step * data.batch_size + row])
            batch.tokens[row], batch.segment_ids[row] = window
        return self._programs.place(split(batch, self._config.micro_batches))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        """Leaves at once: what is still being read is not wanted."""
        self._closed = True
