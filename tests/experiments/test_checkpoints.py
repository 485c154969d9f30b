"""Checkpoints lose nothing and hide nothing: what is restored is what was saved, or a sentence says why not."""

import json
import logging
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from experiments.checkpoints import Checkpoints, __main__, disk, manifest, peers, saver, show, store
from experiments.cli import UserError
from experiments.reliability.corruptions import CORRUPTIONS, corrupt

ARRAYS = "ocdbt.process_0/d"  # where orbax writes them


def make_state(step: int) -> dict:
    """Parameters in two precisions, a NaN among them, their optimizer, and a count."""
    weight = np.arange(4096, dtype=np.float32).reshape(64, 64) * step
    weight[3, 4] = np.nan
    params = {"layer": {"weight": jnp.asarray(weight), "bias": jnp.full(3, step / 3, jnp.bfloat16)}, "none": {}}
    return {"params": params, "opt_state": optax.adamw(1e-3).init(params), "step": jnp.int32(step)}


def bits(state) -> list[tuple]:
    """Paths, dtypes, shapes and bytes, so that even NaNs compare."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return [(str(path), x.dtype, x.shape, np.asarray(x).tobytes()) for path, x in leaves]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the steps 10, 20 and 30."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, make_state(step), mesh={"data": 2, "tensor": 1})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it to be spoilt."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def arrays_file(folder: Path, step: int) -> Path:
    return max((folder / str(step) / ARRAYS).iterdir(), key=lambda file: file.stat().st_size)


def spoil(folder: Path, step: int) -> None:
    file = arrays_file(folder, step)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, object]:
    """Everything about a folder that could have been touched."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }


# Saving


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
    monkeypatch.setattr(manifest, "write", observed(manifest.write, lambda: moments.append(names(tmp_path))))
    monkeypatch.setattr(disk, "delete_older", observed(disk.delete_older, lambda: moments.append(names(tmp_path))))
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


# What a kill leaves


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


# Damage


def check_found_or_harmless(folder: Path, what: str) -> None:
    """The state taken must be the one saved at its step, and something be said if it is not the newest."""
    told = []
    with Checkpoints(folder) as checkpoints:
        state, step = checkpoints.newest(make_state(0), told.append)
        assert bits(state) == bits(make_state(step)), what
        assert step == 30 or told, what
        for line in told:
            assert "\n" not in line and line.endswith(f"step {step} is taken instead."), (what, line)
        checkpoints.save(40, make_state(40))
    assert disk.sealed(folder)[-1] == 40, what


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_kind_of_damage_is_found_or_harmless(name, folder):
    check_found_or_harmless(folder, CORRUPTIONS[name](random.Random(0), folder))


def test_a_hundred_corruptions_are_found_or_harmless(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoints, "save", lambda *_: None)  # that it can go on is tested above
    monkeypatch.setattr(disk, "sealed", lambda _: [40])
    for seed in range(100):
        folder = shutil.copytree(saved, tmp_path / "checkpoints")
        check_found_or_harmless(folder, f"seed {seed}: {corrupt(random.Random(seed), folder)}")
        shutil.rmtree(folder)


def test_what_file_browsers_leave_does_no_harm(folder):
    (folder / "30" / ".DS_Store").write_text("left")
    (folder / "30" / ARRAYS / ".nfs0001").write_text("left")
    assert Checkpoints.open(folder).newest(make_state(0), pytest.fail)[1] == 30


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is not what was written"),
        (lambda folder: (folder / "manifest.json").write_text("[" * 10**5), "manifest.json is not what was written"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff"), "manifest.json is not what was written"),
        (
            lambda folder: shutil.copy(folder.parent / "20" / "manifest.json", folder),
            "manifest.json is the one of step 20",
        ),
        (lambda folder: (folder / "_METADATA").unlink(), "_METADATA is missing"),
        (lambda folder: (folder / "_METADATA").write_text(""), "_METADATA has 0 bytes, [0-9,]+ were saved"),
        (lambda folder: (folder / "more").write_text(""), "more was not saved with it"),
        (lambda folder: (folder / "more").symlink_to(folder.parent), "more was not saved with it"),
        (lambda folder: spoil(folder.parent, 30), f"{ARRAYS}/[0-9a-f]+ does not hold the bytes that were saved"),
    ],
)
def test_the_line_names_the_checkpoint_the_file_the_damage_and_what_is_taken(spoil, sentence, folder):
    spoil(folder / "30")
    told = []
    assert Checkpoints(folder).newest(make_state(0), told.append)[1] == 20
    here = re.escape(str(folder))
    expected = f"{here}/30 is damaged: {sentence}; it is kept as {here}/damaged/30-1, and step 20 is taken instead."
    assert len(told) == 1 and re.fullmatch(expected, told[0]), told


