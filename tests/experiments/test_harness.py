"""The model of lm-eval answers as the model of the run does, whatever is batched, however long the text."""

import functools
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli, harness
from experiments.cli import UserError
from experiments.harness import HarnessModel
from experiments.mesanet import downstream
from experiments.mesanet.downstream import Answer, DownstreamConfig
from experiments.reliability.launched import write_corpus
from experiments.runs import open_run
from mesanet_jax import SamplingConfig, generate
from tests import tolerances
from tests.experiments.fresh_runs import fresh_run

LONG = "one, two, three and " * 9  # beyond a stretch, as the tests set it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    corpus = write_corpus(folder / "corpus")
    for name, pattern in (("mesa", "mesa"), ("window", "sliding_window")):
        fresh_run(folder / name, corpus, pattern)
    return folder


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch):
    monkeypatch.setattr(harness, "STRETCH", 64)


@pytest.fixture(scope="module")
def run(folder):
    return open_run(folder / "mesa")


def ask(*arguments):
    return SimpleNamespace(args=arguments)


@functools.cache
def compiled(model):
    return jax.jit(model.apply)


def logs(run, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihoods of the text's bytes by one call of the model, and the most likely ones."""
    ids = run.tokenizer.encode(text)
    tokens = np.zeros((1, 600), np.int32)  # what comes after a text says nothing of it, and one length compiles once
    tokens[0, : len(ids) + 1] = run.tokenizer.bos, *ids
    logits = compiled(run.model)(run.params, tokens)[0][0, : len(ids)]
    return np.asarray(jax.nn.log_softmax(logits)[np.arange(len(ids)), ids]), np.asarray(jnp.argmax(logits, -1))


def test_a_continuation_is_scored_after_its_context_in_batches_of_any_size(run):
    pairs = [("one, two", ", three"), ("", "four"), (LONG, "five"), ("a ", "b"), ("x", LONG)]
    requests = [ask(*pair) for pair in pairs]
    for batch_size in (1, 2, 8):
        found = HarnessModel(run, batch_size=batch_size).loglikelihood(requests, disable_tqdm=True)
        for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
            told = len((context.rstrip() if context else "").encode())
            expected, best = logs(run, context + continuation)
            tolerances.assert_near(total, expected[told:].sum(), tolerances.MODEL["float32"])
            assert greedy == (best[told:] == run.tokenizer.encode(context + continuation)[told:]).all()


def test_the_greedy_continuation_is_called_greedy(run):
    text = "one, two, three and four"
    best = logs(run, text)[1]
    places = [place for place in range(1, len(text)) if best[place] < 128 and chr(best[place]).isalnum()]
    assert places  # the most likely byte is a letter somewhere
    pairs = [(text[:place].rstrip(), text[:place][len(text[:place].rstrip()) :] + chr(best[place])) for place in places]
    pairs = [(context, answer) for context, answer in pairs if len(answer) == 1]
    found = HarnessModel(run).loglikelihood([ask(*pair) for pair in pairs], disable_tqdm=True)
    assert pairs and all(greedy for _, greedy in found)
    others = [ask(context, "~") for context, _ in pairs]
    assert not any(greedy for _, greedy in HarnessModel(run).loglikelihood(others, disable_tqdm=True))


@pytest.mark.parametrize("name", ["mesa", "window"])
def test_a_text_of_any_length_is_read_from_its_start(folder, name):
    run = open_run(folder / name)
    texts = [LONG * 3, "short", ""]
    found = HarnessModel(run, batch_size=2).loglikelihood_rolling([ask(text) for text in texts], disable_tqdm=True)
    expected = [logs(run, text)[0].sum() for text in texts[:2]]
    tolerances.assert_near(found[:2], expected, tolerances.MODEL["float32"])
    assert found[2] == 0


def test_an_answer_is_what_generate_writes_up_to_the_first_stop(run):
    key = {"prompt": jnp.asarray([[run.tokenizer.bos, *run.tokenizer.encode("one, ")]])}
    drawn = generate(
        run.model, run.params, **key, num_tokens=12, key=jax.random.key(0), sampling=SamplingConfig(temperature=0)
    )
    ids = np.asarray(drawn[0])
    whole = run.tokenizer.decode(harness._until_bos(ids, run.tokenizer.bos))
    requests = [ask("one, ", {"max_gen_toks": 12, "until": []}), ask(LONG, {"max_gen_toks": 12, "until": []})]
    requests.append(ask("one, ", {"max_gen_toks": 12, "until": [whole[2:4], "never"], "do_sample": False}))
    first, _, cut = HarnessModel(run, batch_size=2).generate_until(requests, disable_tqdm=True)
    assert first == whole and len(whole) > 4
    assert cut == whole[: whole.index(whole[2:4])]


def test_answers_that_are_drawn_differ_and_are_drawn_again_by_the_same_seed(run):
    requests = [ask("one", {"max_gen_toks": 20, "do_sample": True, "temperature": 1.0})] * 2
    first, again, other = (HarnessModel(run, seed=seed).generate_until(requests, True) for seed in (1, 1, 2))
    assert first == again != other and first[0] != first[1]


def test_only_the_end_of_a_long_prompt_is_kept_where_that_is_asked_for(run):
    choices = {"max_gen_toks": 8}
    kept = HarnessModel(run, prompt_length=3).generate_until([ask("zzzzz ab", choices)], True)
    assert kept == HarnessModel(run).generate_until([ask(" ab", choices)], True)


def test_a_way_of_drawing_that_there_is_not_is_refused_by_name(run):
    with pytest.raises(UserError, match="repetition_penalty in its generation_kwargs; take it out"):
        HarnessModel(run).generate_until([ask("a", {"repetition_penalty": 2})], True)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{target}}}}"
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Local tasks, one of each kind that lm-eval asks."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"{i}, ", "choices": ["ab", "a much longer one"], "target": i % 2} for i in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {
        "choices": 'output_type: multiple_choice\ndoc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]\n',
        "whole": "output_type: loglikelihood_rolling\nmetric_list: [{metric: bits_per_byte}]\n",
        "perplexed": "output_type: loglikelihood\nmetric_list: [{metric: perplexity, aggregation: perplexity}]\n",
        "written": "output_type: generate_until\ngeneration_kwargs: {until: [' '], max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match}]\n",
    }
    (tmp_path / "tasks").mkdir()
    for name, kind in kinds.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)
    return tmp_path / "tasks"


