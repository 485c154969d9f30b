"""Benchmarks: every kind of table reads as the same questions, and what is wrong with one is one sentence."""

import base64
import collections
import csv
import io
import json

import datasets
import numpy as np
import PIL.Image
import pytest

from experiments.cli import UserError
from experiments.r2t2 import scoring
from experiments.r2t2.benchmarks import BENCHMARKS, PERCEPTION, REFERENCE_SETS, find
from experiments.r2t2.questions import Question, Questions, ReadConfig

datasets.disable_progress_bars()


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (3, 2), color).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = np.array([255, 0, 0], np.uint8), np.array([0, 0, 255], np.uint8)
SCIENCE = [
    {"question": "What is it?", "choices": ["red", "blue"], "answer": 0, "subject": "physics", "hint": "Look."},
    {"question": "And this?", "choices": ["red", "green", "blue"], "answer": 2, "subject": "biology", "hint": ""},
]
COLORS = ("red", "blue")


def as_dataset(rows, images) -> datasets.Dataset:
    cells = [{"bytes": image, "path": None} for image in images]
    table = datasets.Dataset.from_list([row | {"image": cell} for row, cell in zip(rows, cells, strict=True)])
    return table.cast_column("image", datasets.Image())


def write_parquet(folder, rows, images, name="test-00000.parquet"):
    as_dataset(rows, images).to_parquet(folder / name)
    return folder / name


def write_jsonl(folder, rows, images, name="test.jsonl"):
    lines = [json.dumps(row | {"image": image}) for row, image in zip(rows, images, strict=True)]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def write_json(folder, rows, images, name="all.json"):
    filled = [row | {"image": image} for row, image in zip(rows, images, strict=True)]
    (folder / name).write_text(json.dumps({"info": {"version": 1}, "questions": filled}))
    return folder / name


def write_csv(folder, rows, images, name="test.csv", separator=","):
    with (folder / name).open("w", newline="") as file:
        table = csv.DictWriter(file, [*rows[0], "image"], delimiter=separator)
        table.writeheader()
        for row, image in zip(rows, images, strict=True):
            cells = {key: json.dumps(cell) if isinstance(cell, list) else cell for key, cell in row.items()}
            table.writerow(cells | {"image": image})
    return folder / name


def stored_as(kind: str, folder):
    """The same two questions, a red image and a blue one, in one of many ways."""
    encoded = [png(color) for color in COLORS]
    written = [base64.b64encode(image).decode() for image in encoded]
    for color, image in zip(COLORS, encoded, strict=True):
        (folder / f"{color}.png").write_bytes(image)
    paths = [f"{color}.png" for color in COLORS]
    if kind == "parquet":
        return write_parquet(folder, SCIENCE, encoded)
    if kind == "folder":
        write_parquet(folder, SCIENCE[1:], encoded[1:], "test-00001-of-2.parquet")
        write_parquet(folder, SCIENCE[:1], encoded[:1], "test-00000-of-2.parquet")
        write_parquet(folder, [SCIENCE[0] | {"question": "trained on"}], encoded[:1], "train-00000-of-1.parquet")
        return folder
    if kind == "saved":
        as_dataset(SCIENCE, encoded).save_to_disk(folder / "saved")
        return folder / "saved"
    if kind == "json":
        return write_json(folder, SCIENCE, paths)
    if kind == "jsonl":
        return write_jsonl(folder, SCIENCE, paths)
    if kind == "structs":
        return write_jsonl(folder, SCIENCE, [{"bytes": None, "path": path} for path in paths])
    if kind == "base64":
        return write_jsonl(folder, SCIENCE, [written[0], f"data:image/png;base64,{written[1]}"])
    return write_csv(
        folder, SCIENCE, paths if kind == "csv" else written, f"test.{kind}", {"csv": ",", "tsv": "\t"}[kind]
    )


def asked(benchmark, source, **changes) -> list[Question]:
    return list(Questions(ReadConfig(benchmark=benchmark, source=str(source), **changes)))


