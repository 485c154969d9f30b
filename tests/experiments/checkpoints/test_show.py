"""Looking at checkpoints tells what is in them, and touches neither them nor a device."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.checkpoints import __main__, manifest, show
from experiments.cli import UserError
from tests.experiments.checkpoints.states import contents, spoil


def shown(capsys, path: Path, *, quick: bool = False) -> list[list[str]]:
    __main__.main(__main__.ShowConfig(path=path, quick=quick))
    return [line.split("  ") for line in capsys.readouterr().out.splitlines()]


def test_a_table_shows_every_checkpoint_of_a_run(folder, capsys):
    for path in (folder, folder.parent):
        titles, *rows = shown(capsys, path)
        assert [cell.strip() for cell in titles if cell] == list(show.TITLES)
        cells = [[cell.strip() for cell in row if cell] for row in rows]
        assert [row[0] for row in cells] == ["10", "20", "30"]
        assert all(row[3:] == ["8", "4,099", "bfloat16, float32, int32", "data 2", "verified"] for row in cells)
    assert shown(capsys, folder, quick=True)[1][-1] == "not read"


def test_one_checkpoint_is_shown_with_its_arrays(folder, capsys):
    lines = shown(capsys, folder / "20")
    cells = [[cell.strip() for cell in line if cell] for line in lines]
    assert ["1 x", "params/layer/weight", "float32", "64 x 64"] in cells
    assert ["1 x", "step", "int32", "scalar"] in cells


def test_arrays_that_differ_in_a_number_share_a_line():
    shapes = [manifest.Array(f"layers/{n}/kernel", (2, 3), "float32") for n in range(12)]
    shapes += [manifest.Array(f"opt/{n}/count", (), "int32") for n in (0, 2)]
    lines = show.arrays(manifest.Manifest(1, 0.0, {}, shapes, {}))
    assert [line.split() for line in lines[1:]] == [
        ["12", "x", "layers/{0-11}/kernel", "float32", "2", "x", "3"],
        ["2", "x", "opt/{0,2}/count", "int32", "scalar"],
    ]


def test_damage_is_shown_with_exit_status_1_and_so_is_what_else_lies_there(folder, capsys):
    spoil(folder, 20)
    (folder / "30" / "manifest.json").unlink()
    (folder / "40.unsealed").mkdir()
    (folder / "10").rename(folder / "10.bak")
    before = contents(folder)
    with pytest.raises(SystemExit, match="1"):
        shown(capsys, folder)
    out = capsys.readouterr().out
    assert "does not hold the bytes that were saved" in out and "manifest.json is missing" in out
    assert "step 40 is being saved" in out and "10.bak is not under the name of a step" in out
    assert contents(folder) == before


def test_a_path_without_checkpoints_ends_in_a_sentence(tmp_path, capsys):
    (tmp_path / "runs" / "2026" / "checkpoints").mkdir(parents=True)  # a run, whatever it is called
    for path in (tmp_path, tmp_path / "none", tmp_path / "runs" / "2026"):
        with pytest.raises(UserError, match=r"^path: .*; give a run's folder, its checkpoints, or one of them\.$"):
            shown(capsys, path)


def test_looking_needs_neither_orbax_nor_a_device(saved):
    code = (
        "import sys; from experiments.checkpoints import __main__ as main; from pathlib import Path;"
        "main.main(main.ShowConfig(path=Path(sys.argv[1]))); assert 'orbax' not in sys.modules;"
        "from jax._src import xla_bridge; assert not xla_bridge._backends"
    )
    done = subprocess.run([sys.executable, "-c", code, saved], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
