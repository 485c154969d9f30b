"""A reference set on disk: a folder with arrays in one safetensors file and everything else in readable JSON.

The manifest names the arrays by their hash and is put in place last, in one step: whoever opens the folder, and
whenever a writer dies, finds the whole old set or the whole new one.
"""

import hashlib
import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import safetensors
import safetensors.numpy

from r2t2_jax.reference_checks import LAYOUT, METADATA, stored_arrays
from r2t2_jax.references import ReferenceSet
from r2t2_jax.shapes import Readout

SCHEMA = 1
MANIFEST = "references.json"


def save(references: ReferenceSet, folder: Path | str, *, overwrite: bool = False) -> None:
    """Writes a set that `load` gives back bit for bit; readable by its owner alone, for embeddings can leak content.

    Raises:
      ValueError: there is a set in the folder and overwrite is False.
      OSError: it cannot be written; a set that was there before is intact.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST
    if manifest.exists() and not overwrite:
        raise ValueError(f"{folder}: there is a reference set already; pass overwrite=True or another folder.")
    arrays = safetensors.numpy.save(stored_arrays(references))
    entries = {
        "schema": SCHEMA,
        "fingerprint": references.fingerprint,
        "arrays": hashlib.sha256(arrays).hexdigest(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "created_with": {"jax": jax.__version__, "safetensors": safetensors.__version__},
        **{field: getattr(references, field) for field in METADATA},
        "ids": references.ids.tolist(),
        "sources": references.sources.tolist(),
    }
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    before = _arrays_of(manifest)
    _put(_arrays_file(folder, entries["arrays"]), arrays)
    _put(manifest, json.dumps(entries, indent=1).encode())
    if before not in (None, entries["arrays"]):
        _arrays_file(folder, before).unlink(missing_ok=True)


def load(folder: Path | str) -> ReferenceSet:
    """Reads a set and checks all of it: nothing that was changed, damaged or written by halves gets through.

    Raises:
      ValueError: a file is missing or damaged, or a field cannot be right; the message names path and field.
    """
    manifest = Path(folder) / MANIFEST
    entries = _read_manifest(manifest)
    arrays = _read_arrays(_arrays_file(Path(folder), entries["arrays"]), entries["arrays"])
    inputs = {name.removeprefix("inputs."): arrays.pop(name) for name in list(arrays) if name.startswith("inputs.")}
    expected = set(LAYOUT) - ({"optimised"} - arrays.keys())
    if arrays.keys() != expected:
        raise ValueError(f"{manifest}: the arrays are {sorted(arrays)}; they must be {sorted(expected)}.")
    readout = Readout(arrays.pop("readout.weight"), arrays.pop("readout.offset"))
    fields = {field: entries[field] for field in ("ids", "sources", *METADATA)}
    try:
        references = ReferenceSet(readout=readout, inputs=inputs, **arrays, **fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{manifest}: {error}") from error
    if references.fingerprint != entries["fingerprint"]:
        raise ValueError(f"{manifest}: fingerprint does not match the contents; restore the folder from a copy.")
    return references


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: does not exist; this is no reference set, or one whose save never ended.") from None
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); restore the folder from a copy.") from error
    if not isinstance(entries, dict) or entries.get("schema") != SCHEMA:
        schema = entries.get("schema") if isinstance(entries, dict) else None
        raise ValueError(f"{path}: schema is {schema!r}; this version reads {SCHEMA}, build the set anew.")
    kinds = dict.fromkeys(("fingerprint", "arrays"), str) | dict.fromkeys(("ids", "sources", *METADATA), list)
    for field, kind in (kinds | {"model": str, "embedder": str}).items():
        if not isinstance(entries.get(field), kind):
            raise ValueError(f"{path}: {field} is missing or no {kind.__name__}; restore the folder from a copy.")
    if not re.fullmatch("[0-9a-f]{64}", entries["arrays"]):  # it becomes part of a path
        raise ValueError(f"{path}: arrays is no SHA-256 hash; restore the folder from a copy.")
    return entries


def _read_arrays(path: Path, digest: str) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); restore the folder from a copy.") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{path}: is damaged, its hash is not what {MANIFEST} says; restore the folder from a copy.")
    return safetensors.numpy.load(content)


def _arrays_of(manifest: Path) -> str | None:
    """Returns the hash of the arrays of the set that is about to be replaced; None where there is no sound one."""
    try:
        return _read_manifest(manifest)["arrays"]
    except ValueError:
        return None


def _arrays_file(folder: Path, digest: str) -> Path:
    return folder / f"arrays-{digest[:16]}.safetensors"


def _put(path: Path, content: bytes) -> None:
    """Writes a file that is there as a whole or not at all, also after a power cut."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
