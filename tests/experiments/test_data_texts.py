"""Reading texts: streamed, from any place on, and through a network that breaks off."""

import json

import pandas
import pyarrow as pa
import pytest

from experiments.cli import UserError
from experiments.data import texts as texts_module
from experiments.data.config import Origin
from experiments.data.texts import PAUSES, Text, read_texts


@pytest.fixture
def folder(tmp_path):
    """Rows and whole files, some of them empty, one with a name that looks like a pattern."""
    rows = [f"row {i}" if i % 5 else "  " for i in range(23)]
    (tmp_path / "a[1].jsonl").write_text("".join(json.dumps({"id": 1, "text": row}) + "\n" for row in rows))
    pandas.DataFrame({"text": [None, *rows]}).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text("")
    (tmp_path / "d.txt").write_text("a whole file")
    (tmp_path / "e.txt").write_text("\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "f.md").write_text("another")
    return tmp_path


def test_documents_are_named_by_file_and_row(folder):
    found = list(read_texts(Origin(str(folder))))
    assert len(found) == 18 + 18 + 2
    assert found[0] == Text("a[1].jsonl:1", "row 1", found[0].place)
    assert found[18][:2] == ("b.parquet:2", "row 1")
    assert [text.name for text in found[-2:]] == ["d.txt", "sub/f.md"]
    assert next(read_texts(Origin(str(folder / "d.txt")))).name == "d.txt"


def test_reading_goes_on_from_any_place(folder):
    found = list(read_texts(Origin(str(folder))))
    for number, text in enumerate(found):
        assert list(read_texts(Origin(str(folder)), text.place)) == found[number:]


def test_a_large_file_is_not_held_in_memory(tmp_path):
    line = json.dumps({"text": "some words " * 1000}) + "\n"
    with (tmp_path / "large.jsonl").open("w") as file:
        for _ in range(5000):
            file.write(line)
    before = pa.total_allocated_bytes()
    texts = read_texts(Origin(str(tmp_path / "large.jsonl")))
    held = max(pa.total_allocated_bytes() - before for _, _ in zip(range(3000), texts, strict=False))
    assert held < (tmp_path / "large.jsonl").stat().st_size / 2


class Network:
    """Stands for the Hub: a dataset of three files, which breaks off at chosen (file, row)s as often as told."""

    def __init__(self, monkeypatch, breaks: dict[tuple[int, int], int]):
        import datasets

        self.breaks, self.read, self.slept = dict(breaks), [], []
        stream = datasets.IterableDataset.from_generator(self._rows, gen_kwargs={"files": [0, 1, 2]})
        monkeypatch.setattr(datasets, "load_dataset", self._load(stream))
        monkeypatch.setattr(texts_module.time, "sleep", self.slept.append)

    def _load(self, stream):
        def load_dataset(path, *, name, split, streaming):
            assert (path, name, split, streaming) == ("someone/texts", None, "train", True)
            return stream

        return load_dataset

    def _rows(self, files):
        for file in files:
            for row in range(10):
                if self.breaks.get((file, row), 0) > 0:
                    self.breaks[file, row] -= 1
                    raise ConnectionError(f"lost at {file}, {row}")
                self.read.append((file, row))
                yield {"text": f"file {file} row {row}"}


ALL = [(f"train:{10 * file + row}", f"file {file} row {row}") for file in range(3) for row in range(10)]


def test_a_dataset_of_the_hub_is_numbered_through(monkeypatch):
    Network(monkeypatch, {})
    assert [text[:2] for text in read_texts(Origin("someone/texts"))] == ALL


def test_reading_on_skips_whole_files_without_opening_them(monkeypatch):
    network = Network(monkeypatch, {})
    place = list(read_texts(Origin("someone/texts")))[24].place
    network.read.clear()
    assert [text[:2] for text in read_texts(Origin("someone/texts"), place)] == ALL[24:]
    assert {file for file, _ in network.read} == {2}


def test_a_network_that_breaks_off_costs_no_row_and_repeats_none(monkeypatch, capsys):
    network = Network(monkeypatch, {(0, 4): 1, (0, 5): 2, (1, 0): 3, (2, 9): len(PAUSES)})
    assert [text[:2] for text in read_texts(Origin("someone/texts"))] == ALL
    assert network.slept == [1, 1, 2, 1, 2, 4, *PAUSES]  # patience starts anew whenever it goes on
    assert "someone/texts broke off (lost at 0, 4), tries again in 1 s" in capsys.readouterr().err


def test_a_network_that_stays_away_ends_in_a_sentence(monkeypatch):
    Network(monkeypatch, {(1, 3): 100})
    texts = read_texts(Origin("someone/texts"))
    words = (
        r"data.source: someone/texts broke off at row 3 of a file and did not come back within 63 seconds .lost at 1, 3"
    )
    assert [next(texts)[:2] for _ in range(13)] == ALL[:13]
    with pytest.raises(UserError, match=words):
        next(texts)


def test_a_mistake_is_not_tried_again(monkeypatch):
    network = Network(monkeypatch, {})
    with pytest.raises(UserError, match=r"data.text_field: someone/texts has no column 'body'"):
        list(read_texts(Origin("someone/texts", text_field="body")))
    assert not network.slept


def test_a_broken_file_ends_in_a_sentence(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "broken.parquet").write_text("nonsense")
    for name in ("broken.jsonl", "broken.parquet"):
        with pytest.raises(UserError, match=rf"data.source: .*{name} is no readable file"):
            list(read_texts(Origin(str(tmp_path / name))))


PATHS = ["/no/such", "./corpus", "../corpus", "~/corpus", "no/such/place", "corpus/", "corpus.jsonl", "some/a.txt"]


@pytest.mark.parametrize("source", PATHS)
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(monkeypatch, source):
    monkeypatch.setattr(texts_module, "_open", lambda *args, **choices: pytest.fail("the Hub was asked"))
    with pytest.raises(UserError, match=f"data.source: {source} is no readable file or folder and no dataset's name; "):
        list(read_texts(Origin(source)))


@pytest.mark.parametrize("source", ["wikitext", "someone/texts", "someone/texts.v1"])
def test_what_may_be_a_dataset_is_looked_for_on_the_hub(monkeypatch, source):
    monkeypatch.setattr(texts_module, "_open", lambda asked, *args, **choices: 1 / (asked != source))
    with pytest.raises(ZeroDivisionError):
        list(read_texts(Origin(source)))
