"""What is digested while it is written is digested once, and what changes afterwards is digested again."""

import errno
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.checkpoints import Checkpoints, disk, manifest, saver, writing
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
    written.look(tmp_path.rglob("*"))
    assert digested == []  # it may still grow
    written.look(tmp_path.rglob("*"))
    written.look(tmp_path.rglob("*"))
    assert digested == ["large"]
    (tmp_path / "draft").rename(tmp_path / "1")
    found = written.digest(tmp_path / "1" / "large")
    assert digested == ["large"]
    assert found == manifest.digest(tmp_path / "1" / "large")


def grow(file):
    with file.open("ab") as stream:
        stream.write(b"a")


def replace(file):
    other = file.with_name("other")
    other.write_bytes(OTHER)
    other.rename(file)


@pytest.mark.parametrize(
    ("change", "later"),
    [(grow, 0), (replace, 0), (lambda file: file.write_bytes(OTHER), 1)],
    ids=["size", "file", "time"],
)
def test_a_file_of_another_size_place_or_time_is_digested_again(tmp_path, change, later):
    written, file = Written(), tmp_path / "large"
    file.write_bytes(LARGE)
    for _ in range(2):
        written.look(tmp_path.rglob("*"))
    time = file.stat().st_mtime_ns
    change(file)
    os.utime(file, ns=(time, time + later))
    assert written.digest(file) == manifest.digest(file)


def test_files_of_one_moment_have_digests_of_their_own(tmp_path):
    written, files = Written(), [tmp_path / "one", tmp_path / "two"]
    for file, content in zip(files, (LARGE, OTHER), strict=True):
        file.write_bytes(content)
        os.utime(file, ns=(7, 7))
    for _ in range(2):
        written.look(tmp_path.rglob("*"))
    assert [written.digest(file) for file in files] == [manifest.digest(file) for file in files]


def test_a_file_that_grows_is_left_until_it_rests(tmp_path, digested):
    written, file = Written(), tmp_path / "large"
    for size in range(3):
        file.write_bytes(LARGE + bytes(size))
        written.look(tmp_path.rglob("*"))
    assert digested == []


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be told to forget")
def test_memory_is_given_back_after_the_digest_and_the_content_stays(tmp_path, monkeypatch):
    told, file, written = [], tmp_path / "large", Written()
    monkeypatch.setattr(os, "fsync", lambda descriptor: told.append("sync"))  # memory that is not yet on disk stays
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, *what: told.append(what))
    file.write_bytes(LARGE)
    for _ in range(3):
        written.look(tmp_path.rglob("*"))
    assert told == ["sync", (0, 0, os.POSIX_FADV_DONTNEED)]
    assert file.read_bytes() == LARGE


def test_what_is_written_is_digested_and_forgotten_while_the_rest_is_awaited(tmp_path, monkeypatch):
    forgotten, finish = threading.Event(), ocp.AsyncCheckpointer.wait_until_finished

    def finish_late(self):
        if threading.current_thread().name.startswith("seal"):  # a save begins by waiting for the one before
            assert forgotten.wait(60)
        finish(self)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", finish_late)
    monkeypatch.setattr(writing, "_forget", lambda file: forgotten.set())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(1 << 20)})


def test_a_look_that_fails_costs_nothing(tmp_path, monkeypatch):
    def fail(self, files):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(writing.Written, "look", fail)
    monkeypatch.setattr(saver, "wait", late(saver.wait))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(7)})
    assert checkpoints.steps() == [1]


def late(wait):
    """Says once that nothing is done, however fast it was."""
    answers = [SimpleNamespace(done=set())]
    return lambda *arguments, **options: answers.pop() if answers else wait(*arguments, **options)


def test_what_was_begun_is_sealed_though_closed_at_once(tmp_path):
    for step in range(20):
        one = saver.Saver(tmp_path, keep=99)
        one.start(step, {"x": jnp.zeros(7)}, {})
        one.close()
    assert disk.sealed(tmp_path) == list(range(20))


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


def test_a_part_of_the_manifest_that_another_process_is_just_renaming_is_not_looked_at(tmp_path, monkeypatch):
    (tmp_path / "array").write_bytes(b"123")
    part = tmp_path / f"{manifest.NAME}.1.draft"
    part.write_text("{}")
    is_file = Path.is_file

    def and_gone(path: Path) -> bool:
        there = is_file(path)
        if path == part:
            part.unlink()
        return there

    monkeypatch.setattr(Path, "is_file", and_gone)
    assert manifest.sizes(tmp_path) == {"array": 3}
