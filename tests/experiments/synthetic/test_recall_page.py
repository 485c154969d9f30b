"""The page about recall counts every answer where it stands, and says what it counted."""

import re

import numpy as np
import pytest

from experiments import cli
from experiments.mesanet import recall
from experiments.synthetic import memory
from experiments.synthetic.examples import IGNORED
from tests.experiments.pages import check_self_contained

QUICK = (
    "--mixers gla --tasks needles copying --length 24 --factors 1 2 --num-train 64 --num-test 40 --fit.epochs 1 "
    "--model.model-dim 16 --model.num-heads 2 --model.key-dim 8 --model.value-dim 8"
)


@pytest.mark.parametrize("task", memory.TASKS)
def test_a_curve_is_the_share_of_answers_in_each_octave(task):
    test = memory.draw(task, 65, 30, seed=0)
    rng = np.random.default_rng(0)
    truth = test.examples.targets
    predictions = np.where(rng.random(truth.shape) < 0.6, truth, 0)
    found = recall.curve(predictions, test, task)
    asked, along = truth != IGNORED, test.along(task)
    assert found["mean"] == pytest.approx(np.mean((predictions == truth)[asked]))
    covered = 0
    for bucket in found["buckets"]:
        here = asked & (along >= bucket["from"]) & (along <= bucket["to"])
        assert bucket["mean"] == pytest.approx(np.mean((predictions == truth)[here]))
        assert bucket["to"] == 2 * bucket["from"] - 1
        covered += here.sum()
    assert covered == asked.sum() and found["length"] == 65


def test_copies_are_counted_by_their_place():
    test = memory.draw("copying", 65, 3, seed=0)
    np.testing.assert_array_equal(test.along("copying")[0, 32:64], np.arange(1, 33))


def test_the_page_holds_a_picture_and_a_table_for_each_task_and_is_made_again_from_the_cells(tmp_path, capsys):
    args = [*QUICK.split(), "--output", str(tmp_path / "out")]
    cli.run_preset(recall.main, recall.PRESETS, default="small", args=args)
    page = (tmp_path / "out" / "report.html").read_text()
    check_self_contained(page)
    headings = re.findall("<h2[^>]*>(.*?)</h2>", page)[:4]
    tasks = ("Needles", "Copying")
    assert headings == [f"{x}{end}" for x in tasks for end in (", trained on 24 tokens", " in numbers")]
    assert (tmp_path / "out" / "needles.png").stat().st_size > 5000
    said = capsys.readouterr().out
    assert re.search(r"needles: At 24 tokens gla \d+\.\d %\. At 48 tokens gla \d+\.\d %\.", said)
    cli.run_preset(recall.main, recall.PRESETS, default="small", args=args)
    assert "2 of 2 cells are done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--length", "10"], "length=10 must be at least 20"),
        (["--factors", "0"], r"factors=\(0,\) must be at least 1"),
        (["--mixers", *["gla"] * 7], "7 mixers are more than the 6 that can be drawn"),
        (["--mixers", "lstm"], "'lstm' is unknown"),
        (["--weight-decay", "-1"], "fit: .*weight_decay=.* must not be negative"),
    ],
)
def test_nonsense_ends_in_a_sentence(options, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        cli.run_preset(recall.main, recall.PRESETS, default="small", args=[*options, "--output", str(tmp_path / "new")])
    assert stopped.value.code == 2
    assert re.search(words, re.sub(r"\s*[│╭╰─╮╯\n]+\s*", " ", capsys.readouterr().err))
    assert not (tmp_path / "new").exists()
