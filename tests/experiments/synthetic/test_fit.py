"""Models of all kinds learn, the same every time, and the commands write what was found."""

import dataclasses
import re

import numpy as np
import pytest

from experiments import cli
from experiments.mesanet import mad, regbench
from experiments.mesh import MeshConfig, make_mesh
from experiments.synthetic.examples import Examples
from experiments.synthetic.fit import Choice, FitConfig
from experiments.synthetic.models import fit_model
from mesanet_jax import MesaNetConfig

SHAPE = MesaNetConfig(vocab_size=7, num_layers=1, model_dim=16, num_heads=2, key_dim=8, value_dim=8)
FIT = FitConfig(epochs=20, batch_size=32, warmup_steps=10)
QUICK = ["--fit.epochs", "1", "--peak-lrs", "0.003", "--weight-decays", "0.01"]
NARROW = ["--model.model-dim", "16", "--model.num-heads", "2", "--model.key-dim", "8", "--model.value-dim", "8"]


def examples(number: int, *, shifted: bool) -> Examples:
    """Ids, and for each the one before it plus one, or the id itself plus one."""
    ids = np.random.default_rng(number).integers(0, 6, (number, 9), dtype=np.int32)
    return Examples(ids, (np.roll(ids, 1, axis=1) if shifted else ids) + 1)


def learn(mixer: str, *, compresses: bool = False, fit: FitConfig = FIT, seed: int = 0):
    train, test = (examples(number, shifted=not compresses) for number in (512, 70))

    def accuracy(predictions):
        return float(np.mean((predictions == test.targets)[:, 1:]))

    shape, choice = dataclasses.replace(SHAPE, pattern=(mixer,)), Choice(1e-2, 0.01, seed)
    found = fit_model(shape, train, test, accuracy, fit, choice, make_mesh(MeshConfig()), compresses=compresses)
    return found, accuracy(found.predictions)


@pytest.mark.parametrize("mixer", ["gla", "hawk"])
def test_a_mixer_learns_to_look_back_and_stops_when_it_can(mixer):
    found, accuracy = learn(mixer)
    assert accuracy > 0.999 and found.num_epochs < 20 and found.predictions.shape == (70, 9)


def test_an_auto_encoder_learns_more_than_the_most_frequent_id():
    assert learn("gla", compresses=True)[1] > 0.3  # one in six would be luck


def test_the_same_seed_is_the_same_model_and_another_is_not():
    one, again, other = (learn("gla", fit=dataclasses.replace(FIT, epochs=1), seed=seed)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.predictions, again.predictions)
    assert one.loss == again.loss != other.loss


def test_few_examples_are_seen_more_often_so_that_every_task_has_its_steps():
    fit = dataclasses.replace(FIT, epochs=3, least_steps=100)
    assert [fit.most_epochs(steps) for steps in (400, 34, 8)] == [3, 3, 13]
    short, long = (dataclasses.replace(FIT, epochs=1, batch_size=256, least_steps=steps) for steps in (0, 6))
    assert [learn("gla", fit=fit)[0].num_epochs for fit in (short, long)] == [1, 3]


def test_mad_writes_a_table_with_the_papers_figures_and_goes_on_where_it_was(tmp_path, capsys):
    command = [
        *QUICK,
        *NARROW,
        "--mixers",
        "gla",
        "sliding_window",
        "--tasks",
        "memorization",
        "--output",
        str(tmp_path),
    ]
    cli.run_preset(mad.main, mad.PRESETS, default="small", args=command)
    written = (tmp_path / "table.md").read_text()
    assert re.search(r"\| gla \| \d+\.\d ± \d+\.\d \(82\.5\) \| \d+\.\d ± \d+\.\d \(82\.5\) \|", written)
    assert re.search(r"\| sliding_window \| \d+\.\d ± \d+\.\d \| ", written)
    assert "0 of 2 cells are done" in capsys.readouterr().out
    cli.run_preset(mad.main, mad.PRESETS, default="small", args=["--preset", "small", *command])
    assert "2 of 2 cells are done" in capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == written


