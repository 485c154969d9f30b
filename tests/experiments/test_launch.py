"""The scripts that start runs, with stand-ins for all they call: what is run, what is run again, what is not."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "experiments" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
MODULE = ["-m", "experiments.mesanet.pretrain"]
OPTIONS = ["tiny", "--output", "/shared/a run", "--data.source", "it's $HOME; *"]
POD = {"NAME": "mesa", "ZONE": "z", "ACCELERATOR": "v5p-16", "RUNTIME": "r", "SHARED": "10.0.0.2:/share"}

# Writes its arguments down and leaves with the next status in its file, 0 when there is none left.
RECORDER = """#!/usr/bin/env bash
printf '%q ' "$(basename "$0")" "$@" >>{folder}/calls; echo >>{folder}/calls
read -r status <{folder}/statuses && sed -i 1d {folder}/statuses
exit "${{status:-0}}"
"""

# A slice of two workers, whose homes are folders; what it makes of their statuses differs by version.
GCLOUD = """#!/usr/bin/env bash
printf '%q ' gcloud "$@" >>{folder}/calls; echo >>{folder}/calls
for word in "$@"; do
  case $word in --worker=*) worker=${{word#*=}} ;; --command=*) command=${{word#*=}} ;; esac
done
case "$3 $4" in
  "queued-resources describe") read -r state <{folder}/states; sed -i 1d {folder}/states; echo "$state" ;;
  "tpu-vm scp") for home in {folder}/worker*; do cp "$5" "$home/mesanet.tar.gz"; done ;;
  "tpu-vm ssh") case "$command" in *" train "*) [ ! -e {folder}/hang ] || exec sleep 60 ;; esac
  case $worker in
    all) for home in {folder}/worker*; do (cd "$home" && bash -c "$command") || failed=$?; done
      [ ! -e {folder}/newer ] || exit "${{failed:-0}}" ;;
    *) cd {folder}/worker"$worker" && bash -c "$command" ;;
  esac ;;
