"""What is saved is there once it is whole, whatever ends the process, and a failure is told once."""

import logging
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.checkpoints import Checkpoints, disk, manifest, store
from experiments.cli import UserError
from tests.experiments.checkpoints.states import bits, contents, make_state, names, spoil


def test_what_was_saved_is_restored_bit_for_bit_in_the_same_tree(saved):
    for step in (10, 20, 30):
        state = make_state(step)
        restored = Checkpoints.open(saved).restore(step, jax.eval_shape(lambda state=state: state))
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert bits(restored) == bits(state)


def test_the_newest_is_taken_and_nothing_is_said_of_it(saved):
    told = []
    state, step = Checkpoints.open(saved).newest(make_state(0), told.append)
    assert (step, told, bits(state)) == (30, [], bits(make_state(30)))


def test_a_folder_without_checkpoints_has_no_newest(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.newest(make_state(0), pytest.fail) is None
        assert checkpoints.latest_step() is None


def test_arrays_may_be_donated_or_overwritten_as_soon_as_save_returns(tmp_path):
    device, host = jnp.zeros((512, 1024)), np.zeros((512, 1024))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"device": device, "host": host})
        host[:] = 1
        for _ in range(3):
            device = jax.jit(lambda x: x + 1, donate_argnums=0)(device)
    restored = Checkpoints.open(tmp_path).restore(1, {"device": device, "host": host})
    assert not np.any(restored["device"]) and not np.any(restored["host"])


def test_only_so_many_are_kept_and_the_older_goes_after_the_newer_is_sealed(tmp_path, monkeypatch):
    moments = []

    def look():
        moments.append([name.split("-")[0] for name in names(tmp_path)])  # a draft's name ends in the number of its try

    monkeypatch.setattr(manifest, "write", observed(manifest.write, look))
    monkeypatch.setattr(disk, "delete_older", observed(disk.delete_older, look))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step))
            checkpoints.wait()
            assert checkpoints.steps() == [step]
    assert moments == [["1.unsealed"], ["1"], ["1", "2.unsealed"], ["1", "2"]]
    assert names(tmp_path) == ["2"]


def observed(function, note):
    def call(*arguments):
        note()
        return function(*arguments)

    return call


def test_a_checkpoint_is_not_there_before_it_is_sealed(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        seen = []
        monkeypatch.setattr(manifest, "write", observed(manifest.write, lambda: seen.extend(checkpoints.steps())))
        checkpoints.save(1, make_state(1))
        checkpoints.wait()
        assert (seen, checkpoints.steps()) == ([], [1])


def test_what_is_being_saved_is_waited_for_when_the_newest_is_asked_for(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1))
        assert checkpoints.newest(make_state(0), pytest.fail)[1] == 1


