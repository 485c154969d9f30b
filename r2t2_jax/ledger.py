"""A file of decisions that only grows: a JSON line each, sealed by the line before, so that nothing changes unnoticed.

    {"sequence": 7, "previous": <seal of line 6>, "digest": <hash of salt and content>, "salt": ..., "content": {...}}

A line's seal is the hash of its sequence, previous and digest. A line that was changed, removed, inserted or moved
breaks the chain; lines cut off the end do not, and whoever fears that keeps the `head` elsewhere. As content enters the
chain by its digest alone, it can be deleted on demand and the chain still holds: the line says that it was redacted,
and a digest whose salt is gone gives nothing away. Records hold no inputs and no embeddings, and the file is readable
by its owner alone.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from r2t2_jax.records import Record

KIND, FORMAT = "r2t2_jax decisions", 1
BLOCK = 1 << 16

logger = logging.getLogger(__name__)


class Head(NamedTuple):
    """The last line, by which all lines up to it can be verified."""

    sequence: int
    seal: str


class Ledger:
    """A ledger open for writing, by one process at a time (it holds a POSIX lock); a context manager.

    A last line that a crash cut short is no record. It is dropped, and a warning logged, in a copy that then takes the
    file's place.
    """

    def __init__(self, path: Path | str):
        """Opens or creates the file.

        Raises:
          FileNotFoundError: its folder does not exist.
          IsADirectoryError: the path is a folder.
          ValueError: it is no ledger, one of another format, damaged at its end, or open in another process.
        """
        self._path = Path(path).resolve()
        self._closed = False
        self._file = _open_locked(self._path, 0)
        try:
            self._head = self._find_head()
        except BaseException:
            self.close()
            raise

    @property
    def head(self) -> Head:
        """Where the ledger ends."""
        return self._head

    def append(self, records: Sequence[Record]) -> None:
        """Writes records in one go and returns when they are on disk.

        Raises:
          OSError: they cannot be written; none of them is in the file then.
          ValueError: the ledger was closed.
        """
        self._check_open()
        lines, head = [], self._head
        for record in records:
            line, head = _sealed(head, record)
            lines.append(line)
        self._write(b"".join(lines))
        self._head = head

    def redact(self, *, input_id: str | None = None, reference_id: str | None = None) -> int:
        """Deletes the content of every record of an input, or of every record with a reference among its neighbours.

        Empty lines stay, so that the chain holds. Copies of the file, and the blocks of a disk, are out of reach.

        Returns:
          How many records lost their content.

        Raises:
          ValueError: not exactly one id is given, or the ledger was closed.
        """
        self._check_open()
        if (input_id is None) == (reference_id is None):
            raise ValueError("redact: give either input_id or reference_id.")
        count = 0

        def redacted() -> Iterator[bytes]:
            nonlocal count
            for _, line, raw in _lines(self._path):
                if _concerns(line.get("content"), input_id, reference_id):
                    count += 1
                    line = {key: line[key] for key in ("sequence", "previous", "digest")} | {"redacted": _now()}
                    raw = json.dumps(line).encode() + b"\n"
                yield raw

        self._replace(redacted())
        return count

    def close(self) -> None:
        """Lets others write; closed once more, nothing happens."""
        if not self._closed:
            self._closed = True
            os.close(self._file)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _check_open(self) -> None:
        """A number of a closed file may be another file's by now."""
        if self._closed:
            raise ValueError(f"{self._path}: this ledger was closed; open it again to write.")

    def _find_head(self) -> Head:
        size = os.fstat(self._file).st_size
        if size == 0:
            line, head = _sealed(Head(-1, ""), {"ledger": KIND, "format": FORMAT, "created": _now()})
            self._write(line)
            _sync_folder(self._path)
            return head
        _check_header(self._path)
        last, torn = _last_line(self._file, size)
        if torn:
            logger.warning("%s: a crash cut the last line short; these %d bytes are dropped", self._path, len(torn))
            with self._path.open("rb") as whole:
                self._replace(raw for raw in whole if raw.endswith(b"\n"))
        return _head_of(_parsed(self._path, "the last line", last))

    def _write(self, block: bytes) -> None:
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, block) < len(block):
                raise OSError(errno.ENOSPC, "No space left for all records", str(self._path))
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def _replace(self, lines: Iterable[bytes]) -> None:
        """Puts a file with these lines in the place of this one, in one step."""
        copy = self._path.with_name(f"{self._path.name}.rewritten")
        file = _open_locked(copy, os.O_TRUNC)
        try:
            with open(file, "ab", closefd=False) as out:
                out.writelines(lines)
            os.fsync(file)
            os.replace(copy, self._path)
        except BaseException:
            os.close(file)
            copy.unlink(missing_ok=True)
            raise
        _sync_folder(self._path)
        os.close(self._file)
        self._file = file


