"""Files as they are written: each is digested while it lies in memory, and that memory is then given back.

The system keeps in memory what it has written, and a checkpoint is not read again. To find new memory for it is what
saving costs a processor: 4.3 to 5.1 s of system time for 1.65 GB; 1.0 to 1.7 s where small files, few of them at a
time, take over the memory of those before them.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from experiments.checkpoints import manifest

FILE_BYTES = 16 << 20  # what writers should give a file, so that those before it are done with while it is written
TRAVELLING_BYTES = 200 << 20  # what should be on its way to disk at one time
_SMALL = 1 << 20  # bytes of a file that is not worth a look
_UNKNOWN = (None, "")


class Written:
    """The digests of what has been written so far."""

    def __init__(self):
        self._known: dict[str, tuple[tuple | None, str]] = {}  # stamp and digest by name; without one, it may yet grow

    def look(self, files: Iterable[Path]) -> None:
        """Digests each large file that has not changed since the last look, and forgets its content.

        Raises:
          OSError: a file has just been renamed or deleted; the others are left for the next look.
        """
        for file in files:
            before, digest = self._known.get(file.name, _UNKNOWN)
            if not digest and (stamp := _stamp(file))[1] >= _SMALL:
                self._known[file.name] = stamp, manifest.digest(file) if stamp == before else ""
                if stamp == before:
                    _forget(file)

    def digest(self, file: Path) -> str:
        """Returns the digest of a file: the one already taken, if it has not changed since."""
        before, digest = self._known.get(file.name, _UNKNOWN)
        return digest if digest and _stamp(file) == before else manifest.digest(file)


def _stamp(file: Path) -> tuple[int, int, int]:
    """Changes with the content, not with the folder."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _forget(file: Path) -> None:
    """Gives back the memory that holds a file's content, once that is on disk; where the system can be told to."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
