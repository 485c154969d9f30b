"""A set on disk is the old one or the new one and never half of each, comes back bit for bit, and is checked."""

import json
import os
import stat

import numpy as np
import pytest
import safetensors.numpy

from r2t2_jax import reference_files
from r2t2_jax.reference_files import MANIFEST, load, save
from r2t2_jax.references import Diff
from r2t2_jax.shapes import Readout
from tests.r2t2_jax.made_up import reference_set


def full_set(**fields):
    """A set that has everything a set can have."""
    plain = reference_set(**fields)
    offset = np.array(plain.readout.offset)
    offset[np.arange(12), (plain.labels + 1) % 4] = -np.inf
    inputs = {"image": np.arange(24, dtype=np.uint8).reshape(12, 2, 1), "mask": np.eye(12, dtype=bool)}
    return reference_set(
        optimised=plain.routing[::-1], readout=Readout(plain.readout.weight, offset), inputs=inputs, **fields
    )


@pytest.mark.parametrize(
    "references", [reference_set(ids=[f"é {i}" for i in range(12)]), full_set()], ids=["bare", "full"]
)
def test_a_set_comes_back_bit_for_bit(references, tmp_path):
    save(references, tmp_path / "set")
    again = load(tmp_path / "set")
    assert again.fingerprint == references.fingerprint
    assert references.diff(again) == Diff((), (), ())
    assert again.inputs.keys() == references.inputs.keys()
    for name, stored in references.inputs.items():
        np.testing.assert_array_equal(again.inputs[name], stored, strict=True)


def test_a_set_that_is_there_is_not_overwritten_by_accident(tmp_path):
    save(reference_set(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="there is a reference set already; pass overwrite=True"):
        save(reference_set(seed=1), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_overwriting_leaves_the_new_set_and_nothing_of_the_old(tmp_path):
    save(reference_set(), tmp_path)
    save(reference_set(seed=1), tmp_path, overwrite=True)
    assert load(tmp_path).fingerprint == reference_set(seed=1).fingerprint
    assert len(list(tmp_path.iterdir())) == 2
    save(reference_set(seed=1), tmp_path, overwrite=True)  # with the same arrays
    assert load(tmp_path).fingerprint == reference_set(seed=1).fingerprint


@pytest.mark.parametrize(
    ("step", "place", "survivor"),
    [("fsync", 1, 0), ("replace", 1, 0), ("fsync", 2, 0), ("fsync", 3, 0), ("replace", 2, 0), ("fsync", 4, 1)],
)
def test_a_writer_may_die_at_any_step(step, place, survivor, tmp_path, monkeypatch):
    save(reference_set(), tmp_path)
    steps, real = [], getattr(os, step)

    def die(*args):
        steps.append(args)
        if len(steps) == place:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, step, die)
    with pytest.raises(OSError, match="No space"):
        save(reference_set(seed=1), tmp_path, overwrite=True)
    assert load(tmp_path).fingerprint == reference_set(seed=survivor).fingerprint
    assert not list(tmp_path.glob("*partial*"))


def test_a_first_save_that_dies_leaves_no_set(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_files.json, "dumps", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(reference_set(), tmp_path)
    with pytest.raises(ValueError, match="does not exist; this is no reference set, or one whose save never ended"):
        load(tmp_path)


def test_only_its_owner_can_read_a_set(tmp_path):
    save(reference_set(), tmp_path / "set")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "set").iterdir()}
    assert modes == {0o600} and stat.S_IMODE((tmp_path / "set").stat().st_mode) == 0o700


def rewrite(folder, **changes):
    """Changes entries of the manifest; None removes one."""
    entries = json.loads((folder / MANIFEST).read_text()) | changes
    (folder / MANIFEST).write_text(json.dumps({k: v for k, v in entries.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema is 2; this version reads 1"),
        ({"schema": None}, "schema is None"),
        ({"ids": None}, "ids is missing or no list"),
        ({"embedder": 3}, "embedder is missing or no str"),
        ({"arrays": "../../secret"}, "arrays is no SHA-256"),
        ({"arrays": "0" * 64}, "arrays-0000000000000000.safetensors: cannot be read"),
        ({"fingerprint": "0" * 64}, "fingerprint does not match"),
        ({"embedder": "another"}, "fingerprint does not match"),
        ({"sources": ["a"] * 12}, "fingerprint does not match"),
        ({"ids": ["a"] * 12}, "references.json: references: the id 'a' occurs more than once"),
        ({"ids": list(range(12))}, "references.json: references: ids must be a sequence of strings"),
        ({"answers": ["one"]}, "labels of .* is not an index of the 1 answers"),
        ({"groups": [5, "0"]}, "groups=.* must be integers"),
        ({"groups": [5]}, "routing of .* is not non-negative with sum 1"),
    ],
    ids=str,
)
def test_a_manifest_that_cannot_be_right_is_refused(changes, message, tmp_path):
    save(reference_set(), tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_a_manifest_that_is_no_json_object_is_refused(content, tmp_path):
    save(reference_set(), tmp_path)
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match=r"references.json: (is not JSON|schema is None)"):
        load(tmp_path)
    save(reference_set(), tmp_path, overwrite=True)
    assert load(tmp_path)


def test_a_flipped_bit_in_the_arrays_is_found(tmp_path):
    save(reference_set(), tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged, its hash is not what references.json says"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("features"), "the arrays are .*; they must be"),
        (lambda arrays: arrays.update(more=np.ones(3)), "the arrays are .*more.*; they must be"),
        (lambda arrays: arrays["embedding"].__setitem__((0, 0), np.nan), "embedding of 'r0' is not finite"),
        (lambda arrays: arrays["embedding"].__imul__(2), "embedding of .* is not of unit length"),
        (lambda arrays: arrays["routing"].__imul__(2), "routing of .* is not non-negative"),
        (lambda arrays: arrays.update(correct=np.ones(12)), "correct has dtype float64"),
        (lambda arrays: arrays.update(labels=np.zeros(3, int)), r"labels has shape \(3,\)"),
    ],
)
def test_arrays_that_cannot_be_right_are_refused_even_if_their_hash_is(change, message, tmp_path, monkeypatch):
    save(reference_set(), tmp_path)
    arrays = {
        name: np.array(x) for name, x in safetensors.numpy.load_file(next(tmp_path.glob("*.safetensors"))).items()
    }
    change(arrays)
    monkeypatch.setattr(reference_files, "stored_arrays", lambda references: arrays)
    save(reference_set(), tmp_path, overwrite=True)
    with pytest.raises(ValueError, match=f"references.json: .*{message}"):
        load(tmp_path)
