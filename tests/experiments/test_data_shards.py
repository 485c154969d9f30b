"""Shards on disk: the same documents as the text they were made of, mapped and not read, and no damage unnoticed."""

import dataclasses
import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from experiments.cli import UserError
from experiments.data import DataConfig, held_out_documents, held_out_text, shuffled_rows, training_text
from experiments.data import __main__ as command
from experiments.data import shards as shards_module
from experiments.data.build import BuildConfig, build
from experiments.tokenizers import ByteTokenizer, load_tokenizer
from tests.experiments.vocabularies import words_file

TEXTS = [f"text number {i}: " + "one two three äöü " * (i % 9) for i in range(120)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A jsonl file, a tokenizer, and their shards: of bytes, of words, and of words with a wide vocabulary."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    words_file(folder / "words.json", 1000)
    words_file(folder / "wide.json", 70_000)
    words_file(folder / "other.json", 1000, suffix=";")
    for name in ("bytes", "words", "wide"):
        tokenizer = str(folder / f"{name}.json") if name != "bytes" else ""
        config = {"source": str(folder / "text.jsonl"), "held_out": 0.2, "shard_tokens": 500, "tokenizer": tokenizer}
        build(BuildConfig(output=folder / name, **config))
    return folder


def opened(made, name: str, **changes):
    """The config of shards and the tokenizer they were made with."""
    tokenizer = str(made / f"{name}.json") if name != "bytes" else ""
    config = DataConfig(source=(str(made / name),), held_out=0.2, length=16, tokenizer=tokenizer)
    return dataclasses.replace(config, **changes), load_tokenizer(tokenizer)


@pytest.fixture
def damaged(made, tmp_path):
    """A copy of the shards of bytes to do damage to, and their config."""
    for file in (made / "bytes").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path, opened(made, "bytes", source=(str(tmp_path),))[0]


@pytest.mark.parametrize("name", ["bytes", "words", "wide"])
def test_shards_hold_the_documents_that_the_text_holds(made, name):
    config, tokenizer = opened(made, name, length=100_000)
    text = dataclasses.replace(config, source=(str(made / "text.jsonl"),))
    streams = [training_text(c, tokenizer)[0] for c in (config, text)]
    ours, theirs = (
        sorted(tuple(w.tokens[w.segment_ids == i]) for i in range(w.segment_ids.max() + 1)) for w in streams
    )
    assert ours == theirs and 80 < len(ours) < 120
    documents = [sorted(held_out_documents(c, tokenizer), key=lambda d: d.name) for c in (config, text)]
    assert len(documents[0]) + len(ours) == 120
    for a, b in zip(*documents, strict=True):
        assert a.name == b.name and a.tokens.dtype == np.int32
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.token_bytes, b.token_bytes)
    assert len(held_out_text(config, tokenizer)) == 1


def test_rows_of_shards_are_those_of_their_stream(made):
    config, tokenizer = opened(made, "words")
    whole = training_text(dataclasses.replace(config, length=100_000), tokenizer)[0]
    stream = whole.tokens[whole.segment_ids >= 0]
    windows = training_text(config, tokenizer)
    tiled = np.concatenate([window.tokens[1:][window.segment_ids[1:] >= 0] for window in windows])
    np.testing.assert_array_equal(tiled, stream[1:])
    rows = shuffled_rows(windows, config)
    assert len({rows[i].tokens.tobytes() for i in range(len(windows))}) == len({w.tokens.tobytes() for w in windows})


def test_a_token_takes_two_bytes_where_the_vocabulary_allows(made):
    sizes = {name: sum(file.stat().st_size for file in (made / name).glob("train-*")) for name in ("words", "wide")}
    with pa.memory_map(str(made / "words" / "train-00000.arrow")) as file:
        assert pa.ipc.open_file(file).schema.field("tokens").type == pa.large_list(pa.uint16())
    assert sizes["wide"] > 1.2 * sizes["words"]


def test_shards_are_mapped_and_not_read(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} and so on " * 20_000)
    common = {"source": str(tmp_path / "text"), "output": tmp_path / "shards", "held_out": 0.3}
    build(BuildConfig(**common, shard_tokens=1_000_000))
    assert sum(file.stat().st_size for file in (tmp_path / "shards").iterdir()) > 8_000_000
    config = DataConfig(source=(str(tmp_path / "shards"),), held_out=0.3, length=256)
    tracemalloc.start()
    arrow = pa.total_allocated_bytes()
    rows = shuffled_rows(training_text(config, ByteTokenizer()), config)
    held_out = held_out_documents(config, ByteTokenizer())
    for i in range(200):
        assert rows[i].tokens.shape == (257,)
    assert len(held_out[0].tokens) > 100_000
    peak = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - arrow
    tracemalloc.stop()
    assert peak < 3_000_000  # one held-out document of 240,000 tokens, and next to nothing else


