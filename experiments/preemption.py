"""SIGTERM and Ctrl-C: a run that is asked to leave saves everything first."""

import os
import signal
import sys
import threading
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(SystemExit):
    """Everything is saved; the exit status, 128 and the signal's number, tells a scheduler that the run is not over."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class Preemption:
    """Notices signals between entering and leaving it; otherwise a signal ends the process as usual.

    Enter it when there is something to lose: until the first step is done, all there is lies on disk.
    """

    def __init__(self, grace_seconds: float, alone: bool = True):
        """Takes the seconds after a signal by which the process is gone, everything saved or not.

        A process that is not alone leaves only when the others do, after the same step.
        """
        self._grace_seconds, self._alone = grace_seconds, alone
        self._handlers: dict[int, object] = {}
        self._timer: threading.Timer | None = None
        self.signal = 0  # number of the one that came

    def at_once(self) -> bool:
        """True if it has been asked and need not tell anybody."""
        return self.signal != 0 and self._alone

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there are handlers allowed
            read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._wakeup = signal.set_wakeup_fd(self._write)
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
            threading.Thread(target=self._watch, args=(read,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        if not self._handlers:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)  # the end of the watch
        if self._timer:
            self._timer.cancel()

    def _note(self, number: int, frame) -> None:
        if number == signal.SIGINT == self.signal:
            raise KeyboardInterrupt  # asked a second time: at once
        self.signal = number

    def _watch(self, read: int) -> None:
        """Starts the clock, which the handler could not: it has to wait for what the main thread has compiled."""
        with os.fdopen(read, "rb") as pipe:
            if came := pipe.read(1):
                self._timer = threading.Timer(self._grace_seconds, self._give_up, (came[0],))
                self._timer.daemon = True
                self._timer.start()

    def _give_up(self, number: int) -> None:
        print(
            f"error: grace_seconds: {self._grace_seconds:g} s after signal {number} not everything is saved; the same "
            f"command goes on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + number)
