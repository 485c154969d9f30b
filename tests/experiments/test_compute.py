"""What compute buys: settings are weighed on the same tokens, and a tolerance is chosen by documents of its own."""

import csv
import re
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import cli
from experiments.bench.clock import Timing
from experiments.compute import measure, page, worth
from experiments.curves.bands import Bands
from experiments.curves.scores import Scores
from experiments.curves.solver import settings
from experiments.data import held_out_documents
from experiments.mesanet.compute import ComputeConfig, main
from experiments.reliability.launched import write_corpus
from experiments.runs import open_run
from mesanet_jax import SolverConfig
from mesanet_jax.flops import forward_flops
from tests.experiments.fresh_runs import fresh_run
from tests.experiments.pages import Reader, check_self_contained

QUICK = ["--step-budgets", 0, 2, "--tolerances", 0.5, "--num-documents", 16, "--bands", 100, "--rounds", 2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    corpus = write_corpus(folder / "corpus")
    for i in range(30):  # so many that each half of the held-out ones has a band
        (corpus / f"more{i}.txt").write_text(" ".join(str(j * j + i) for j in range(30)))
    for name, pattern in (("mesa", "mesa"), ("window", "sliding_window")):
        fresh_run(folder / name, corpus, pattern)
    return folder


def run(*arguments) -> None:
    cli.run(main, ComputeConfig, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(runs):
    """Page and rows of a run beside another one."""
    run(runs / "mesa", runs / "window", *QUICK, "--bearable", 9)
    with open(runs / "mesa" / "compute" / "compute.csv", newline="") as file:
        rows = {(row["way"], row["setting"]): row for row in csv.DictReader(file)}
    return (runs / "mesa" / "compute" / "report.html").read_text(), rows


def test_the_page_shows_pictures_settings_and_heads(made):
    text, rows = made
    check_self_contained(text)
    reader = Reader(text)
    assert text.count("<svg") == 3
    assert {"own setting", "0", "2", "0.5", "window", "layer 0, head 1"} <= reader.cells
    assert list(rows) == [
        ("own setting", "own setting"),
        ("step budget", "0"),
        ("step budget", "2"),
        ("tolerance", "0.5"),
        ("run", "window"),
    ]
    for words in ("Without solving", "hardly forget", "take tolerance=0.5", "Against mesa the loss of window is"):
        assert words in reader.text


def test_steps_arithmetic_and_losses_are_those_of_the_setting(made, runs):
    _, rows = made
    own, none, two = rows["own setting", "own setting"], rows["step budget", "0"], rows["step budget", "2"]
    assert float(none["steps"]) == 0 < float(two["steps"]) <= 2 < float(own["steps"])
    assert float(none["flops_per_token"]) < float(two["flops_per_token"]) < float(own["flops_per_token"])
    window = open_run(runs / "window").config.model
    assert float(rows["run", "window"]["flops_per_token"]) == forward_flops(window, 32)
    assert float(own["time"]) == 1.0 and float(own["extra_loss"]) == 0.0
    difference = float(none["loss"]) - float(own["loss"])
    np.testing.assert_allclose(float(none["extra_loss"]), difference, rtol=1e-9)
    assert float(none["extra_loss_low"]) <= difference <= float(none["extra_loss_high"])


def test_passages_are_read_twice_and_what_the_second_saves_is_recall(runs):
    opened = open_run(runs / "mesa")
    documents = held_out_documents(opened.config.data, opened.tokenizer)[:8]
    read = measure.texts(opened, documents, 32)
    assert read.passage == 8  # half of what the run was trained on
    for document in read.twice:
        assert document.tokens[0] == opened.tokenizer.bos and len(document.tokens) == len(document.token_bytes) == 17
        np.testing.assert_array_equal(document.tokens[1:9], document.tokens[9:])
    nll = np.tile(np.repeat([3.0, 1.0], 8), 7) + np.repeat(np.arange(7), 16)
    twice = scores(7, 16, nll)
    band = worth._recall(effort(0.1, twice)._replace(twice=twice), 8, Bands(100))
    np.testing.assert_allclose(band, 2.0, rtol=1e-12)


def scores(documents: int, length: int, nll) -> Scores:
    ones = np.ones(documents * length, np.int64)
    names = np.array([f"{i:02}" for i in range(documents)])
    place = np.tile(np.arange(length), documents)
    return Scores(names, np.repeat(np.arange(documents), length), place, ones, ones, place, np.asarray(nll, float))


def effort(tolerance: float, found: Scores, way: str = "tolerance") -> measure.Effort:
    config = SimpleNamespace(solver=SolverConfig(tolerance=tolerance))
    return measure.Effort(way, f"{tolerance}", config, found, found, None, 1.0, Timing(np.ones(2)))


def test_the_loosest_tolerance_that_half_of_the_documents_can_bear_is_chosen_and_the_others_are_told():
    """Even documents choose; the odd ones lose twice as much, and nobody hides it."""
    length, count = 10, 24
    base = np.random.default_rng(0).normal(2, 1, count * length)
    odd = np.repeat(np.arange(count) % 2, length)
    own = effort(1e-6, scores(count, length, base), measure.OWN)
    tried = [
        effort(t, scores(count, length, base + loss * (1 + odd))) for t, loss in ((0.5, 0.3), (0.1, 0.004), (0.01, 0))
    ]
    choice = worth.choose([own, *tried], 0.005, Bands(200))
    assert choice.effort is tried[1]
    np.testing.assert_allclose(choice.there, 0.004, rtol=1e-6)
    np.testing.assert_allclose(choice.elsewhere, 0.008, rtol=1e-6)
    assert worth.choose([own, tried[0]], 0.005, Bands(200)) is None


def test_a_tolerance_whose_band_reaches_beyond_what_is_bearable_is_not_chosen():
    rng = np.random.default_rng(1)
    base, noise = rng.normal(2, 1, 240), np.repeat(rng.normal(0.004, 0.02, 24), 10)
    own, noisy = effort(1e-6, scores(24, 10, base), measure.OWN), effort(0.1, scores(24, 10, base + noise))
    assert worth.choose([own, noisy], 0.005, Bands(200)) is None


def test_a_tolerance_that_is_no_looser_than_the_own_one_saves_nothing_and_is_not_chosen():
    found = scores(24, 10, np.ones(240))
    own = effort(0.1, found, measure.OWN)
    assert worth.choose([own, effort(0.1, found), effort(0.01, found)], 0.005, Bands(200)) is None
    assert worth.looser([own, effort(0.1, found), effort(0.2, found)])[0].label == "0.2"


@pytest.mark.parametrize(("condition", "words"), [((2.0, 9.0), "grow harder"), ((9.0, 2.0), "do not grow harder")])
def test_whether_systems_grow_harder_is_read_off_their_numbers(condition, words):
    heads = measure.Heads(np.ones((1, 2)), np.array([8, 64]), np.broadcast_to(condition, (1, 2, 2)))
    said = page._growing(SimpleNamespace(heads=heads))
    assert said.startswith(f"Systems {words} along the context: the median") and "2 after" in said


def test_budgets_of_the_backward_pass_do_not_forbid_a_budget_of_no_steps():
    own = SolverConfig(adjoint_max_steps=10, adjoint_tolerance=1e-3)
    tried = list(settings(own, [0, 3, 3], [0.25, 0.012]))
    assert [(way, label) for way, label, _ in tried] == [
        ("step budget", "0"),
        ("step budget", "3"),
        ("tolerance", "0.25"),
        ("tolerance", "0.012"),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["window"], "runs: window has no mesa layer; name a run that has one first"),
        (["mesa", "--bearable", "0"], "bearable=0.0 must be positive"),
        (["mesa", "--tolerances", "2"], "tolerances between 0 and 1"),
        (["mesa", "--step-budgets", "--tolerances"], "both empty; name a setting"),
        (["mesa", "--length", "99999"], "length: 99999 is more than the .* tokens of the longest document"),
        (["nothing"], "is not a run, it has no config.json"),
    ],
)
def test_nonsense_ends_in_a_sentence(arguments, words, runs, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(runs / arguments[0], *arguments[1:])
    assert stopped.value.code == 2
    assert re.search(words, re.sub(r"\s*[│╭╰─╮╯\n]+\s*", " ", capsys.readouterr().err))


def test_a_folder_of_something_else_is_refused(runs, capsys):
    before = sorted((runs / "corpus").iterdir())
    with pytest.raises(SystemExit):
        run(runs / "mesa", "--output", runs / "corpus")
    assert "corpus is not empty and holds no earlier page of this command; give a new" in capsys.readouterr().err
    assert sorted((runs / "corpus").iterdir()) == before