esac
"""

SAVES_SLOWLY = """
trap 'sleep 0.5; echo saved >>{folder}/calls; exit 143' TERM
echo ready >>{folder}/calls
sleep 60 &
wait
"""

GIT = """#!/usr/bin/env bash
for word in "$@"; do case $word in --output=*) tar -czf "${{word#*=}}" experiments/launch ;; esac; done
"""


class Desk:
    """A folder of stand-ins that come before everything else on the path."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir()
        self.put(folder / "venv/bin/python", RECORDER)
        self.statuses()

    def put(self, file: Path, text: str, folder: Path | None = None) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.format(folder=folder or self.folder))
        file.chmod(0o755)

    def statuses(self, *statuses: int) -> None:
        (self.folder / "statuses").write_text("".join(f"{status}\n" for status in statuses))

    def environment(self, **variables: str) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return {"HOME": "/nowhere", "PATH": path, "PAUSE": "0", "POLL": "0", **variables}

    def run(self, script: str, *args: str, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [LAUNCH / script, *args],
            cwd=ROOT,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def train(self, **variables: str) -> subprocess.CompletedProcess:
        return self.run("tpu_vm.sh", *OPTIONS, VENV=str(self.folder / "venv"), **variables)

    def calls(self, folder: Path | None = None) -> list[list[str]]:
        file = (folder or self.folder) / "calls"
        return [shlex.split(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


@pytest.fixture
def pod(desk):
    """Two workers, on which everything is installed already."""
    desk.put(desk.folder / "bin/gcloud", GCLOUD)
    desk.put(desk.folder / "bin/git", GIT)
    for name in ("mountpoint", "python3"):
        desk.put(desk.folder / "bin" / name, RECORDER)
    for home in (desk.folder / "worker0", desk.folder / "worker1"):
        desk.put(home / "venv/bin/python", RECORDER, home)
        (home / "statuses").touch()
    states(desk, "ACTIVE")
    return desk


def states(pod: Desk, *states: str) -> None:
    """What the queue says, look after look; the slice is there ever after."""
    (pod.folder / "states").write_text("".join(f"{state}\n" for state in [*states, *["ACTIVE"] * 50]))


def verbs(pod: Desk) -> list[str]:
    """What was asked of the queue and of all workers, in that order."""
    return [call[4] for call in pod.calls() if call[0] == "gcloud" and call[4] in ("create", "delete", "scp")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_bash_that_stops_at_its_first_error(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert "\nset -euo pipefail\n" in script.read_text() and os.access(script, os.X_OK)


@pytest.mark.parametrize(
    ("statuses", "starts", "end"),
    [([0], 1, 0), ([2], 1, 2), ([130], 1, 130), ([134, 143, 3, 0], 4, 0), ([143] * 8 + [0], 9, 0), ([1] * 9, 5, 1)],
)
def test_a_run_is_started_again_until_it_is_over(statuses, starts, end, desk):
    desk.statuses(*statuses)
    assert desk.train().returncode == end
    assert desk.calls() == [["python", *MODULE, *OPTIONS]] * starts


def test_a_crash_long_after_the_start_is_not_held_against_the_run(desk):
    desk.statuses(*[134] * 9)
    assert desk.train(SOON="0").returncode == 0
    assert len(desk.calls()) == 10


def test_a_script_that_is_asked_to_leave_waits_for_the_run_and_starts_no_other(desk):
    desk.put(desk.folder / "venv/bin/python", "#!/usr/bin/env bash\n" + SAVES_SLOWLY)
    command = [LAUNCH / "tpu_vm.sh", "tiny"]
    variables = desk.environment(VENV=str(desk.folder / "venv"))
    with subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True) as process:
        wait_for(desk.calls)
        os.killpg(process.pid, signal.SIGTERM)  # as a machine that shuts down does
        assert process.wait(30) == 143
    assert desk.calls() == [["ready"], ["saved"]]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("script", "variable"),
    [("tpu_vm.sh", "VENV"), ("slurm.sh", "VENV"), ("slurm.sh", "SLURM_JOB_ID"), *[("tpu_pod.sh", x) for x in POD]],
)
def test_a_variable_that_is_not_set_is_named_before_anything_is_run(script, variable, pod):
    variables = {**POD, "VENV": str(pod.folder / "venv"), "SLURM_JOB_ID": "7"}
    del variables[variable]
    done = pod.run(script, "run", *OPTIONS, **variables)
    assert done.returncode == 2 and not pod.calls()
    assert done.stderr.startswith(f"error: {variable} is not set; ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["tpu_vm.sh", "slurm.sh", "tpu_pod.sh"])
def test_a_dry_run_prints_every_command_and_runs_none(script, pod):
    variables = {**POD, "VENV": str(pod.folder / "venv"), "SLURM_JOB_ID": "7", "DRY_RUN": "1"}
    done = pod.run(script, *(["run"] if script == "tpu_pod.sh" else []), *OPTIONS, **variables)
    assert done.returncode == 0 and not done.stderr and not pod.calls()
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    if script == "tpu_pod.sh":
        assert [command[4] for command in commands] == ["create", "scp", "ssh", "ssh", "ssh"]
    else:
        assert commands[0][-len(OPTIONS) :] == OPTIONS


@pytest.mark.parametrize(
    ("statuses", "starts", "requeued"), [([0], 1, False), ([2], 1, False), ([143], 1, True), ([134, 143], 2, True)]
)
def test_slurm_has_a_run_whose_time_is_up_back_in_the_queue(statuses, starts, requeued, desk):
    for name in ("srun", "scontrol"):
        desk.put(desk.folder / "bin" / name, RECORDER)
    desk.statuses(*statuses)
    venv = str(desk.folder / "venv")
    assert desk.run("slurm.sh", *OPTIONS, VENV=venv, SLURM_JOB_ID="7").returncode == statuses[-1]
    srun = ["srun", "--gpu-bind=none", f"{venv}/bin/python", *MODULE, *OPTIONS]
    assert desk.calls() == [srun] * starts + [["scontrol", "requeue", "7"]] * requeued


def test_slurm_is_not_asked_to_run_again_what_it_ends_itself(desk):
    desk.put(desk.folder / "bin/srun", "#!/usr/bin/env bash\n" + SAVES_SLOWLY)
    desk.put(desk.folder / "bin/scontrol", RECORDER)
    variables = desk.environment(VENV=str(desk.folder / "venv"), SLURM_JOB_ID="7")
    with subprocess.Popen([LAUNCH / "slurm.sh"], cwd=ROOT, env=variables, start_new_session=True) as process:
        wait_for(desk.calls)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(30) == 143
    assert desk.calls() == [["ready"], ["saved"]]


def test_a_pod_is_taken_waited_for_and_kept(pod):
    states(pod, "", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    done = pod.run("tpu_pod.sh", "run", *OPTIONS, **POD, SPOT="1")
    assert done.returncode == 0 and "mesa still bills" in done.stderr
    assert verbs(pod) == ["create", "scp"]
    create = next(call for call in pod.calls() if "create" in call)
    assert create[3:] == [
        *("queued-resources", "create", "mesa", "--node-id=mesa", "--zone=z", "--accelerator-type=v5p-16"),
        *("--runtime-version=r", "--spot"),
    ]
    for worker in ("worker0", "worker1"):
        assert pod.calls(pod.folder / worker) == [["python", *MODULE, *OPTIONS]]


@pytest.mark.parametrize("newer", [False, True])
def test_a_pod_goes_on_when_a_worker_crashed(newer, pod):
    if newer:
        (pod.folder / "newer").touch()
    (pod.folder / "worker0/statuses").write_text("3\n134\n0\n")
    (pod.folder / "worker1/statuses").write_text("134\n2\n0\n")  # what it leaves with does not count
    assert pod.run("tpu_pod.sh", "run", *OPTIONS, **POD).returncode == 0
    assert len(pod.calls(pod.folder / "worker1")) == 3
    assert verbs(pod) == ["scp"] * 3


def test_a_pod_does_not_go_on_after_a_mistake_of_its_user(pod):
    (pod.folder / "worker0/statuses").write_text("2\n")
    assert pod.run("tpu_pod.sh", "run", *OPTIONS, **POD).returncode == 2
    assert len(pod.calls(pod.folder / "worker1")) == 1


def test_a_pod_that_was_preempted_is_replaced(pod):
    (pod.folder / "worker0/statuses").write_text("143\n0\n")
    states(pod, "ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", "", "ACTIVE")  # the second is seen after the run
    assert pod.run("tpu_pod.sh", "run", *OPTIONS, **POD).returncode == 0
    assert verbs(pod) == ["scp", "delete", "create", "scp"]
    assert sum("tpu_worker.sh status" in word for call in pod.calls() for word in call) == 1, "it was gone"


def test_a_request_that_failed_is_not_repeated(pod):
    states(pod, "FAILED")
    done = pod.run("tpu_pod.sh", "run", *OPTIONS, **POD)
    assert done.returncode == 2 and "describe mesa" in done.stderr and not verbs(pod)


def test_a_pod_is_given_back_only_when_asked(pod):
    assert pod.run("tpu_pod.sh", "down", **POD).returncode == 0
    assert verbs(pod) == ["delete"]


def test_all_rounds_of_a_run_have_the_code_of_the_first(pod):
    (pod.folder / "worker0/statuses").write_text("134\n0\n")
    pod.run("tpu_pod.sh", "run", *OPTIONS, **POD)
    first, second = (call[5] for call in pod.calls() if "scp" in call)
    assert first == second and not Path(first).exists()


def test_interrupting_a_pod_saves_on_all_workers(pod):
    (pod.folder / "hang").touch()
    command, variables = [LAUNCH / "tpu_pod.sh", "run", "tiny"], pod.environment(**POD)
    # a shell cannot take a signal back that it was started to ignore, as everything in the background is
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", heed, *map(str, command)]
    with subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True, stderr=subprocess.PIPE) as process:
        wait_for(lambda: any(" train tiny" in word for call in pod.calls() for word in call))
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 130
    assert pod.calls()[-1][4:8] == ["ssh", "mesa", "--zone=z", "--worker=all"]
    assert pod.calls()[-1][8].endswith("tpu_worker.sh stop")


def test_a_worker_is_stopped_by_a_signal_that_lets_it_save(pod):
    home = pod.folder / "worker0"
    script = home / "mesanet/experiments/launch/tpu_worker.sh"
    script.parent.mkdir(parents=True)
    script.write_bytes((LAUNCH / "tpu_worker.sh").read_bytes())
    saving = f"import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\nopen('{home}/ready', 'w')\n"
    (home / "venv/bin/python").write_text(f"#!{sys.executable}\n{saving}signal.pause()\n")
    with subprocess.Popen(["bash", script, "train", "tiny"], env=pod.environment()) as process:
        wait_for((home / "ready").exists)
        subprocess.run(["bash", script, "stop"], check=True, env=pod.environment())
        assert process.wait(30) == 143
    assert subprocess.run(["bash", script, "status"], env=pod.environment()).returncode == 143


def test_a_worker_that_knows_no_status_is_not_taken_for_a_mistake(pod):
    script = pod.folder / "worker0/mesanet/experiments/launch/tpu_worker.sh"
    script.parent.mkdir(parents=True)
    script.write_bytes((LAUNCH / "tpu_worker.sh").read_bytes())
    done = subprocess.run(["bash", script, "status"], env=pod.environment(), stderr=subprocess.DEVNULL)
    assert done.returncode == 1
