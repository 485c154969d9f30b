"""The page about one text says what the model computed, and shows nothing it cannot stand for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli
from experiments.mesanet import explain
from experiments.reliability.launched import write_corpus
from experiments.runs import open_run
from tests.experiments.fresh_runs import fresh_run
from tests.experiments.pages import check_self_contained
from tests.experiments.vocabularies import words_file

TEXT = "document 3 counts: <0> & é\n\tmore"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with mesa layers and one without."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = write_corpus(folder / "corpus")
    for name, pattern in (("mesa", "mesa"), ("window", "sliding_window")):
        fresh_run(folder / name, corpus, pattern)
    return folder


def run(*args) -> None:
    cli.run(explain.main, explain.ExplainConfig, [str(arg) for arg in args])


def test_a_page_shows_the_text_three_times_and_the_context_of_the_chosen_tokens(runs, tmp_path, capsys):
    run(runs / "mesa", "--text", TEXT, "--tokens", 7, 20, "--output", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    check_self_contained(page)
    headings = re.findall("<h2[^>]*>(.*?)</h2>", page)
    assert headings[:3] == ["What solving gains", "Where the solver works", "What it leaves"]
    assert [heading.startswith("Token ") for heading in headings[3:5]] == [True, True]
    assert "&lt;0&gt; &amp;" not in page and page.count('">&lt;</span>') >= 3  # a word each, and escaped
    said = capsys.readouterr().out
    assert re.search(
        rf"mesa predicts \d+ of {len(TEXT.encode())} tokens better than without solving .* nats per token", said
    )
    assert "page.html" in said


def test_what_is_read_is_what_the_model_predicts(runs):
    opened = open_run(runs / "mesa")
    ids = opened.tokenizer.encode(TEXT)
    reading = explain.read(opened, None, ids)
    tokens = jnp.asarray([opened.tokenizer.bos, *ids])[None]
    logs = jax.nn.log_softmax(opened.model.apply(opened.params, tokens)[0][0])
    expected = [-logs[place, token] for place, token in enumerate(ids)]
    np.testing.assert_allclose(reading.nll, expected, rtol=1e-5)
    assert reading.steps.shape == reading.residual.shape == (1, 2, len(ids))
    assert reading.weights.shape == (1, 2, len(ids), len(ids) + 1)
    assert not np.allclose(reading.nll, reading.other)  # without solving it is another model
    assert explain._gained_most(reading, 3) == sorted(np.argsort(reading.nll - reading.other)[:3].tolist())


def test_two_runs_are_compared_and_a_held_out_text_is_taken_where_none_is_given(runs):
    run(runs / "mesa", "--against", runs / "window", "--length", 40, "--num-tokens", 1)
    page = (runs / "mesa" / "explain.html").read_text()
    assert "What mesa gains on window" in page and "without solving" not in page.lower()
    assert "40 tokens, 1 mesa layers of 2 heads" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["window"], "run: .*window has no mesa layer; name a run that has one"),
        (["mesa", "--text", "abc", "--tokens", "3"], "tokens: 3 is no place in a text of 3 tokens; take 0 to 2"),
        (["mesa", "--document", "999"], r"document: there are \d+ held-out ones; take 0 to \d+"),
        (["mesa", "--output", "/no/such/folder/page.html"], "output: /no/such/folder/page.html cannot be written"),
        (["mesa", "--length", "0"], "length=0 must be at least 1"),
        (["nothing"], "is not a run, it has no config.json"),
    ],
)
def test_nonsense_ends_in_a_sentence(arguments, words, runs, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(runs / arguments[0], *arguments[1:])
    assert stopped.value.code == 2
    assert re.search(words, re.sub(r"\s*[│╭╰─╮╯\n]+\s*", " ", capsys.readouterr().err))


def test_another_tokenizer_cannot_be_compared(runs, tmp_path, capsys):
    fresh_run(
        tmp_path / "words", write_corpus(tmp_path / "corpus"), "mesa", str(words_file(tmp_path / "words.json", 200))
    )
    with pytest.raises(SystemExit):
        run(runs / "mesa", "--against", tmp_path / "words", "--text", TEXT)
    assert re.search("against: .*words has another tokenizer than .*mesa; name a run", capsys.readouterr().err)


def test_only_an_earlier_page_is_replaced(runs, tmp_path, capsys):
    page, notes = tmp_path / "page.html", tmp_path / "notes.md"
    for text in ("ab", "abc"):
        run(runs / "mesa", "--text", text, "--num-tokens", 0, "--output", page)
    assert "3 tokens" in page.read_text()
    notes.write_text("mine")
    with pytest.raises(SystemExit):
        run(runs / "mesa", "--text", "abc", "--output", notes)
    assert re.search("output: .*notes.md is no page of this command; give a new file", capsys.readouterr().err)
    assert notes.read_text() == "mine"
