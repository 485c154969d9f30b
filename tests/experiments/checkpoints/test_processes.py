"""Several processes save one checkpoint and take the same one."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from experiments.checkpoints import Checkpoints, peers


def test_processes_share_the_reading_and_leave_no_file_out(monkeypatch):
    sizes = {f"file {n}": n * n for n in range(40)}
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    shares = []
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        shares.append(peers.share(sizes))
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) < 1.02 * min(loads)


def test_two_processes_save_and_take_the_same_and_one_reads_what_they_saved(tmp_path):
    rows = np.arange(4096 * 8, dtype=np.float32).reshape(4096, 8)
    like = {"matrix": rows, "step": np.int32(0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"matrix": rows + 1, "step": np.int32(1)})
    first, second = run_savers(tmp_path, processes=2, devices=2)
    for report in (first, second):
        assert report["first"] == [1, True]
        assert report["after"] == [3, True]
        assert report["steps"] == report["again"] == [3, 4]
        assert "every checkpoint in" in report["refused"]
    (line,) = first["told"]
    assert "4 is damaged: ocdbt.process_" in line and line.endswith("step 3 is taken instead.")
    assert second["told"] == []
    for step in (3, 4):
        restored = Checkpoints.open(tmp_path).restore(step, like)
        np.testing.assert_array_equal(restored["matrix"], rows + step)


def run_savers(folder: Path, processes: int, devices: int) -> list[dict]:
    """Runs savers.py as so many processes and returns what they report; none outlives this."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("savers.py")
    started = [
        subprocess.Popen(
            [sys.executable, script, *map(str, (port, process, processes, devices)), folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=90) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, outputs
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]
