"""No damage goes unseen: what is taken instead is said in one line that names the file."""

import random
import re
import shutil
from pathlib import Path

import pytest

from experiments.checkpoints import Checkpoints, disk, manifest, saver
from experiments.cli import UserError
from experiments.reliability.corruptions import CORRUPTIONS, corrupt
from tests.experiments.checkpoints.states import ARRAYS, bits, contents, make_state, spoil


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
