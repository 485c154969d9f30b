"""The manifest of a checkpoint: its arrays, its files with their digests, and a digest of the manifest itself.

What it vouches for is content: a bit that flips in a file of arrays would otherwise be restored without a word.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

NAME = "manifest.json"
VERSION = 1
PIECE = 1 << 20  # bytes read at once


class DamageError(Exception):
    """A checkpoint is not what was saved; the message says which file and what is wrong with it."""


class Array(NamedTuple):
    """One array as it was saved."""

    path: str  # keys from the root, "/" between them
    shape: tuple[int, ...]
    dtype: str


class File(NamedTuple):
    """One file as it was saved."""

    size: int  # bytes
    digest: str  # xxh3_128, hexadecimal


class Manifest(NamedTuple):
    """Everything that is known of a checkpoint without reading its arrays."""

    step: int
    time: float  # when it was sealed, seconds since 1970
    about: dict[str, Any]
    arrays: list[Array]
    files: dict[str, File]  # by path in the checkpoint


@contextlib.contextmanager
def _unreadable_is_damaged():
    try:
        yield
    except OSError as error:
        raise DamageError(f"{error.filename or 'a file'} cannot be read ({reason(error)})") from None


def write(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest into a checkpoint, on disk when this returns."""
    content: dict[str, Any] = {"version": VERSION} | manifest._asdict()
    write_durably(folder / NAME, json.dumps(content | {"digest": _digest_of(content)}))


@_unreadable_is_damaged()
def read(folder: Path, step: int) -> Manifest:
    """Returns the manifest of the checkpoint in a folder that should be the one of this step.

    Raises:
      DamageError: it is missing, changed, or belongs to another step.
    """
    content = _parse(_text(folder))
    if content.pop("digest", None) != _digest_of(content):
        raise DamageError(f"{NAME} is not what was written")
    if content["version"] != VERSION:
        raise DamageError(f"{NAME} has format {content['version']}, this program reads {VERSION}")
    if content["step"] != step:
        raise DamageError(f"{NAME} is the one of step {content['step']}")
    arrays = [Array(path, tuple(shape), dtype) for path, shape, dtype in content["arrays"]]
    files = {name: File(*file) for name, file in content["files"].items()}
    return Manifest(step, content["time"], content["about"], arrays, files)


@_unreadable_is_damaged()
def verify(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Checks the list of files and the content of those named.

    Raises:
      DamageError: the first thing that is not as it was saved.
    """
    check_files(folder, manifest)
    for name in names:
        if digest(folder / name) != manifest.files[name].digest:
            raise DamageError(f"{name} does not hold the bytes that were saved")


def check_files(folder: Path, manifest: Manifest) -> None:
    """Checks names and sizes of the files, without reading them.

    Raises:
      DamageError: one is missing, has another size, or is new; hidden files, which file browsers leave, do no harm.
    """
    found = sizes(folder)
    for name, file in manifest.files.items():
        if name not in found:
            raise DamageError(f"{name} is missing")
        if found[name] != file.size:
            raise DamageError(f"{name} has {found[name]:,} bytes, {file.size:,} were saved")
    for name in found:
        if name not in manifest.files and not Path(name).name.startswith("."):
            raise DamageError(f"{name} was not saved with it")


def sizes(folder: Path) -> dict[str, int]:
    """Returns the bytes of every file in a checkpoint but the manifest, by path in it."""

    def refuse(error: OSError) -> None:
        raise error

    found = {}
    for place, folders, files in os.walk(folder, onerror=refuse):
        links = [name for name in folders if (Path(place) / name).is_symlink()]  # not walked into, so not overlooked
        for file in (Path(place) / name for name in (*files, *links)):
            name = file.relative_to(folder).as_posix()
            if not name.startswith(NAME):  # nor looked at: another process may just be renaming its part of it
                found[name] = file.stat().st_size if file.is_file() else -1
    return found


def digest(file: Path) -> str:
    """Returns the xxh3_128 of a file."""
    state, piece = xxhash.xxh3_128(), memoryview(bytearray(PIECE))
    with file.open("rb", buffering=0) as stream:
        while size := stream.readinto(piece):
            state.update(piece[:size])
    return state.hexdigest()


def write_durably(file: Path, text: str) -> None:
    """Writes a file that is there as a whole, and on disk, or not at all."""
    draft = file.with_name(file.name + ".draft")
    with draft.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(draft, file)
    settle(file.parent)


def settle(folder: Path) -> None:
    """Makes sure that the names in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: Exception) -> str:
    """Returns in a few words why reading or writing failed; tensorstore says it at the end of a long line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    told = re.search(r"([^:]+) \[os_error_code", str(error))
    return told[1].strip() if told else (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _text(folder: Path) -> str:
    if not folder.is_dir():
        raise DamageError("it is not a folder")
    try:
        return (folder / NAME).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DamageError(f"{NAME} is missing") from None
    except UnicodeDecodeError:
        raise DamageError(f"{NAME} is not what was written") from None


def _parse(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise DamageError(f"{NAME} is not what was written")
    return content


def _digest_of(content: dict[str, Any]) -> str:
    """Of what is said, not how: in the order of keys, whatever the white space."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def in_units(size: float) -> str:
    """Returns a number of bytes as people read it."""
    units = iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size >= 1000:
        size, unit = size / 1024, next(units)
    return f"{size:.3g} {unit}"