def test_a_file_that_cannot_be_read_is_damage_not_a_crash(folder, monkeypatch):
    def refuse(file):
        if "/30/" in str(file):
            raise PermissionError(13, "Permission denied", str(file))
        return "0" * 32

    monkeypatch.setattr(manifest, "digest", refuse)
    with pytest.raises(UserError, match=r"30 is damaged: \S+ cannot be read \(Permission denied\)"):
        Checkpoints.open(folder).restore(30, make_state(0))


def test_only_what_was_sealed_counts_as_a_checkpoint(folder):
    (folder / "20" / "manifest.json").unlink()
    (folder / "40").mkdir()
    (folder / "050").mkdir()
    checkpoints = Checkpoints.open(folder)
    assert (checkpoints.steps(), checkpoints.latest_step()) == ([10, 30], 30)


def test_nothing_is_read_before_it_is_verified(folder, monkeypatch):
    monkeypatch.setattr(saver, "read", lambda *_: pytest.fail("read"))
    spoil(folder, 30)
    with pytest.raises(UserError, match=r"is damaged: .*; take another, there are \[10, 20\]"):
        Checkpoints.open(folder).restore(30, make_state(0))


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(saved):
    with pytest.raises(UserError, match=r"has no checkpoint 40; take another, there are \[10, 20, 30\]"):
        Checkpoints.open(saved).restore(40, make_state(0))


def test_if_all_are_damaged_training_does_not_start_from_the_beginning_and_nothing_is_moved(folder):
    for step in (10, 20, 30):
        spoil(folder, step)
    before = contents(folder)
    for _ in range(2):
        with pytest.raises(UserError, match=r"every checkpoint in .* is damaged, step 30 because .*; put a copy back"):
            Checkpoints(folder).newest(make_state(0), pytest.fail)
    assert contents(folder) == before


def test_checkpoints_that_were_set_aside_or_renamed_are_not_forgotten(folder):
    for step in ("10", "20"):
        shutil.rmtree(folder / step)
    (folder / "30").rename(folder / "30.bak")
    with pytest.raises(UserError, match=r"under the name of its step, but others; put one back"):
        Checkpoints(folder).newest(make_state(0), pytest.fail)
    (folder / "damaged").mkdir()
    (folder / "30.bak").rename(folder / "damaged" / "30-1")
    with pytest.raises(UserError, match=r"under the name of its step, but others; put one back"):
        Checkpoints(folder).newest(make_state(0), pytest.fail)


@pytest.mark.parametrize("damaged", [False, True])
def test_opened_to_read_nothing_is_touched(damaged, folder):
    if damaged:
        spoil(folder, 30)
    (folder / "40.unsealed").mkdir()
    before = contents(folder)
    told = []
    with Checkpoints.open(folder) as checkpoints:
        assert checkpoints.newest(make_state(0), told.append)[1] == (20 if damaged else 30)
        checkpoints.restore(20, make_state(0))
    assert contents(folder) == before
    assert len(told) == 1 + damaged


def test_a_folder_that_is_not_there_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match="does not exist; there is no checkpoint to load"):
        Checkpoints.open(tmp_path / "none")


# What is asked for


def with_weight(weight) -> dict:
    state = make_state(0)
    state["params"]["layer"]["weight"] = weight
    return state