def test_saving_does_not_wait_for_digests(tmp_path, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(manifest, "digest", observed(manifest.digest, lambda: gate.wait(1)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1))
        assert checkpoints.steps() == []
        gate.set()
    assert disk.sealed(tmp_path) == [1]


def test_a_step_that_is_whole_is_left_and_a_damaged_one_gives_way(folder):
    before = contents(folder / "20")
    spoil(folder, 30)
    with Checkpoints(folder, keep=3) as checkpoints:
        checkpoints.save(20, make_state(21))
        checkpoints.save(30, make_state(31))
    assert contents(folder / "20") == before
    assert bits(Checkpoints.open(folder).restore(30, make_state(0))) == bits(make_state(31))
    assert names(folder / "damaged") == ["30-1"]


def test_a_run_killed_while_sealing_goes_on_from_the_step_before_and_leaves_no_litter(folder):
    (folder / "30").rename(folder / "30.unsealed")
    (folder / "30.unsealed" / "manifest.json").unlink()
    (folder / "10").rename(folder / "10.deleted")
    (folder / "40.unsealed.orbax-checkpoint-tmp").mkdir()
    (folder / "5.unsealed").mkdir()  # long overtaken, so not worth a word
    told = []
    with Checkpoints(folder, keep=3) as checkpoints:
        state, step = checkpoints.newest(make_state(0), told.append)
        assert (step, bits(state)) == (20, bits(make_state(20)))
        checkpoints.save(30, make_state(30))
    assert told == [
        f"{folder}/{step} was still being saved when the run ended; step 20 is taken instead." for step in (30, 40)
    ]
    assert names(folder) == ["20", "30"]


def test_a_run_killed_in_its_first_save_starts_from_the_beginning_and_says_so(folder):
    (folder / "10").rename(folder / "10.unsealed")
    for step in ("20", "30"):
        shutil.rmtree(folder / step)
    told = []
    assert Checkpoints(folder).newest(make_state(0), told.append) is None
    assert told == [f"{folder}/10 was still being saved when the run ended; training starts from the beginning."]


@pytest.fixture
def files_may_not_grow():
    """The operating system refuses to write past a megabyte of any file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_told_once_and_the_same_step_can_be_saved_again(folder, files_may_not_grow, caplog, capfd):
    big = {f"x{n}": np.random.default_rng(n).random(1 << 12 + n) for n in range(7)}  # some are small enough
    with Checkpoints(folder, keep=3) as checkpoints:
        checkpoints.save(40, big)
        with pytest.raises(UserError, match=r"could not be written to .* \(File too large\); those before it are int"):
            checkpoints.wait()
        checkpoints.wait()
        assert checkpoints.steps() == [10, 20, 30]
        files_may_not_grow()
        checkpoints.save(40, big)
        checkpoints.wait()
        assert checkpoints.steps() == [20, 30, 40]
        np.testing.assert_array_equal(checkpoints.restore(40, big)["x6"], big["x6"])
    assert capfd.readouterr().err == ""  # said once, not printed and logged by everyone who noticed
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_writer_that_comes_back_after_its_save_has_failed_spoils_no_later_one(folder, monkeypatch):
    drafts, write = [], manifest.write

    def write_late(draft, content):
        drafts.append(draft)
        if len(drafts) == 1:
            raise OSError(28, "No space left on device")
        if len(drafts) == 2:
            drafts[0].mkdir(exist_ok=True)
            (drafts[0] / "late").write_text("of the first try")
        write(draft, content)

    monkeypatch.setattr(manifest, "write", write_late)
    with Checkpoints(folder, keep=3) as checkpoints:
        checkpoints.save(40, make_state(40))
        with pytest.raises(UserError, match="No space left"):
            checkpoints.wait()
        checkpoints.save(40, make_state(41))
        checkpoints.wait()
        assert bits(checkpoints.restore(40, make_state(0))) == bits(make_state(41))
        checkpoints.save(50, make_state(50))
    assert names(folder) == ["30", "40", "50"]  # what the first try left is swept away by the next save


@pytest.mark.parametrize("ends", ["check", "save", "close"])
def test_what_fails_in_the_background_is_told_at_the_next_call(ends, folder, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(folder, keep=3)
    monkeypatch.setattr(manifest, "write", refuse)
    checkpoints.save(40, make_state(40))
    with pytest.raises(UserError, match=r"\(No space left on device\)"):
        if ends == "close":
            checkpoints.__exit__(None, None, None)
        while ends == "check":
            checkpoints.check()
        checkpoints.save(50, make_state(50))
    assert names(folder) == ["10", "20", "30"]


def test_a_failed_save_does_not_hide_the_mistake_that_ended_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"the loss is not finite. Besides, output: .*No space left"):  # noqa: SIM117
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, make_state(1))
            raise UserError("optimizer: the loss is not finite.")


def test_a_disk_without_room_is_told_before_anything_is_written(folder, monkeypatch):
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with (
        Checkpoints(folder) as checkpoints,
        pytest.raises(UserError, match="has 0 B left, a checkpoint needs 48 KiB; make"),
    ):
        checkpoints.save(40, make_state(40))
    assert names(folder) == ["10", "20", "30"]


def test_two_arrays_that_orbax_would_take_for_one_are_refused(tmp_path):
    twins = {"a.b": jnp.ones(1), "a": {"b": jnp.zeros(1)}}
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=r"two arrays are called a\.b"):
        checkpoints.save(1, twins)


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output: .* cannot be made"):
        Checkpoints(tmp_path / "file" / "checkpoints")
