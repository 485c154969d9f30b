"""Building shards: the same bytes however often it was killed, and no surprise for the user."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import cli
from experiments.cli import UserError
from experiments.data import __main__ as command
from experiments.data import build as build_module
from experiments.data.build import BuildConfig, build
from experiments.data.draft import claimed
from tests.experiments.vocabularies import words_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def text(tmp_path):
    """A folder of sixty short texts."""
    (tmp_path / "text").mkdir()
    for i in range(60):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i}: " + "17: and 4: words äöü " * (i % 5 + 1))
    return tmp_path / "text"


def config_for(text, output, **changes) -> BuildConfig:
    return BuildConfig(**({"source": str(text), "output": output, "held_out": 0.3, "shard_tokens": 1000} | changes))


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_build_killed_at_any_moment_goes_on_to_the_same_bytes(text, tmp_path):
    tokenizer = words_file(tmp_path / "words.json", 100)
    script = [
        sys.executable,
        str(Path(__file__).with_name("builders.py")),
        str(text),
        str(tokenizer),
        str(tmp_path / "b"),
    ]
    done = subprocess.run(script, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills, hunts = (int(word) for word in done.stdout.splitlines()[-1].split())
    assert kills > 25 and hunts > 10
    expected = content(tmp_path / "b" / "undisturbed")
    assert sum(name.startswith("train-") for name in expected) >= 3 and "index.json" in expected
    for name in (*map(str, range(kills + 1)), "hunted"):
        assert content(tmp_path / "b" / name) == expected, name


def interrupt(monkeypatch, after: int, error: BaseException) -> None:
    """Makes the build end with an error when so many pairs of files are written."""
    add_pair, calls = build_module.add_pair, []

    def add_or_fail(*args):
        calls.append(args)
        if len(calls) > after:
            raise error
        return add_pair(*args)

    monkeypatch.setattr(build_module, "add_pair", add_or_fail)


@pytest.fixture
def begun(text, tmp_path, monkeypatch):
    """A folder in which a build was interrupted after two pairs."""
    with monkeypatch.context() as patch:
        interrupt(patch, 2, RuntimeError("interrupted"))
        with pytest.raises(RuntimeError):
            build(config_for(text, tmp_path / "shards"))
    return tmp_path / "shards"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"held_out": 0.2},
            r"held_out: the shards in .* were begun with 0.3, not 0.2; give the same or a new --output",
        ),
        ({"shard_tokens": 5}, "shard_tokens: the shards in .* were begun with 1000, not 5"),
        ({"text_field": "body"}, "text_field: the shards in .* were begun with 'text', not 'body'"),
        ({"split": "test"}, "split: .* 'train', not 'test'"),
        ({"subset": "de"}, "subset: .* '', not 'de'"),
        ({"source": "stdlib"}, "source: .*text', not 'stdlib'"),
        ({"tokenizer": "words.json"}, "tokenizer: the shards in .* were begun with another tokenizer"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_goes_on_with_its_own_settings_alone(begun, text, tmp_path, changes, words, finished):
    words_file(tmp_path / "words.json", 100)
    if finished:
        build(config_for(text, begun))
    before = content(begun)
    if "tokenizer" in changes:
        changes = {"tokenizer": str(tmp_path / changes["tokenizer"])}
    with pytest.raises(UserError, match=words):
        build(config_for(text, begun, **changes))
    assert content(begun) == before


def test_settings_may_change_while_nothing_is_made_with_them(text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        interrupt(patch, 0, RuntimeError("interrupted"))
        build(config_for(text, tmp_path / "shards"))
    build(config_for(text, tmp_path / "shards", shard_tokens=2000))
    build(config_for(text, tmp_path / "other", shard_tokens=2000))
    assert content(tmp_path / "shards") == content(tmp_path / "other")


def test_a_source_that_has_changed_is_noticed(begun, text):
    for file in text.iterdir():
        file.write_text(file.read_text() + "!")
    with pytest.raises(UserError, match=r"source: .*text has changed since the shards in .* were begun; give a new"):
        build(config_for(text, begun))


def test_a_shard_that_was_lost_meanwhile_is_named(begun, text):
    (begun / "train-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"shards: .*train-00001.arrow is damaged .is missing"):
        build(config_for(text, begun))


def test_a_shard_ends_with_the_document_that_fills_it(text, tmp_path):
    index = build(config_for(text, tmp_path / "shards"))
    longest = 1 + max(file.stat().st_size for file in text.iterdir())
    assert len(index.train) > 2 and index.train[-1].tokens < 1000 + longest
    assert all(1000 <= shard.tokens < 1000 + longest for shard in index.train[:-1])


def test_a_finished_folder_is_left_alone(text, tmp_path, capsys):
    build(config_for(text, tmp_path / "shards"))
    before = content(tmp_path / "shards")
    text.rename(tmp_path / "gone")
    build(config_for(text, tmp_path / "shards"))
    assert "is finished; there is nothing left to do" in capsys.readouterr().out
    assert content(tmp_path / "shards") == before


def test_what_is_no_folder_of_shards_is_not_touched(text, tmp_path):
    with pytest.raises(UserError, match=r"output: .*text is not empty and holds no shards; give a new folder"):
        build(config_for(text, text))
    with pytest.raises(UserError, match=r"output: .*0.txt is a file; give a new folder"):
        build(config_for(text, text / "0.txt"))
    assert len(content(text)) == 60


def test_two_builds_at_once_are_refused(begun, text):
    with claimed(begun), pytest.raises(UserError, match=r"output: another build is at work in .*; wait for it"):
        build(config_for(text, begun))
    build(config_for(text, begun))


def test_a_full_disk_ends_in_a_sentence_and_keeps_finished_shards(text, tmp_path, capsys):
    (text / "long.txt").write_text("a longer text, " * 2000)  # the last one, in a shard too large for the disk
    build(config_for(text, tmp_path / "undisturbed"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"output: .* cannot be written .File too large.; finished shards stay, and"
        ):
            build(config_for(text, tmp_path / "shards"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert (tmp_path / "shards" / "train-00000.arrow").is_file() and not (tmp_path / "shards" / "index.json").exists()
    build(config_for(text, tmp_path / "shards"))
    assert "goes on after" in capsys.readouterr().out
    assert content(tmp_path / "shards") == content(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "no/such"}, "data.source: no/such is no readable file or folder and no dataset"),
        ({"tokenizer": "no/such.json"}, "data.tokenizer: no/such.json is not a file"),
        ({"held_out": 1e-9}, "held_out: a share of 1e-09 leaves nothing held out; take more and a new --output"),
        ({"held_out": 1 - 1e-9}, "held_out: a share of 0.999999999 leaves nothing to train on; take less and a new"),
    ],
)
def test_bad_input_ends_in_a_sentence(text, tmp_path, changes, words, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=words):
        build(config_for(text, tmp_path / "shards", **changes))
    assert not (tmp_path / "shards" / "index.json").exists()


def test_an_empty_source_is_named_before_anything_is_written(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"source: .*empty.txt holds no text; name another"):
        build(config_for(tmp_path / "empty.txt", tmp_path / "shards"))
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(("field", "value"), [("held_out", 0.0), ("shard_tokens", 0)])
def test_bad_numbers_end_in_a_sentence(field, value):
    with pytest.raises(ValueError, match=f"BuildConfig: {field}={value}"):
        BuildConfig(**({"source": "stdlib", "output": Path("shards")} | {field: value}))


def test_the_command_says_what_it_made_and_how_to_train_on_it(text, tmp_path, capsys):
    tokenizer = words_file(tmp_path / "words.json", 100)
    args = ["build", "--source", str(text), "--output", str(tmp_path / "my shards"), "--tokenizer", str(tokenizer)]
    cli.run(command.main, command.Command, [*args, "--held-out", "0.3", "--shard-tokens", "100"])
    out = capsys.readouterr().out
    index = json.loads((tmp_path / "my shards" / "index.json").read_text())
    tokens = sum(shard["tokens"] for shard in index["train"])
    assert f"{tokens:,}" in out and "held out" in out
    words = f"--data.source '{tmp_path}/my shards' --data.tokenizer '{tmp_path}/my shards/tokenizer.json'"
    assert words in out and "--data.held-out 0.3 --model.vocab-size 128" in out
    cli.run(command.main, command.Command, ["verify", str(tmp_path / "my shards")])
    assert "files are what they were when they were built" in capsys.readouterr().out