@pytest.mark.parametrize(
    ("like", "sentence"),
    [
        (
            with_weight(jnp.zeros((64, 65))),
            r"30 holds params/layer/weight in the shape \(64, 64\), and \(64, 65\) is asked for; give the sizes",
        ),
        (
            with_weight(jnp.zeros((64, 64), jnp.bfloat16)),
            r"30 holds params/layer/weight in float32, and bfloat16 is asked for; .* or pass cast=True",
        ),
        (
            make_state(0) | {"more": jnp.zeros(2)},
            r"30 has no more float32\[2\], which is asked for; give the model and optimizer",
        ),
        (
            {key: value for key, value in make_state(0).items() if key != "step"},
            r"30 holds step int32\[\], which is not asked for; give the model and optimizer",
        ),
        (
            make_state(0) | {"opt_state": optax.sgd(1e-3).init({})},
            r"30 holds opt_state/0/count int32\[\], which is not asked for",
        ),
    ],
    ids=["shape", "dtype", "missing", "extra", "optimizer"],
)
def test_another_tree_is_refused_before_anything_is_read(like, sentence, saved, monkeypatch):
    monkeypatch.setattr(saver, "read", lambda *_: pytest.fail("read"))
    checkpoints = Checkpoints.open(saved)
    for call in (lambda: checkpoints.restore(30, like), lambda: checkpoints.newest(like, pytest.fail)):
        with pytest.raises(UserError, match=sentence):
            call()


def test_a_dtype_is_converted_when_that_is_asked_for(saved):
    like = with_weight(jnp.zeros((64, 64), jnp.bfloat16))
    weight = Checkpoints.open(saved).restore(30, like, cast=True)["params"]["layer"]["weight"]
    expected = make_state(30)["params"]["layer"]["weight"].astype(jnp.bfloat16)
    assert weight.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(weight, np.float32), np.asarray(expected, np.float32))


def test_arrays_are_restored_onto_another_mesh(tmp_path):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    alone = SingleDeviceSharding(jax.devices()[1])
    rows = np.arange(32.0, dtype=np.float32).reshape(8, 4)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step, sharding in enumerate((split, whole, alone)):
            checkpoints.save(step, {"rows": jax.device_put(rows, sharding)})
        for step in range(3):
            for sharding in (split, whole, alone):
                like = {"rows": jax.ShapeDtypeStruct((8, 4), np.float32, sharding=sharding)}
                restored = checkpoints.restore(step, like)["rows"]
                assert restored.sharding == sharding
                np.testing.assert_array_equal(restored, rows)


# What fails


