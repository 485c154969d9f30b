"""The command: two small runs in, a page out; mistakes end in one sentence before anything is overwritten."""

import csv
import dataclasses
import os
import re
import sys

import jax
import numpy as np
import pytest
import tokenizers

from experiments import cli
from experiments.curves import solver
from experiments.curves.bands import Bands, Grid
from experiments.curves.figures import Point
from experiments.curves.scores import load, score
from experiments.data import held_out_documents
from experiments.mesanet.curves import CurvesConfig, main
from experiments.runs import open_run
from mesanet_jax import SolverConfig
from tests.experiments.fresh_runs import fresh_run

QUICK = [
    "--bands",
    "100",
    "--rulers",
    "8",
    "--step-budgets",
    "0",
    "3",
    "--tolerances",
    "1e-2",
    "--sweep-documents",
    "4",
]
FIGURES = ["loss", "solver-mesa", "compute-mesa"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(40):
        words = rng.choice(["mesa", "layer", "solve", "café", "of", "the"], rng.integers(6, 20))
        (folder / f"text{i}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="module")
def mesa(tmp_path_factory, corpus):
    return fresh_run(tmp_path_factory.mktemp("runs") / "mesa", corpus, "mesa")


@pytest.fixture(scope="module")
def transformer(tmp_path_factory, corpus):
    return fresh_run(tmp_path_factory.mktemp("runs") / "transformer", corpus, "attention")


@pytest.fixture(scope="module")
def other_words(tmp_path_factory, corpus):
    """A run with a tokenizer of its own."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    texts = [file.read_text() for file in sorted(corpus.iterdir())]
    tokenizer.train_from_iterator(texts, vocab_size=280, special_tokens=["<|endoftext|>"], show_progress=False)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return fresh_run(tmp_path_factory.mktemp("runs") / "words", corpus, "attention", str(file))


def draw(*arguments):
    cli.run(main, CurvesConfig, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def page(tmp_path_factory, mesa, transformer):
    folder = tmp_path_factory.mktemp("page")
    draw(mesa, transformer, "--output", folder, *QUICK)
    return folder


def test_the_folder_holds_page_pictures_and_the_numbers_behind_each(page):
    wanted = {"report.html", "loss.csv", "compute-mesa.csv", "compute-mesa-by-position.csv"}
    wanted |= {"solver-mesa-steps.csv", "solver-mesa-residual.csv", "scores-mesa.npz", "scores-transformer.npz"}
    wanted |= {f"{name}.{suffix}" for name in FIGURES for suffix in ("svg", "png")}
    assert {path.name for path in page.iterdir()} == wanted


def test_the_page_shows_curve_solver_and_where_it_comes_from(page):
    text = (page / "report.html").read_text()
    assert text.count("<svg") == len(FIGURES)
    said = ("Over all", "significant", "Loss by position", "solver of mesa", "last 8 tokens only", "commit", "Scored:")
    for words in said:
        assert words in text
    assert "<script" not in text and "python -m " in text


def test_scores_are_those_of_the_library_on_the_held_out_documents(page, mesa):
    run = open_run(mesa)
    documents = held_out_documents(run.config.data, run.tokenizer)
    longest = max(len(document.tokens) for document in documents) - 1
    apply = jax.jit(lambda tokens: run.model.apply(run.params, tokens)[0])
    ours = score(apply, documents, length=min(32, longest))
    saved = load(page / "scores-mesa.npz")
    np.testing.assert_array_equal(saved.names, ours.names)
    np.testing.assert_array_equal(saved.target, ours.target)
    np.testing.assert_allclose(saved.nll, ours.nll, rtol=2e-4)


def test_the_sweep_spends_what_it_is_given(page):
    with open(page / "compute-mesa.csv", newline="") as file:
        points = {(row["way"], row["setting"]): row for row in csv.DictReader(file)}
    assert float(points["step budget", "0"]["mean_steps"]) == 0
    assert 0 < float(points["step budget", "3"]["mean_steps"]) <= 3
    assert 0 < float(points["tolerance", "0.01"]["mean_steps"]) < float(points["own", "own setting"]["mean_steps"])


def test_the_trace_averages_over_scored_tokens_only(mesa):
    """Three documents of different length, padded in two batches, give the averages of each alone."""
    run = open_run(mesa)
    documents = held_out_documents(run.config.data, run.tokenizer)[:3]
    documents = [
        d._replace(tokens=d.tokens[:n], token_bytes=d.token_bytes[:n])
        for d, n in zip(documents, (3, 9, 17), strict=True)
    ]
    grid = Grid(np.array([0, 2, 16]))
    model = dataclasses.replace(run.config.model, solver=SolverConfig(tolerance=0.03))
    _, trace = solver.measure(model, run.params, documents, grid, batch_size=2)
    assert trace.num_tokens.tolist() == [6, 20]
    alone = [solver.measure(model, run.params, [d], grid, batch_size=1)[1] for d in documents]
    counts = np.array([one.num_tokens for one in alone])
    expected = sum(np.nan_to_num(one.steps) * n for one, n in zip(alone, counts, strict=True)) / counts.sum(axis=0)
    np.testing.assert_allclose(trace.steps, expected, rtol=1e-3)
    assert trace.steps.shape == (2, 2) and (trace.residual <= 0.03).all()


def test_a_sweep_compares_with_the_own_setting_and_does_not_score_it_twice(mesa):
    run = open_run(mesa)
    documents = held_out_documents(run.config.data, run.tokenizer)[:6]
    model = dataclasses.replace(run.config.model, solver=SolverConfig(tolerance=0.0))
    own, passes = model.solver.max_steps, []

    def watch(batches):
        passes.append(len(batches))
        return batches

    found = solver.sweep(
        model, run.params, documents, Grid(np.array([0, 4, 16])), Bands(100),
        step_budgets=[own, 0], tolerances=[], batch_size=6, watch=watch,
    )  # fmt: skip
    same, without = found.series["step budget"]
    assert passes == [1, 1] and same.loss == found.own.loss != without.loss
    assert (found.fan[f"{own} steps"].mean == 0).all() and (found.fan["0 steps"].mean != 0).all()
    np.testing.assert_allclose(without.steps, 0)


def test_the_cheapest_bearable_setting_is_the_one_that_is_said():
    own = Point("own setting", 30.0, 2.0, 1.9, 2.1)
    points = [
        Point("1e-1", 2.0, 2.2, 2.1, 2.3),
        Point("1e-3", 6.0, 2.001, 2.0, 2.004),
        Point("1e-4", 9.0, 2.0, 2.0, 2.0),
    ]
    found = solver.Sweep(own, None, {"tolerance": points}, {}, {})
    said = solver.saving("mesa", found, "nats per token")
    assert said.startswith("With a tolerance of 1e-3 the solver of mesa spends 6.0 steps") and "+0.0010" in said
    assert solver.saving("mesa", found._replace(series={"tolerance": points[:1]}), "nats per token") is None


def test_another_tokenizer_is_refused_in_one_sentence_or_compared_in_bits_per_byte(mesa, other_words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        draw(mesa, other_words, "--output", tmp_path / "page", *QUICK)
    assert re.search(r"^error: runs: they use different tokenizers; add --bits-per-byte.*\.$", capsys.readouterr().err)
    assert not (tmp_path / "page").exists()
    draw(mesa, other_words, "--bits-per-byte", "--output", tmp_path / "page", "--sweep-documents", 0, "--rulers")
    text = (tmp_path / "page" / "report.html").read_text()
    assert "bits per byte" in text and "bytes of text read" in text


def test_one_run_alone_is_drawn_into_its_own_folder(transformer, capsys):
    draw(transformer, "--rulers", "--num-documents", 7, "--bands", 100)
    text = (transformer / "curves" / "report.html").read_text()
    assert "Over all 7 documents the loss of transformer is" in text
    shown = capsys.readouterr().out
    assert str(transformer / "curves" / "report.html") in shown and "perplexity" in shown


def test_a_run_of_fewer_documents_than_a_band_needs_is_drawn_without(transformer, tmp_path):
    draw(transformer, "--rulers", "--num-documents", 1, "--output", tmp_path)
    assert "too few documents for a band" in (tmp_path / "report.html").read_text()


BAD_INPUT = {
    "is not a run, it has no config.json": ["{folder}/none"],
    "no checkpoint": ["{folder}/untrained"],
    "is named twice": ["{mesa}", "{mesa}"],
    "length: 9999 is more than the [0-9]+ tokens of the longest document": ["{mesa}", "--length", "9999"],
    "cannot be written": ["{mesa}", "--output", "{folder}/a file"],
    "name 1 to 6 folders": [],
    "step_budgets must lie in 0 to 10000, tolerances between 0 and 1": ["{mesa}", "--tolerances", "2"],
    "must be at least 2, BOS and one token": ["{mesa}", "--rulers", "1"],
}


@pytest.mark.parametrize("message", BAD_INPUT)
def test_bad_input_is_one_sentence_and_touches_nothing(message, mesa, tmp_path, capsys):
    (tmp_path / "a file").write_text("mine")
    (tmp_path / "untrained").mkdir()
    (tmp_path / "untrained" / "config.json").write_text((mesa / "config.json").read_text())
    before = sorted(mesa.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        draw(*(argument.format(mesa=mesa, folder=tmp_path) for argument in BAD_INPUT[message]))
    error = " ".join(re.sub(r"[│─╭╮╰╯]", "", capsys.readouterr().err).split())
    assert ended.value.code == 2 and re.search(message, error) and "Traceback" not in error
    assert sorted(mesa.rglob("*")) == before and (tmp_path / "a file").read_text() == "mine"


def test_a_folder_of_something_else_is_refused_before_any_work(mesa, page, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("experiments.mesanet.curves.open_runs", lambda paths: pytest.fail("work was done"))
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder, name in ((mine, "loss.csv"), (other, "report.html")):
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(SystemExit) as ended:
            draw(mesa, "--output", folder)
        complaint = f"output: {folder} is not empty and holds no earlier page of this command; give a new folder."
        assert ended.value.code == 2 and complaint in capsys.readouterr().err
        assert [path.read_text() for path in folder.iterdir()] == ["mine"]
    with pytest.raises(pytest.fail.Exception, match="work was done"):  # beside an earlier page anything may lie
        draw(mesa, "--output", page)


def test_an_empty_held_out_share_is_refused_by_name(mesa, tmp_path, capsys):
    broken = tmp_path / "run"
    broken.mkdir()
    (broken / "checkpoints").symlink_to(mesa / "checkpoints")
    config = (mesa / "config.json").read_text()
    (broken / "config.json").write_text(config.replace('"held_out": 0.4', '"held_out": 1e-9'))
    with pytest.raises(SystemExit):
        draw(broken)
    assert "held_out" in capsys.readouterr().err


def test_a_page_that_cannot_be_finished_leaves_the_old_one(mesa, page, monkeypatch, capsys):
    before = {path.name: path.read_bytes() for path in page.iterdir()}

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("experiments.mesanet.curves.write_page", full)
    with pytest.raises(SystemExit):
        draw(mesa, "--output", page, "--sweep-documents", 0, "--rulers")
    assert "No space left" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in page.iterdir()} == before


def test_a_model_that_has_diverged_is_refused_by_name(mesa, tmp_path, monkeypatch, capsys):
    run = open_run(mesa)
    poisoned = run._replace(params=jax.tree.map(lambda x: x * np.nan, run.params))
    monkeypatch.setattr("experiments.curves.material.open_run", lambda path: poisoned)
    with pytest.raises(SystemExit):
        draw(mesa, "--output", tmp_path)
    assert re.search("runs: mesa cannot be scored, .* is not a number", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_help_is_a_page_a_person_enjoys(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["curves"])
    with pytest.raises(SystemExit):
        draw("--help")
    shown = capsys.readouterr().out
    for words in (
        "where in the context",
        "--bits-per-byte",
        "--tolerances",
        "folders of trained runs",
        "runs/transformer",
    ):
        assert words in shown
