"""Text to batches: nothing lost, nothing mixed, nothing depends on when it is read."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from experiments.cli import UserError
from experiments.data import (
    DataConfig,
    PackedWindows,
    held_out_documents,
    held_out_text,
    is_held_out,
    ordered_batches,
    shuffled_rows,
    training_text,
)
from experiments.data.windows import Piece
from experiments.tokenizers import ByteTokenizer, load_tokenizer


@pytest.fixture
def folder(tmp_path):
    """Forty texts of different lengths in three formats."""
    texts = [f"text number {i}: " + "äbc " * (i % 7 + 1) for i in range(40)]
    for i, text in enumerate(texts[:10]):
        (tmp_path / f"{i}.txt").write_text(text)
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[10:]))
    return tmp_path, texts


def config_for(path, **changes) -> DataConfig:
    return DataConfig(**({"source": (str(path),), "held_out": 0.2, "length": 16, "batch_size": 4} | changes))


def rows_of(config: DataConfig):
    return shuffled_rows(training_text(config, ByteTokenizer()), config)


def test_windows_hold_every_token_once_and_pad_only_the_last():
    documents = [np.array([256, *range(n)], np.int32) for n in (5, 1, 17, 0, 9)]
    windows = PackedWindows.of(documents, length=8)
    pieces = [windows[i] for i in range(len(windows))]
    stream = np.concatenate(documents)
    # each window predicts its last `length` tokens, so without their first tokens the windows tile the stream
    tiled = np.concatenate([piece.tokens[1:][piece.segment_ids[1:] >= 0] for piece in pieces])
    np.testing.assert_array_equal(tiled, stream[1:])
    assert all((piece.segment_ids >= 0).all() for piece in pieces[:-1])


def test_a_segment_is_a_document():
    documents = [np.array([256, *[n] * n], np.int32) for n in (3, 5, 2)]
    window = PackedWindows.of(documents, length=12)[0]
    np.testing.assert_array_equal(window.tokens, [256, 3, 3, 3, 256, 5, 5, 5, 5, 5, 256, 2, 2])
    np.testing.assert_array_equal(window.segment_ids, [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2])


def test_a_window_is_the_same_whatever_pieces_the_documents_lie_in():
    documents = [np.array([256, *[n] * n], np.int32) for n in (3, 5, 2, 0, 9, 30, 1, 1)]
    whole = PackedWindows.of(documents, length=7)
    for cuts in ([4], [1, 2, 6], range(1, 8)):
        stretches = np.split(np.arange(len(documents)), list(cuts))
        pieces = [
            Piece(np.concatenate(some).astype(np.uint16), np.cumsum([0, *map(len, some)]))
            for some in ([documents[i] for i in stretch] for stretch in stretches)
        ]
        apart = PackedWindows(pieces, 7, fingerprint=0)
        assert len(apart) == len(whole)
        for ours, theirs in zip(whole, apart, strict=True):
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
            np.testing.assert_array_equal(ours.segment_ids, theirs.segment_ids)
            assert theirs.tokens.dtype == theirs.segment_ids.dtype == np.int32


def test_a_row_is_a_function_of_its_number(folder):
    config = config_for(folder[0])
    first, again = (rows_of(config) for _ in range(2))
    for n in (0, 3, 100, 7, 10**9):  # far beyond one epoch, and in any order
        np.testing.assert_array_equal(first[n].tokens, again[n].tokens)
        np.testing.assert_array_equal(first[n].segment_ids, again[n].segment_ids)
    assert first[0].tokens.shape == (17,)


def test_every_epoch_holds_every_window_once_and_in_another_order(folder):
    config = config_for(folder[0], batch_size=7)  # which divides no epoch: batches straddle two of them
    windows = training_text(config, ByteTokenizer())
    expected = sorted(window.tokens.tobytes() for window in windows)
    assert len(set(expected)) > 20 and len(windows) % 7
    rows = rows_of(config)
    epochs = [[rows[e * len(windows) + i].tokens.tobytes() for i in range(len(windows))] for e in range(3)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_held_out_documents_are_never_trained_on(folder):
    path, texts = folder
    config = config_for(path, batch_size=1, length=10_000)
    tokenizer = ByteTokenizer()
    trained = rows_of(config)[0]
    seen = tokenizer.decode(trained.tokens[trained.segment_ids >= 0])
    held_out = held_out_documents(config, tokenizer)
    assert 0 < len(held_out) < len(texts)
    for document in held_out:
        assert tokenizer.decode(document.tokens) not in seen
        assert document.tokens[0] == tokenizer.bos
    kept = [text for text in texts if text in seen]
    assert len(kept) + len(held_out) == len(texts)


def test_the_share_of_held_out_names_is_the_one_asked_for():
    names = [f"package/file_{i}.py" for i in range(5000)]
    assert np.mean([is_held_out(name, 0.1) for name in names]) == pytest.approx(0.1, abs=0.01)


def test_batches_in_order_hold_every_window_once_and_fill_up_with_padding(folder):
    windows = held_out_text(config_for(folder[0]), ByteTokenizer())
    batches = ordered_batches(windows, 5)
    assert len(batches) == -(-len(windows) // 5)
    rows = [row for batch in (batches[n] for n in range(len(batches))) for row in zip(*batch, strict=True)]
    assert len(windows) % 5 and all((ids < 0).all() for _, ids in rows[len(windows) :])
    for i in range(len(windows)):
        np.testing.assert_array_equal(rows[i][0], windows[i].tokens)
        np.testing.assert_array_equal(rows[i][1], windows[i].segment_ids)


def test_the_fingerprint_is_that_of_the_text_in_its_order(folder):
    config = config_for(folder[0])
    fingerprints = [training_text(config, ByteTokenizer()).fingerprint for _ in range(2)]
    fingerprints.append(training_text(dataclasses.replace(config, seed=1), ByteTokenizer()).fingerprint)
    (folder[0] / "0.txt").write_text("another text, of which one character matters!")
    (folder[0] / "1.txt").write_text("another text, of which one character matters?")
    fingerprints.append(training_text(config, ByteTokenizer()).fingerprint)
    assert fingerprints[0] == fingerprints[1] and len(set(fingerprints)) == 3


def test_a_bos_written_in_a_text_begins_no_document(tokenizer_file):
    tokenizer = load_tokenizer(str(tokenizer_file))
    assert tokenizer.bos not in tokenizer.encode("some <s> text")


def test_a_column_without_text_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 5}\n')
    with pytest.raises(UserError, match=r"data.text_field: 'text' of .* holds int, not text"):
        training_text(config_for(tmp_path), ByteTokenizer())


def test_the_standard_library_is_there_without_a_download():
    documents = held_out_documents(DataConfig(), ByteTokenizer())
    assert len(documents) > 20
    assert all("test" not in d.name.split("/") and d.name.endswith(".py") for d in documents)


def test_parquet_and_jsonl_and_text_say_the_same(tmp_path):
    import pandas

    texts = [f"line {i} of some text" for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
    pandas.DataFrame({"body": texts}).to_parquet(tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        config = config_for(tmp_path / name, text_field="body", held_out=1 - 1e-9)
        found = {ByteTokenizer().decode(d.tokens) for d in held_out_documents(config, ByteTokenizer())}
        assert found == set(texts)


@pytest.fixture
def tokenizer_file(tmp_path):
    """A byte-level BPE of 300 tokens, trained here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["some text to learn pairs of letters from, some more text"], trainer)
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.mark.parametrize("text", ["some text", "äöü, 漢字 and 🙂 more", "", "a", "  spaces  "])
def test_token_bytes_add_up_to_the_text(tokenizer_file, text):
    for tokenizer in (ByteTokenizer(), load_tokenizer(str(tokenizer_file))):
        ids, num_bytes = tokenizer.encode_with_bytes(text)
        assert len(ids) == len(num_bytes)
        assert num_bytes.sum() == len(text.encode())
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_bytes_survive_the_round_trip():
    text = "def f(x):\n    return 'äöü 漢字 🙂'\n"
    assert ByteTokenizer().decode([256, *ByteTokenizer().encode(text)]) == text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": ("no/such/place",)}, "data.source: no/such/place is no readable file or folder and no dataset"),
        ({"text_field": "body"}, r"data.text_field: .*lines.jsonl has no column 'body'; it has \['text'\]"),
        ({"held_out": 1e-6}, "data.held_out: a share of 1e-06 leaves no held-out text"),
        ({"held_out": 0.9999999}, "data.source: .* leaves no text to train on"),
    ],
)
def test_bad_sources_end_in_a_sentence(folder, changes, words, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = dataclasses.replace(config_for(folder[0]), **changes)
    with pytest.raises(UserError, match=words):
        rows_of(config)
        held_out_documents(config, ByteTokenizer())


def test_unreadable_and_empty_files_end_in_a_sentence(tmp_path):
    (tmp_path / "latin.txt").write_bytes("ä".encode("latin-1"))
    with pytest.raises(UserError, match=r"data.source: .*latin.txt cannot be read as UTF-8 text"):
        rows_of(config_for(tmp_path))
    (tmp_path / "latin.txt").write_text("")
    with pytest.raises(UserError, match="leaves no text to train on"):
        rows_of(config_for(tmp_path))


def test_bad_tokenizers_end_in_a_sentence(tmp_path, tokenizer_file):
    with pytest.raises(UserError, match=r"data.tokenizer: .*missing.json is not a file"):
        load_tokenizer(str(tmp_path / "missing.json"))
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(UserError, match=r"data.tokenizer: .*broken.json is not a tokenizer.json file"):
        load_tokenizer(str(tmp_path / "broken.json"))
    with pytest.raises(UserError, match=r"data.bos_token: .* name the token that begins a document"):
        load_tokenizer(str(tokenizer_file), "<nothing>")


@pytest.mark.parametrize("field", ["length", "batch_size", "held_out"])
def test_bad_numbers_end_in_a_sentence(field):
    with pytest.raises(ValueError, match=f"DataConfig: {field}=0"):
        DataConfig(**{field: 0})