def read(path: Path | str) -> list[Record]:
    """Returns the records with their sequence; of one that was redacted, only sequence and when it was.

    Raises:
      FileNotFoundError: there is no such file.
      IsADirectoryError: the path is a folder.
      ValueError: the file is no ledger, or a line cannot be read.
    """
    path = Path(path)
    _check_header(path)
    rows = [line.get("content", {"redacted": line.get("redacted")}) | {"sequence": n} for n, line, _ in _lines(path)]
    return rows[1:]


def verify(path: Path | str, head: Head | None = None) -> Head:
    """Checks every seal and digest, and that the ledger goes through a head that was kept.

    Returns:
      Its last line.

    Raises:
      FileNotFoundError: there is no such file.
      IsADirectoryError: the path is a folder.
      ValueError: the message names the first line that is broken, or says that the head is missing.
    """
    path, last, passed = Path(path), Head(-1, ""), head is None
    _check_header(path)
    for number, line, _ in _lines(path):
        where = f"{path}: line {number + 1}"
        if line.get("sequence") != number or line.get("previous") != last.seal:
            raise ValueError(f"{where} does not follow the line before; lines were removed, inserted or changed there.")
        if "content" not in line and "redacted" not in line:
            raise ValueError(f"{where} has lost its content, and does not say that it was redacted.")
        if "content" in line and line["digest"] != _digest(line.get("salt"), json.dumps(line["content"])):
            raise ValueError(f"{where} was changed; its content is not what its digest was made of.")
        last = _head_of(line)
        passed = passed or last == head
    if not passed:
        raise ValueError(
            f"{path}: does not go through sequence {head and head.sequence} as it was; its end was replaced."
        )
    return last


def _sealed(head: Head, content: Record) -> tuple[bytes, Head]:
    """Returns the line that follows a head, and the head that this makes."""
    text, salt = json.dumps(content, allow_nan=False), secrets.token_hex(16)
    envelope = {"sequence": head.sequence + 1, "previous": head.seal, "digest": _digest(salt, text), "salt": salt}
    line = f'{json.dumps(envelope)[:-1]}, "content": {text}}}\n'  # encoding takes most of the time, so once is enough
    return line.encode(), _head_of(envelope)


def _digest(salt: Any, text: str) -> str:
    return hashlib.sha256(f"{salt} {text}".encode()).hexdigest()


def _head_of(line: dict[str, Any]) -> Head:
    sealed = json.dumps([line["sequence"], line["previous"], line["digest"]])
    return Head(line["sequence"], hashlib.sha256(sealed.encode()).hexdigest())


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any], bytes]]:
    """Yields complete lines, numbered from 0, read and raw; what a crash left of one at the end does not count."""
    with path.open("rb") as file:
        for number, raw in enumerate(file):
            if raw.endswith(b"\n"):
                yield number, _parsed(path, f"line {number + 1}", raw), raw


def _parsed(path: Path, where: str, raw: bytes) -> dict[str, Any]:
    try:
        line = json.loads(raw)
        _head_of(line)
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: {where} is no line of a ledger; restore the file from a copy.") from None
    return line


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        raw = file.readline(BLOCK)
    try:
        content = json.loads(raw)["content"]
        kind, found = content["ledger"], content["format"]
    except (ValueError, TypeError, KeyError):
        kind, found = None, None
    if kind != KIND:
        raise ValueError(f"{path}: is no ledger of decisions; give another path.")
    if found != FORMAT:
        raise ValueError(f"{path}: is a ledger of format {found}, this version knows {FORMAT}; start a new file.")


def _last_line(file: int, size: int) -> tuple[bytes, bytes]:
    """Returns the last complete line and what follows it."""
    block = BLOCK
    while True:
        *lines, torn = os.pread(file, block, max(size - block, 0)).split(b"\n")
        if len(lines) > 1 or block >= size:  # the first of them may lack its beginning
            return lines[-1], torn
        block *= 2


def _concerns(content: Record | None, input_id: str | None, reference_id: str | None) -> bool:
    if not content or "input" not in content:
        return False
    neighbors = {neighbor["id"] for neighbor in content["neighbors"]}
    return content["input"]["id"] == input_id or reference_id in neighbors


def _open_locked(path: Path, flags: int) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | flags, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file).st_ino != os.stat(path).st_ino:
            raise BlockingIOError  # its writer has just put another file in its place
    except OSError:
        os.close(file)
        raise ValueError(f"{path}: is being written by another process; a ledger has one writer at a time.") from None
    return file


def _sync_folder(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
