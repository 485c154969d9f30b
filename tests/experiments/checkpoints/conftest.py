"""Checkpoints that lie on the disk already."""

import shutil

import pytest

from experiments.checkpoints import Checkpoints
from tests.experiments.checkpoints.states import make_state


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the steps 10, 20 and 30."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, make_state(step), mesh={"data": 2, "tensor": 1})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it to be spoilt."""
    return shutil.copytree(saved, tmp_path / "checkpoints")