def test_the_fingerprint_is_that_of_the_digests(made, damaged, monkeypatch):
    folder, config = damaged
    before = training_text(config, ByteTokenizer()).fingerprint
    monkeypatch.setattr(shards_module, "digest", None)  # nothing is read for it
    assert training_text(config, ByteTokenizer()).fingerprint == before
    index = json.loads((folder / "index.json").read_text())
    index["train"] = index["train"][::-1]
    (folder / "index.json").write_text(json.dumps(index))
    assert training_text(config, ByteTokenizer()).fingerprint != before


def test_any_tool_reads_them(made):
    import datasets

    files = sorted(str(file) for file in (made / "words").glob("train-*.arrow"))
    rows = list(datasets.load_dataset("arrow", data_files=files, split="train", streaming=True))
    assert sum(len(row["tokens"]) for row in rows) > 500 and rows[0]["name"].startswith("text.jsonl:")


def cut(folder):
    (folder / "train-00001.arrow").write_bytes((folder / "train-00001.arrow").read_bytes()[:-8])


def lose(folder):
    (folder / "train-00000.arrow").unlink()


def garble(folder):
    (folder / "train-00000.arrow").write_bytes(b"x" * (folder / "train-00000.arrow").stat().st_size)


def unfinish(folder):
    (folder / "index.json").rename(folder / "index.draft")


def outdate(folder):
    (folder / "index.json").write_text((folder / "index.json").read_text().replace('"version": 1', '"version": 9'))


def break_index(folder):
    (folder / "index.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "shards: .*train-00001.arrow is damaged .has [0-9,]+ bytes, not [0-9,]+.; bring it back, or"),
        (lose, "shards: .*train-00000.arrow is damaged .is missing."),
        (garble, "shards: .*train-00000.arrow is damaged"),
        (unfinish, "shards: those in .* are not finished; start the command that builds them again"),
        (outdate, "shards: .*index.json is no index of this version .version 9, this is 1.; build it anew"),
        (break_index, "shards: .*index.json is no index of this version"),
    ],
)
def test_damage_ends_in_a_sentence(damaged, damage, words):
    damage(damaged[0])
    with pytest.raises(UserError, match=words):
        training_text(damaged[1], ByteTokenizer())


def test_verify_finds_a_single_flipped_bit(damaged, capsys):
    folder, config = damaged
    command.verify(folder)
    assert "files are what they were when they were built" in capsys.readouterr().out
    file = sorted(folder.glob("train-*.arrow"))[-1]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    training_text(config, ByteTokenizer())  # which looks at sizes alone, as its help says
    with pytest.raises(UserError, match=f"{file.name} is damaged .its digest differs from the index"):
        command.verify(folder)


@pytest.mark.parametrize(
    ("name", "tokenizer", "changes", "words"),
    [
        (
            "words",
            "",
            {},
            r"data.tokenizer: .*words holds tokens of another .*; pass --data.tokenizer .*tokenizer.json",
        ),
        ("words", "wide.json", {}, "data.tokenizer: .*words holds tokens of another"),
        ("words", "other.json", {}, "data.tokenizer: .*words holds tokens of another"),
        ("bytes", "words.json", {}, "data.tokenizer: .*bytes holds tokens of another .*; leave --data.tokenizer empty"),
        ("bytes", "", {"held_out": 0.1}, "data.held_out: .* holds out 0.2, not 0.1; pass --data.held-out 0.2"),
    ],
)
def test_shards_that_were_made_otherwise_are_refused(made, name, tokenizer, changes, words):
    config, _ = opened(made, name, **changes)
    with pytest.raises(UserError, match=words):
        training_text(config, load_tokenizer(str(made / tokenizer) if tokenizer else ""))


def test_another_tokenizer_reads_the_held_out_texts_anew(made):
    config, _ = opened(made, "words")
    documents = held_out_documents(config, ByteTokenizer())
    text = dataclasses.replace(config, source=(str(made / "text.jsonl"),))
    expected = {d.name: ByteTokenizer().decode(d.tokens) for d in held_out_documents(text, ByteTokenizer())}
    assert {d.name: ByteTokenizer().decode(d.tokens) for d in documents} == expected


def test_the_tokenizer_beside_the_shards_is_the_one_to_train_with(made):
    config, _ = opened(made, "words")
    training_text(config, load_tokenizer(str(made / "words" / "tokenizer.json")))


def test_a_folder_without_shards_is_named(tmp_path):
    with pytest.raises(UserError, match=r"shards: .*nowhere holds none; build them with"):
        command.verify(tmp_path / "nowhere")
