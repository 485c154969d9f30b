"""A cell is computed once, and a sweep does not mix with another."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments.cli import UserError
from experiments.runs import claimed
from experiments.sweep import opened
from experiments.synthetic.fit import FitConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    output: Path
    seeds: tuple[int, ...] = (0, 1)
    factor: int = 2
    fit: FitConfig = FitConfig()


CELLS = [{"mixer": "mesa", "seed": seed} for seed in range(4)]


def compute(config: Config, cells=CELLS, upto: int = 99) -> tuple[list, list]:
    """Returns the entries and the seeds that were computed."""
    computed = []

    def result(mixer: str, seed: int):
        if seed >= upto:
            raise KeyboardInterrupt
        computed.append(seed)
        return {"mean": config.factor * seed / 10}

    with opened(config) as sweep:
        return sweep.compute(cells, result), computed


def test_a_sweep_that_was_interrupted_goes_on_where_it_was(tmp_path):
    config = Config(output=tmp_path / "sweep")
    with pytest.raises(KeyboardInterrupt):
        compute(config, upto=2)
    entries, computed = compute(config)
    assert computed == [2, 3]
    assert entries == [{"cell": cell, "mean": 2 * cell["seed"] / 10} for cell in CELLS]
    assert compute(config) == (entries, [])


def test_a_line_that_a_crash_cut_short_is_computed_again(tmp_path):
    config = Config(output=tmp_path)
    before, _ = compute(config)
    file = tmp_path / "cells.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    assert compute(config) == (before, [3])
    assert [json.loads(line) for line in file.read_text().splitlines()] == before


def test_more_cells_and_another_folder_are_the_same_sweep(tmp_path):
    compute(Config(output=tmp_path / "a"), CELLS[:2])
    (tmp_path / "a").rename(tmp_path / "b")
    assert compute(Config(output=tmp_path / "b", seeds=(0, 1, 2, 3)))[1] == [2, 3]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"factor": 3}, "factor: .* was started with 2, not 3"),
        ({"fit": FitConfig(epochs=9)}, "fit.epochs: .* with 200"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, fields, words):
    config = Config(output=tmp_path)
    compute(config)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match=words):
        compute(dataclasses.replace(config, **fields))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_sweep_without_a_cell_may_begin_with_other_settings(tmp_path):
    (tmp_path / "sweep.json.draft").write_text("{")  # of a start that was killed
    config = Config(output=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        compute(config, upto=0)
    assert compute(dataclasses.replace(config, factor=3))[1] == [0, 1, 2, 3]


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no sweep; give a new folder"):
        compute(Config(output=tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", ["{\n{}\n", "[1]\n"])
@pytest.mark.parametrize("name", ["cells.jsonl", "sweep.json"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    config = Config(output=tmp_path)
    compute(config)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        compute(config)


def test_two_processes_do_not_write_into_one_sweep(tmp_path):
    compute(Config(output=tmp_path))
    with claimed(tmp_path), pytest.raises(UserError, match="another process"):
        compute(Config(output=tmp_path))