@pytest.fixture
def files_may_not_grow():
    """The operating system refuses to write past a megabyte of any file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up_is_told_once_and_the_same_step_can_be_saved_again(folder, files_may_not_grow, caplog):
    big = {"x": np.random.default_rng(0).random(1 << 18)}
    with Checkpoints(folder, keep=3) as checkpoints:
        checkpoints.save(40, big)
        with pytest.raises(UserError, match=r"could not be written to .* \(File too large\); those before it are int"):
            checkpoints.wait()
        checkpoints.wait()
        assert names(folder) == ["10", "20", "30"]
        files_may_not_grow()
        checkpoints.save(40, big)
        checkpoints.wait()
        assert checkpoints.steps() == [20, 30, 40]
        np.testing.assert_array_equal(checkpoints.restore(40, big)["x"], big["x"])
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]  # said once, not logged thrice


@pytest.mark.parametrize("ends", ["save", "close"])
def test_what_fails_in_the_background_is_told_at_the_next_call(ends, folder, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(folder, keep=3)
    monkeypatch.setattr(manifest, "write", refuse)
    checkpoints.save(40, make_state(40))
    with pytest.raises(UserError, match=r"\(No space left on device\)"):
        if ends == "close":
            checkpoints.__exit__(None, None, None)
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
    with Checkpoints(folder) as checkpoints, pytest.raises(UserError, match="MiB left, a checkpoint needs"):
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


# Several processes


def test_processes_share_the_reading_and_leave_no_file_out(monkeypatch):
    sizes = {f"file {n}": n * n for n in range(40)}
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    shares = []
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        shares.append(peers.share(sizes))
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) < 1.02 * min(loads)


def test_two_processes_save_and_take_the_same_and_one_reads_what_they_saved(tmp_path):
    rows = np.arange(4096 * 8, dtype=np.float32).reshape(4096, 8)
    like = {"matrix": rows, "step": np.int32(0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"matrix": rows + 1, "step": np.int32(1)})
    first, second = run_savers(tmp_path, processes=2, devices=2)
    for report in (first, second):
        assert report["first"] == [1, True]
        assert report["after"] == [3, True]
        assert report["steps"] == report["again"] == [3, 4]
        assert "every checkpoint in" in report["refused"]
    (line,) = first["told"]
    assert "4 is damaged: ocdbt.process_" in line and line.endswith("step 3 is taken instead.")
    assert second["told"] == []
    for step in (3, 4):
        restored = Checkpoints.open(tmp_path).restore(step, like)
        np.testing.assert_array_equal(restored["matrix"], rows + step)


def run_savers(folder: Path, processes: int, devices: int) -> list[dict]:
    """Runs savers.py as so many processes and returns what they report; none outlives this."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("savers.py")
    started = [
        subprocess.Popen(
            [sys.executable, script, *map(str, (port, process, processes, devices)), folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=90) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, outputs
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


# Looking


def shown(capsys, path: Path, *, quick: bool = False) -> list[list[str]]:
    __main__.main(__main__.ShowConfig(path=path, quick=quick))
    return [line.split("  ") for line in capsys.readouterr().out.splitlines()]


def test_a_table_shows_every_checkpoint_of_a_run(folder, capsys):
    for path in (folder, folder.parent):
        titles, *rows = shown(capsys, path)
        assert [cell.strip() for cell in titles if cell] == list(show.TITLES)
        cells = [[cell.strip() for cell in row if cell] for row in rows]
        assert [row[0] for row in cells] == ["10", "20", "30"]
        assert all(row[3:] == ["8", "4,099", "bfloat16, float32, int32", "data 2", "verified"] for row in cells)
    assert shown(capsys, folder, quick=True)[1][-1] == "not read"


def test_one_checkpoint_is_shown_with_its_arrays(folder, capsys):
    lines = shown(capsys, folder / "20")
    cells = [[cell.strip() for cell in line if cell] for line in lines]
    assert ["1 x", "params/layer/weight", "float32", "64 x 64"] in cells
    assert ["1 x", "step", "int32", "scalar"] in cells


def test_arrays_that_differ_in_a_number_share_a_line():
    shapes = [manifest.Array(f"layers/{n}/kernel", (2, 3), "float32") for n in range(12)]
    shapes += [manifest.Array(f"opt/{n}/count", (), "int32") for n in (0, 2)]
    lines = show.arrays(manifest.Manifest(1, 0.0, {}, shapes, {}))
    assert [line.split() for line in lines[1:]] == [
        ["12", "x", "layers/{0-11}/kernel", "float32", "2", "x", "3"],
        ["2", "x", "opt/{0,2}/count", "int32", "scalar"],
    ]


def test_damage_is_shown_with_exit_status_1_and_so_is_what_else_lies_there(folder, capsys):
    spoil(folder, 20)
    (folder / "30" / "manifest.json").unlink()
    (folder / "40.unsealed").mkdir()
    (folder / "10").rename(folder / "10.bak")
    before = contents(folder)
    with pytest.raises(SystemExit, match="1"):
        shown(capsys, folder)
    out = capsys.readouterr().out
    assert "does not hold the bytes that were saved" in out and "manifest.json is missing" in out
    assert "step 40 is being saved" in out and "10.bak is not under the name of a step" in out
    assert contents(folder) == before


def test_a_path_without_checkpoints_ends_in_a_sentence(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"^path: .*; give a run's folder, its checkpoints, or one of them\.$"):
            shown(capsys, path)


def test_looking_needs_neither_orbax_nor_a_device(saved):
    code = (
        "import sys; from experiments.checkpoints import __main__ as main; from pathlib import Path;"
        "main.main(main.ShowConfig(path=Path(sys.argv[1]))); assert 'orbax' not in sys.modules;"
        "from jax._src import xla_bridge; assert not xla_bridge._backends"
    )
    done = subprocess.run([sys.executable, "-c", code, saved], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