def complaint(benchmark, source, **changes) -> str:
    with pytest.raises(UserError) as error:
        asked(benchmark, source, **changes)
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["parquet", "folder", "saved", "json", "jsonl", "structs", "base64", "csv", "tsv"])
def test_every_kind_of_table_reads_as_the_same_questions(kind, tmp_path):
    first, second = asked("SQA-IMG", stored_as(kind, tmp_path))
    assert (first.id, first.text, first.choices, first.answers) == ("0", "What is it?", ("red", "blue"), ("A",))
    assert (first.task, first.subtask, first.hint) == ("knowledge", "physics", "Look.")
    assert (second.id, second.choices, second.answers) == ("1", ("red", "green", "blue"), ("C",))
    for question, color in ((first, RED), (second, BLUE)):
        pixels = question.image.pixels()
        assert pixels.dtype == np.uint8 and pixels.shape == (2, 3, 3) and (pixels == color).all()
    assert first.source != second.source


def test_a_column_called_otherwise_is_mapped_and_one_that_is_not_there_can_be_done_without(tmp_path):
    rows = [{"prompt": "Which?", "options": '["red", "blue"]', "answer": "1", "nr": "x7"}]
    columns = {"question": "prompt", "choices": "options", "id": "nr", "subtask": None, "hint": None}
    (one,) = asked("SQA-IMG", write_parquet(tmp_path, rows, [png("red")]), columns=columns)
    assert (one.id, one.text, one.choices, one.answers, one.subtask) == ("x7", "Which?", ("red", "blue"), ("B",), "")


def test_mmbench_has_a_column_for_every_option(tmp_path):
    row = {"index": "1000007", "question": "Which?", "hint": None, "A": "red", "B": "blue", "C": None, "D": None}
    (one,) = asked("MMBench", write_parquet(tmp_path, [row | {"answer": "B", "category": "color"}], [png("red")]))
    assert (one.id, one.choices, one.answers, one.hint, one.subtask) == (
        "1000007",
        ("red", "blue"),
        ("B",),
        "",
        "color",
    )


def test_only_rows_of_the_benchmarks_own_kind_are_read(tmp_path):
    rows = [
        {"question_id": f"{subtask}/1.png", "question": f"{n}?", "answer": "Yes", "category": subtask}
        for subtask in ("OCR", "code_reasoning", "count")
        for n in range(2)
    ]
    questions = asked("MME-P", write_parquet(tmp_path, rows, [png("red")] * 6))
    assert [one.id for one in questions] == ["0", "1", "4", "5"]
    assert [one.source for one in questions] == ["mme:OCR/1.png"] * 2 + ["mme:count/1.png"] * 2
    rows = [
        {"idx": n, "type": f"{n % 2 + 2}D", "task": "Count", "question": "?", "choices": ["1", "2"]} for n in range(4)
    ]
    path = write_parquet(tmp_path, [row | {"answer": "(B)"} for row in rows], [png("red")] * 4, "cv.parquet")
    for name, ids in (("CV-Bench-2D", ["0", "2"]), ("CV-Bench-3D", ["1", "3"])):
        assert [one.id for one in asked(name, path)] == ids
    assert asked("CV-Bench-2D", path)[0].answers == ("B",)


def test_physbench_has_its_options_in_the_question_and_types_that_arrow_refuses(tmp_path):
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "a.png").write_bytes(png("blue"))
    rows = [
        {"idx": n, "mode": mode, "file_name": ["a.png"], "task_type": "scene", "answer": "B", "scene": scene}
        | {"question": "<image>\nWhich falls?\nA. the ball\nB. the box"}
        for n, (mode, scene) in enumerate([("general", 3), ("image-only", "kitchen")])
    ]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    (one,) = asked("PhysBench", tmp_path / "test.json", images=str(tmp_path / "image"))
    assert (one.id, one.text, one.choices, one.answers) == (
        "1",
        "<image>\nWhich falls?",
        ("the ball", "the box"),
        ("B",),
    )
    assert (one.image.pixels() == BLUE).all()
    assert "test_answer.json" in complaint("PhysBench", "")