def test_mad_counts_the_best_choice_of_a_setting_and_the_mean_over_settings():
    def entry(mean: float, length: int, lr: float, seed: int):
        setting = dataclasses.asdict(mad.mad.baseline("in-context-recall")) | {"length": length}
        cell = {"mixer": "gla", **setting, "peak_lr": lr, "weight_decay": 0.1, "seed": seed}
        return {"cell": cell, "mean": mean, "half": 0.0}

    found = mad.scores(
        [entry(0.2, 128, 1e-3, 0), entry(0.6, 128, 1e-3, 1), entry(0.3, 128, 1e-2, 0), entry(0.8, 256, 1e-3, 0)]
    )
    assert found["gla", "in-context-recall"].mean == pytest.approx((0.4 + 0.8) / 2)


def test_regbench_writes_the_best_choice_of_each_mixer(tmp_path):
    command = [*QUICK, "--mixers", "gla", "--num-train", "64", "--num-test", "20", "--heads", "1", "2"]
    command += ["--model-dims", "16", "--model.key-dim", "8", "--model.value-dim", "8"]
    cli.run_preset(regbench.main, regbench.PRESETS, default="small", args=[*command, "--output", str(tmp_path)])
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 2
    pattern = r"\| gla \| \d+\.\d ± \d+\.\d \(width 16, 2 layers, [12] heads, lr 0\.003, wd 0\.01\) \|"
    assert re.search(pattern, (tmp_path / "table.md").read_text())


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        (mad, ["--mixers", "mamba"], "mixers: 'mamba' is unknown; use mesa, gla,"),
        (mad, ["--mixers", "hawk+mesa+gla"], "hawk.mesa.gla does not fill 2 layers evenly; take a multiple of 3"),
        (mad, ["--fit.batch-size", "33"], "fit.batch_size: 33 cannot be shared evenly by 2 devices"),
        (mad, ["--fit.epochs", "0"], "epochs=0 and batch_size=32 must be at least 1"),
        (mad, ["--fit.least-steps", "-1"], "least_steps=-1 is negative"),
        (mad, ["--tasks", "typing"], "invalid choice.*typing"),
        (
            mad,
            ["--model.num-heads", "6"],
            "model: of hawk, .*recurrent_dim=80 must be a positive multiple of num_heads=6",
        ),
        (mad, ["--model.value-dim", "32"], "model: of attention, .*attention needs an even key_dim"),
        (
            mad,
            ["--model.pattern", "gla"],
            "model.pattern: mixers, task and the sizes to try say it; leave the",
        ),
        (mad, ["--seeds", "-1"], "fit: seed=-1 must lie between 0 and"),
        (mad, ["--peak-lrs", "0"], "fit: .*peak_lr=0.0 must be positive"),
        (mad, ["--fit.b2", "2"], r"fit: .*b1 and b2 must lie in \[0, 1\)"),
        (regbench, ["--model.vocab-size", "18"], "model.vocab_size: mixers, task and the sizes to try say it"),
        (regbench, ["--num-train", "10"], "num_train: 10 is less than fit.batch_size=32"),
        (regbench, ["--automata.strings", "1", "1", "--automata.string-length", "1", "1"], "one string of one symbol"),
        (regbench, ["--automata.ways-out", "1", "9"], r"ways_out=\(1, 9\) must be fewer than the fewest states"),
        (regbench, ["--num-test", "0"], "num_train and num_test must be at least 1"),
    ],
)
def test_nonsense_ends_in_a_sentence_before_anything_is_written(command, options, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run_preset(
            command.main, command.PRESETS, default="small", args=[*options, "--output", str(tmp_path / "new")]
        )
    assert stopped.value.code == 2
    assert re.search(words, re.sub(r"\s*[│╭╰─╮╯\n]+\s*", " ", capsys.readouterr().err))
    assert not (tmp_path / "new").exists()