def command(*arguments) -> None:
    cli.run(downstream.main, DownstreamConfig, [str(argument) for argument in arguments])


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_local_tasks_of_every_kind_are_asked_and_told(folder, run, tasks, capsys):
    output = tasks.parent / "page"
    command(
        folder / "mesa", "--tasks", "choices", "whole", "written", "perplexed", "--include", tasks, "--output", output
    )
    files = {path.name for path in output.iterdir()}
    names = ("choices", "whole", "written", "perplexed")
    assert files == {"table.md", "sweep.json", "cells.jsonl", ".claimed"} | {
        f"{name}.{suffix}" for name in names for suffix in ("json", "jsonl")
    }
    text = (output / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert re.search(r"\| choices \| acc_per_token \| [\d.]+ ± [\d.]+ \| 3 \|", text)
    assert "| written | exact_match | 0.00" in text
    nll = [-logs(run, str(i % 2))[0].sum() for i in range(3)]
    expected = sum(nll) / np.log(2) / 3  # each target is one byte
    assert float(re.search(r"\| whole \| bits_per_byte \| ([\d.]+)", text)[1]) == pytest.approx(expected, rel=1e-3)
    right = [
        np.argmin(
            [-logs(run, f"{i}, {option}")[0][2:].sum() / (len(option) + 1) for option in ("ab", "a much longer one")]
        )
        == i % 2
        for i in range(3)
    ]
    assert float(re.search(r"acc_per_token \| ([\d.]+)", text)[1]) == pytest.approx(100 * np.mean(right), abs=0.01)


@pytest.mark.filterwarnings("ignore")
def test_the_same_command_goes_on_with_the_tasks_that_are_not_done(folder, tasks, monkeypatch, capsys):
    command(folder / "mesa", "--tasks", "choices", "--include", tasks, "--output", tasks.parent / "page")
    asked, real = [], downstream.ask
    monkeypatch.setattr(downstream, "ask", lambda *args, **cell: asked.append(cell["task"]) or real(*args, **cell))
    command(folder / "mesa", "--tasks", "choices", "whole", "--include", tasks, "--output", tasks.parent / "page")
    assert asked == ["whole"] and "| choices |" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_a_member_of_a_group_that_cannot_be_loaded_is_left_out_and_named(folder, tasks, monkeypatch, capsys):
    monkeypatch.setitem(downstream.GROUPS, "recall", ("choices", "broken"))
    (tasks / "broken.yaml").write_text(TASK.format(name="broken", data="no such file"))
    command(folder / "mesa", "--tasks", "recall", "--include", tasks, "--output", tasks.parent / "page")
    shown = capsys.readouterr().out
    assert "| choices |" in shown and "Left out: broken (" in shown


def test_a_batch_of_answers_stops_once_all_have_stopped(run, monkeypatch):
    written, real = [], harness._write
    monkeypatch.setattr(harness, "_write", lambda *args: written.append(1) or real(*args))
    text = HarnessModel(run).generate_until([ask("one, ", {"max_gen_toks": 64})], True)[0]
    assert len(written) > 1 and len(text) > 4
    written.clear()
    HarnessModel(run).generate_until([ask("one, ", {"max_gen_toks": 64, "until": text[1:3]})], True)
    assert len(written) == 1


def test_groups_are_means_of_their_own_tasks():
    answers = {
        "piqa": Answer("acc", 0.5, 0.01, 10),
        "boolq": Answer("acc", 0.7, None, 20),
        "mine": Answer("f1", 45.2, 1.0, 1),
    }
    text = downstream.table(answers)
    assert "| piqa | acc | 50.00 ± 1.96 | 10 |" in text and "| boolq | acc | 70.00 | 20 |" in text
    assert "| **local** | mean of 2 of 8 | **60.00** | |" in text and "global" not in text
    assert "| mine | f1 | 45.20 ± 1.96 | 1 |" in text  # in per cent already


def test_groups_are_taken_apart_and_unknown_tasks_are_named():
    known = [name for group in downstream.GROUPS.values() for name in group]
    assert downstream.expanded(["global", "piqa", "race"], known) == ["lambada_openai", "hellaswag", "race", "piqa"]
    with pytest.raises(UserError, match="no task hellaswak; did you mean hellaswag"):
        downstream.expanded(["hellaswak"], known)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (("doc_to_target", "nothing"), "choices.yaml has no doc_to_target; add that field"),
        (("doc_to_choice", "nothing"), "choices.yaml has no doc_to_choice"),
        (("dataset_path", "nothing"), "choices.yaml has no dataset_path"),
        (("test_split", "nothing"), "choices.yaml has no test_split"),
        (("task: ", "task: [}"), "choices.yaml is not YAML"),
        (("data.jsonl", "other.jsonl"), "tasks: choices cannot be asked .*; mend its file or fetch its data first"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_task_file_with_something_missing_ends_in_a_sentence(broken, words, folder, tasks, capsys):
    file = tasks / "choices.yaml"
    file.write_text(file.read_text().replace(*broken))
    with pytest.raises(SystemExit) as stopped:
        command(folder / "mesa", "--tasks", "choices", "--include", tasks)
    assert stopped.value.code == 2
    assert re.search(words, " ".join(capsys.readouterr().err.split()))
    assert not (folder / "mesa" / "downstream").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--include", "/no/such/folder"], "include: /no/such/folder is not a folder"),
        (["--tolerance", "0.1"], "tolerance: window has no mesa layer that could stop; leave it out"),
        (["--limit", "-1"], "limit=-1 must be at least 0"),
        (["--tasks"], "tasks is empty; name at least one"),
    ],
)
def test_nonsense_ends_in_a_sentence(arguments, words, folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(folder / "window", *arguments)
    assert stopped.value.code == 2
    assert re.search(words, re.sub(r"\s*[│╭╰─╮╯\n]+\s*", " ", capsys.readouterr().err))