def test_every_turn_of_a_dialogue_is_a_question(tmp_path):
    turns = [
        {"user": "Question: What?\nChoices:\nA. Red.\nB. Blue.\nAnswer with the letter.", "assistant": "Answer: B"},
        {"user": "How many?\nKeep it short.", "assistant": "Two."},
    ]
    rows = [{"images": [{"bytes": png("red"), "path": None}], "texts": turns}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    first, second = asked("Visual7W", tmp_path)
    assert (first.id, first.text, first.choices, first.answers) == ("0.0", "What?", ("Red.", "Blue."), ("B",))
    assert (second.id, second.text, second.choices, second.answers) == ("0.1", "How many?", None, ("Two",))
    assert first.source == second.source and (second.image.pixels() == RED).all()


def test_answers_of_several_annotators_are_all_kept_and_equal_images_have_equal_sources(tmp_path):
    said = [{"answer": answer, "answer_id": n} for n, answer in enumerate(["cat", "dog", "dog"])]
    rows = [{"question_id": 7, "question": "?", "answers": said, "image_id": 42, "answer_type": "other"}]
    (one,) = asked("VQA-V2", write_parquet(tmp_path, rows, [png("red")]))
    assert (one.answers, one.answer, one.source) == (("cat", "dog", "dog"), "dog", "coco:42")
    rows = [{"question": "?", "choices": ["a", "b"], "answer": "0", "image_id": "000000000042"}]
    rows = [row | {"correct_choice_idx": 1, "question_id": "k"} for row in rows]
    path = write_parquet(tmp_path, rows, [png("red")], "a.parquet")
    assert asked("A-OKVQA", path, columns={"source": "image_id"})[0].source == "A-OKVQA:42"
    assert asked("A-OKVQA", path)[0].source == asked("SQA-IMG", stored_as("parquet", tmp_path))[0].source


def test_images_can_stand_in_a_table_or_folder_of_their_own(tmp_path):
    rows = [{"id": "q1", "imageId": "n2", "question": "?", "answer": "yes"}]
    for part in ("testdev_balanced_instructions", "testdev_balanced_images"):
        (tmp_path / part).mkdir()
    table = tmp_path / "testdev_balanced_instructions" / "testdev-0.parquet"
    datasets.Dataset.from_list(rows).to_parquet(table)
    pictures = [{"id": "n1"}, {"id": "n2"}]
    write_parquet(tmp_path / "testdev_balanced_images", pictures, [png("red"), png("blue")], "testdev-0.parquet")
    (one,) = asked("GQA", tmp_path)
    assert one.source == "visual genome:n2" and (one.image.pixels() == BLUE).all()
    PIL.Image.new("RGB", (4, 4), "red").save(tmp_path / "n2.jpg")
    assert asked("GQA", table, images=str(tmp_path))[0].image.pixels().shape == (4, 4, 3)


def test_mathvista_names_an_option_by_its_text_and_a_subtask_in_a_nested_column(tmp_path):
    rows = [
        {"pid": "1", "question": "?", "choices": ["6", "8"], "answer": "8", "metadata": {"task": "geometry"}},
        {"pid": "3", "question": "?", "choices": ["B", "A"], "answer": "B", "metadata": {"task": "puzzle"}},
        {"pid": "2", "question": "?", "choices": None, "answer": "[1, 2]", "metadata": {"task": "statistics"}},
    ]
    path = write_parquet(tmp_path, rows, [png("red")] * 3)
    first, letters, second = asked("MathVista", path, columns={"image": "image"})
    assert (first.answers, first.subtask) == (("B",), "geometry")
    assert letters.answers == ("A",)  # the text "B" stands under A
    assert (second.answers, second.choices, second.subtask) == (("[1, 2]",), None, "statistics")


def test_clevrs_own_file_reads_with_the_folder_of_its_images(tmp_path):
    folder = tmp_path / "images [val]"
    folder.mkdir()
    (folder / "CLEVR_val_000001.png").write_bytes(png("blue"))
    row = {"question_index": 5, "image_filename": "CLEVR_val_000001.png", "question": "How many?", "answer": "2"}
    (tmp_path / "CLEVR_val_questions.json").write_text(json.dumps({"info": {"split": "val"}, "questions": [row]}))
    (one,) = asked("CLEVR", tmp_path / "CLEVR_val_questions.json", images=str(folder))
    assert (one.id, one.answers, one.source) == ("5", ("2",), "clevr:CLEVR_val_000001.png")
    assert (one.image.pixels() == BLUE).all()


def test_texts_of_a_csv_stay_what_they_are_wherever_it_lies(tmp_path):
    (tmp_path / "my [data]").mkdir()
    rows = [
        {"question_id": n, "question": "NA", "image_id": n, "answers": said} for n, said in enumerate(["007", "1e5"])
    ]
    first, second = asked("TextVQA", write_csv(tmp_path / "my [data]", rows, ["red.png"] * 2))
    assert (first.text, first.answers, second.answers) == ("NA", ("007",), ("1e5",))


def test_a_draw_depends_on_ids_and_seed_alone(tmp_path):
    rows = [
        {"question_id": str(n), "question": f"{n}?", "choices": ["a", "b"], "correct_choice_idx": 0} for n in range(60)
    ]
    (tmp_path / "parts").mkdir()
    whole = write_jsonl(tmp_path, rows, ["none.png"] * 60)
    for part in range(3):
        write_jsonl(tmp_path / "parts", rows[::-1][part::3], ["none.png"] * 20, f"train-{part}.jsonl")
    columns = {"source": "question_id"}
    drawn = [one.id for one in asked("A-OKVQA", whole, limit=20, columns=columns)]
    again = [one.id for one in asked("A-OKVQA", tmp_path / "parts", limit=20, columns=columns)]
    other = [one.id for one in asked("A-OKVQA", whole, limit=20, seed=1, columns=columns)]
    assert len(set(drawn)) == 20 and set(drawn) == set(again) != set(other)
    assert drawn == sorted(drawn, key=int) and max(map(int, drawn)) > 40
    assert len(asked("A-OKVQA", whole, columns=columns)) == 60


def test_the_hub_is_streamed_and_never_trusted_with_code(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return as_dataset(SCIENCE, [png("red"), png("blue")]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [one.answers for one in Questions(ReadConfig(benchmark="SQA-IMG"))] == [("A",), ("C",)]
    assert len(list(Questions(ReadConfig(benchmark="SQA-IMG", source="someone/science", split="validation")))) == 2
    assert calls == [
        (("lmms-lab-encoder/ScienceQA",), {"streaming": True, "name": "ScienceQA-IMG", "split": "test"}),
        (("someone/science",), {"streaming": True, "name": None, "split": "validation"}),
    ]


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = complaint("AI2D", "")
    assert "lmms-lab-encoder/ai2d test" in message and "no route" in message and "downloaded" in message


def test_an_unreadable_image_is_noticed_when_it_is_decoded_or_skipped_and_counted(tmp_path):
    (tmp_path / "torn.png").write_bytes(png("red")[:40])
    (tmp_path / "red.png").write_bytes(png("red"))
    path = write_json(tmp_path, [SCIENCE[0]] * 5, ["red.png", "torn.png", "lost.png", "?", ["red.png"] * 2])
    config = ReadConfig(benchmark="SQA-IMG", source=str(path), columns={"source": "subject"}, skip_unreadable=True)
    questions = Questions(config)
    for _ in range(2):  # every pass counts anew
        assert [one.id for one in questions] == ["0"]
        for sentence, words in zip(questions.skipped, ("torn.png", "lost.png", "neither", "2 images"), strict=True):
            assert words in sentence and "row" in sentence and str(path) in sentence
    torn = next(one for one in Questions(ReadConfig(**vars(config) | {"skip_unreadable": False})) if one.id == "1")
    with pytest.raises(UserError, match=r"row 1 of .*torn\.png, cannot be decoded"):
        torn.image.pixels()


def test_missing_columns_are_named_with_those_that_are_there(tmp_path):
    rows = [{"text": "?", "choices": ["a", "b"], "answer": 0, "subject": "x"}]
    message = complaint("SQA-IMG", write_parquet(tmp_path, rows, [png("red")]))
    assert "lacks 'question' (question), 'hint' (hint)" in message and "'text'" in message
    assert "columns={'question': ...}" in message


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv", "arrow"])
def test_an_empty_table_is_one_sentence(suffix, tmp_path):
    path = tmp_path / f"test.{suffix}"
    if suffix == "parquet":
        as_dataset(SCIENCE, [png("red")] * 2).select([]).to_parquet(path)
    else:
        path.write_text({"json": "[]", "csv": "image,question\n"}.get(suffix, ""))
    assert "no row" in complaint("SQA-IMG", path)


def test_an_id_that_occurs_twice_is_named_with_both_rows(tmp_path):
    path = write_jsonl(tmp_path, [SCIENCE[0] | {"nr": n} for n in (5, 6, 5)], ["red.png"] * 3)
    message = complaint("SQA-IMG", path, columns={"id": "nr", "source": "nr"})
    assert "'5'" in message and "row 0 of" in message and "row 2 of" in message


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("TextVQA", {"question_id": 1, "question": "?", "image_id": "x", "answers": [""] * 10}),
        ("DocVQA", {"questionId": 1, "question": "?", "ucsf_document_id": "x", "answers": None}),
        ("SQA-IMG", {**SCIENCE[0], "answer": -1}),
        ("SQA-IMG", {**SCIENCE[0], "answer": "nan"}),
    ],
)
def test_hidden_answers_are_told_from_wrong_ones(name, row, tmp_path):
    message = complaint(name, write_parquet(tmp_path, [row], [png("red")]))
    assert "hidden" in message and repr(find(name).split) in message
    message = complaint("SQA-IMG", write_parquet(tmp_path, [SCIENCE[0] | {"answer": 2}], [png("red")]))
    assert "'2' of row 0" in message and "red, blue" in message


def test_a_source_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 no parquet")
    (tmp_path / "torn.jsonl").write_text('{"question": "?"}\n{"question": \n')
    (tmp_path / "two.json").write_text('{"a": [{}], "b": [{}]}')
    (tmp_path / "notes.txt").write_text("?")
    for folder, names in (("splits", ["train.jsonl"]), ("mixed", ["test.jsonl", "test.parquet"])):
        (tmp_path / folder).mkdir()
        for name in names:
            write_jsonl(tmp_path / folder, SCIENCE, ["red.png"] * 2, name)
    expected = {
        "lost.parquet": "no file",
        "lost/": "no file",
        "empty": "no table",
        "notes.txt": "no table",
        "torn.parquet": "cannot be read as a table",
        "torn.jsonl": "cannot be read as a table",
        "two.json": "2 lists",
        "splits": "named after 'test'",
        "mixed": "several formats (.jsonl, .parquet)",
    }
    for name, words in expected.items():
        assert words in complaint("SQA-IMG", f"{tmp_path}/{name}")
    assert "choose one of MMBench, MME-P" in complaint("MMbench", tmp_path)


def test_a_config_with_an_unknown_field_or_an_impossible_number_is_refused():
    refused = [
        ({"columns": {"picture": "image"}}, "'picture'"),
        ({"columns": {"answer": None}}, "without one"),
        ({"limit": 0}, "limit=0"),
        ({"seed": -1}, "seed=-1"),
    ]
    for changes, words in refused:
        with pytest.raises(ValueError, match=words):
            ReadConfig(benchmark="AI2D", **changes)


def test_the_rows_are_those_of_table_1():
    assert len({row.name for row in (*BENCHMARKS, *REFERENCE_SETS)}) == 18
    assert all(row.metric in scoring.METRICS for row in (*BENCHMARKS, *REFERENCE_SETS))
    assert {row.limit for row in REFERENCE_SETS} == {5000} and {row.limit for row in BENCHMARKS} == {None}
    tasks = [collections.Counter(row.task for row in rows) for rows in (BENCHMARKS, REFERENCE_SETS)]
    assert tasks == [{"general visual": 5, "knowledge": 3, "OCR": 1}, {"general visual": 4, "knowledge": 3, "OCR": 2}]
    assert len(PERCEPTION) == 10
