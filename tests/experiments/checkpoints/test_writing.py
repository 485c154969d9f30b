"""What is digested while it is written is digested once, and what changes afterwards is digested again."""

import os

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.checkpoints import Checkpoints, manifest, saver
from experiments.checkpoints.writing import FILE_BYTES, Written
from tests.experiments.checkpoints.states import bits

LARGE, OTHER = b"a" * (1 << 20), b"b" * (1 << 20)


@pytest.fixture
def digested(monkeypatch):
    """The names of the files that are digested."""
    names, digest = [], manifest.digest

    def noted(file):
        names.append(file.name)
        return digest(file)

    monkeypatch.setattr(manifest, "digest", noted)
    return names


def test_a_file_that_rests_is_digested_once_whatever_its_name_becomes(tmp_path, digested):
    written = Written()
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "large").write_bytes(LARGE)
    (tmp_path / "draft" / "small").write_bytes(LARGE[1:])
    written.look(tmp_path)
    assert digested == []  # it may still grow
    written.look(tmp_path)
    written.look(tmp_path)
    assert digested == ["large"]
    (tmp_path / "draft").rename(tmp_path / "1")
    found = written.digest(tmp_path / "1" / "large")
    assert digested == ["large"]
    assert found == manifest.digest(tmp_path / "1" / "large")


@pytest.mark.parametrize("change", [lambda file: file.write_bytes(OTHER), lambda file: file.write_bytes(LARGE + b"a")])
def test_a_file_that_changes_after_a_look_is_digested_again(tmp_path, change):
    written, file = Written(), tmp_path / "large"
    file.write_bytes(LARGE)
    for _ in range(2):
        written.look(tmp_path)
    change(file)
    os.utime(file, ns=(1, 1))  # the clocks of some file systems are coarse
    assert written.digest(file) == manifest.digest(file)


def test_a_file_that_grows_is_left_until_it_rests(tmp_path, digested):
    written, file = Written(), tmp_path / "large"
    for size in range(3):
        file.write_bytes(LARGE + bytes(size))
        written.look(tmp_path)
    assert digested == []


def test_a_file_that_goes_while_it_is_looked_at_is_no_failure(tmp_path, monkeypatch):
    written, file = Written(), tmp_path / "large"
    file.write_bytes(LARGE)
    written.look(tmp_path)
    monkeypatch.setattr(manifest, "digest", lambda file: file.unlink() or "none")
    written.look(tmp_path)
    assert not file.exists()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be told to forget")
def test_memory_is_given_back_after_the_digest_and_the_content_stays(tmp_path, monkeypatch):
    forgotten, file, written = [], tmp_path / "large", Written()
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, *what: forgotten.append(what))
    file.write_bytes(LARGE)
    for _ in range(3):
        written.look(tmp_path)
    assert forgotten == [(0, 0, os.POSIX_FADV_DONTNEED)]
    assert file.read_bytes() == LARGE


def test_an_array_larger_than_all_that_may_travel_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "TRAVELLING_BYTES", 1000)
    states = [{"x": jnp.arange(n, dtype=jnp.float32), "y": np.arange(7)} for n in (10, 1000, 250, 2000)]
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step, state in enumerate(states):
            checkpoints.save(step, state)
    for step, state in enumerate(states):
        assert bits(Checkpoints.open(tmp_path).restore(step, state)) == bits(state)


def test_a_state_of_several_files_is_saved_with_the_digest_of_each(tmp_path):
    state = {"x": jnp.arange(FILE_BYTES // 2, dtype=jnp.float32)}  # two files and more
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    sizes = manifest.sizes(tmp_path / "1")
    assert max(sizes.values()) < 2 * FILE_BYTES
    assert sum(size >= FILE_BYTES // 2 for size in sizes.values()) >= 2
    assert bits(Checkpoints.open(tmp_path).restore(1, state)) == bits(state)  # which verifies it
