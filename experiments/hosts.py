"""The start of a run on several hosts: who is there, whether all mean the same run, and who leaves with whom.

Before JAX connects anything, the hosts call the roll through a plain socket at the coordinator's address. JAX itself
would end each process with a stack trace if one of them is missing, and cannot say which.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from experiments.cli import UserError

Result = TypeVar("Result")

LONGEST_MESSAGE = 1 << 20  # bytes; a config is a few thousand
LOST = 3  # exit status of a host that others have left
GONE = "another process is gone"  # what a checkpoint says that others had to help to write
SIGNS_OF_LOSS = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "eartbeat", GONE)


class AbsentError(UserError):
    """A host is not there (yet): the same command may do better next time."""

    status = 75  # what sysexits.h calls a temporary failure


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """The processes of a run.

    Attributes:
      coordinator: address:port of host 0; empty asks the cluster (Slurm, TPU pod, Kubernetes, MPI), and where there is
        none the process is alone.
      count: number of processes; 0 asks the cluster.
      index: number of this process from 0; -1 asks the cluster.
      wait_seconds: time for all hosts to come.
      heartbeat_seconds: silence after which a host counts as lost.
    """

    coordinator: str = ""
    count: int = 0
    index: int = -1
    wait_seconds: float = 30.0
    heartbeat_seconds: int = 7

    def __post_init__(self):
        port = self.coordinator.rpartition(":")[2]
        if self.coordinator and not (port.isdecimal() and 0 < int(port) < 2**16):
            raise ValueError(f"HostsConfig: coordinator={self.coordinator!r} must be address:port of host 0.")
        if self.count < 0 or self.index < -1 or (self.count and self.index >= self.count):
            raise ValueError(f"HostsConfig: index={self.index} must lie between 0 and count={self.count} - 1.")
        if not (0 < self.wait_seconds <= 86400 and 1 <= self.heartbeat_seconds <= 3600):
            raise ValueError(
                f"HostsConfig: wait_seconds={self.wait_seconds} must lie between 0 and 86400, "
                f"heartbeat_seconds={self.heartbeat_seconds} between 1 and 3600."
            )


class Word(NamedTuple):
    """What the hosts told each other with a step."""

    signal: int  # number of the one that asks some host to leave, or 0
    slowest: int  # the host that kept its devices waiting longest
    seconds: float  # how long that was


class Exchange:
    """Each host says something with each step, and hears all others one step later: so all stop after the same one."""

    def __init__(self, mesh: jax.sharding.Mesh):
        """Prepares one small all-gather over the devices of the mesh; nothing is sent where there is one host."""
        self._alone = jax.process_count() == 1
        self._rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._gather = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._hosts = [device.process_index for device in mesh.devices.flat]

    def say(self, signal: int, seconds: float) -> jax.Array | np.ndarray:
        """Returns what all hosts say, a row for each device [devices, 2], perhaps still on its way."""
        mine = np.array([[signal, seconds]], np.float32)
        if self._alone:
            return mine
        return self._gather(jax.make_array_from_callback((len(self._hosts), 2), self._rows, lambda _: mine))

    def hear(self, said: jax.Array | np.ndarray) -> Word:
        """Waits for it and sums it up."""
        rows = np.asarray(said)
        slowest = int(np.argmax(rows[:, 1]))
        return Word(int(rows[:, 0].max()), self._hosts[slowest], float(rows[slowest, 1]))


class Place(NamedTuple):
    """Where this process stands among all."""

    coordinator: str
    count: int
    index: int
    local_devices: list[int] | None


def start(config: HostsConfig, fields: Mapping[str, Any]) -> None:
    """Connects this process with all others of its run, also where there is no other; call it before any use of JAX.

    A process that uses JAX already, a notebook say, stays as it is if it is alone.

    Args:
      config: the hosts.
      fields: what must be the same everywhere, as JSON knows it; host 0's counts.

    Raises:
      UserError: a host is missing or has other fields; the message names it.
    """
    if jax.distributed.is_initialized():
        return
    place = _place(config)
    if place.count > 1:
        call_roll(place, {"jax": jax.__version__, **fields}, config.wait_seconds)
    else:
        jax.config.update("jax_cpu_collectives_implementation", None)  # the default is for several processes
    jax.config.update("jax_enable_preemption_service", False)  # experiments.preemption takes the signal
    with contextlib.suppress(RuntimeError) if place.count == 1 else contextlib.nullcontext():
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            place.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=max(30, round(config.wait_seconds)),
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            shutdown_timeout_seconds=config.heartbeat_seconds,
        )


def call_roll(place: Place, fields: Mapping[str, Any], wait_seconds: float) -> None:
    """Returns when all hosts are there with the same fields.

    Raises:
      AbsentError: on every host that came, naming those that did not.
      UserError: on every host, naming the first field that differs and who has what.
    """
    deadline = time.monotonic() + wait_seconds
    mine = {"index": place.index, "host": socket.gethostname(), "fields": json.loads(json.dumps(fields, default=str))}
    verdict = _answer_roll(place, mine, deadline, wait_seconds) if place.index else _host_roll(place, mine, deadline)
    if verdict.text:
        raise (AbsentError if verdict.absent else UserError)(verdict.text)


@contextlib.contextmanager
def leaving_with_the_others() -> Iterator[None]:
    """Ends this process at once, if it is one of several, after an error here or when another one is gone.

    What they compute together cannot go on, and a proper exit would wait for the others, who wait for this one.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        os._exit(_report(error))


def _report(error: Exception) -> int:
    """Prints what there is to say, and returns the exit status."""
    if isinstance(error, UserError) and GONE not in str(error):
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.status
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    if not any(sign in str(error) for sign in SIGNS_OF_LOSS):
        traceback.print_exception(error)
        sys.stderr.flush()
        return 1
    print(
        f"error: hosts: another host of this run is gone ({reason}); start the same command again on all hosts, it "
        f"goes on from the last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    return LOST


def together(call: Callable[[], Result]) -> Result:
    """Calls on every host; what is wrong on one is raised on all, so that none waits for it.

    Raises:
      UserError: the call raised it, here or elsewhere.
    """
    complaint, result = "", None
    try:
        result = call()
    except UserError as error:
        complaint = str(error)
    except Exception as error:
        if jax.process_count() == 1:
            raise
        traceback.print_exception(error)
        complaint = f"{type(error).__name__}: {error}"
    if jax.process_count() > 1:
        padded = np.zeros(1024, np.uint8)
        text = complaint.encode()[: len(padded)]
        padded[: len(text)] = np.frombuffer(text, np.uint8)
        said = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(padded)]
        complaint = complaint or next((f"{text} (host {i})" for i, text in enumerate(said) if text), "")
    if complaint:
        raise UserError(complaint)
    return cast(Result, result)


def first_then_others(on_first: Callable[[], object], on_others: Callable[[], object]) -> None:
    """Calls one thing on the first host, and when that is done another on all others.

    Raises:
      UserError: a call raised it on some host.
    """
    together(lambda: on_first() if first() else None)
    together(lambda: None if first() else on_others())


def from_first(number: int) -> int:
    """Returns the number that the first host has."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def say(text: str) -> None:
    """Prints a line once for all hosts."""
    if first():
        with contextlib.suppress(BrokenPipeError):  # nobody reads any more
            print(text, flush=True)


def first() -> bool:
    """True on the one host that writes what all know."""
    return jax.process_index() == 0


def _place(config: HostsConfig) -> Place:
    """Returns what the config says, completed by what the cluster says.

    Raises:
      UserError: one of the three is given and the others are not to be had.
    """
    from jax._src.clusters import ClusterEnv  # JAX asks it itself, but then connects at once

    found = ClusterEnv.auto_detect_unset_distributed_params(
        config.coordinator or None,
        config.count or None,
        config.index if config.index >= 0 else None,
        None,
        None,
        round(config.wait_seconds),
    )
    if found[:3] == (None, None, None):
        return Place(f"127.0.0.1:{_free_port()}", 1, 0, None)
    if None in found[:3]:
        raise UserError(
            "hosts: coordinator, count and index go together where no cluster says them; give --hosts.coordinator "
            "ADDRESS:PORT --hosts.count N --hosts.index I."
        )
    return Place(*found)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Verdict(NamedTuple):
    """What is wrong, in one sentence; nothing is the empty one."""

    text: str = ""
    absent: bool = False  # somebody is not there, which may pass


def _host_roll(place: Place, mine: dict, deadline: float) -> _Verdict:
    """Takes in every host's answer and tells all of them the verdict."""
    answers, lines, twice = {0: mine}, {}, None
    port = int(place.coordinator.rpartition(":")[2])
    try:
        listener = socket.create_server(("", port), reuse_port=False)
    except OSError as error:
        text = f"hosts.coordinator: port {port} of this host cannot be had ({error.strerror}); give another."
        return _Verdict(text, absent=True)  # an earlier start may still be leaving
    with listener, contextlib.ExitStack() as stack:
        while not _all_there(answers, lines, place.count) and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a stranger at the port
                line, _ = listener.accept()
                stack.enter_context(line)
                line.settimeout(min(left, 5))
                answer = json.loads(_read_line(line))
                index = int(answer["index"])
                if index in answers and not _hung_up(lines.get(index)):  # else it was started again meanwhile
                    twice = twice or _twice(answers[index], answer)
                answers[index], lines[index] = answer, line
        verdict = twice or _verdict(answers, place.count)
        for line in lines.values():
            with contextlib.suppress(OSError):
                line.sendall(json.dumps(verdict).encode() + b"\n")
    return verdict


def _answer_roll(place: Place, mine: dict, deadline: float, wait_seconds: float) -> _Verdict:
    """Tells host 0 who is here, and returns its verdict."""
    address, _, port = place.coordinator.rpartition(":")
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((address.strip("[]"), int(port)), timeout=left) as line:
                line.sendall(json.dumps(mine).encode() + b"\n")
                line.settimeout(wait_seconds + 5)  # host 0 waits as long, from a time that has passed already
                return _Verdict(*json.loads(_read_line(line)))
        except (OSError, ValueError, TypeError):
            time.sleep(0.1)
    text = f"hosts.coordinator: host 0 did not answer at {place.coordinator}; see whether it runs and can be reached."
    return _Verdict(text, absent=True)


def _read_line(line: socket.socket) -> bytes:
    with line.makefile("rb") as file:
        return file.readline(LONGEST_MESSAGE)


def _all_there(answers: dict[int, dict], lines: dict[int, socket.socket], count: int) -> bool:
    """True if so many hosts wait for the verdict; those that have left meanwhile are forgotten."""
    if len(answers) >= count:
        for index in [index for index, line in lines.items() if _hung_up(line)]:
            del answers[index], lines[index]
    return len(answers) >= count


def _hung_up(line: socket.socket | None) -> bool:
    """True if the other side has closed it; host 0 itself has no line, and does not."""
    if line is None:
        return False
    line.setblocking(False)
    try:
        return line.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        line.settimeout(5)


def _twice(before: dict, answer: dict) -> _Verdict:
    names = f"{before['host']} and {answer['host']}"
    return _Verdict(
        f"hosts.index: two hosts ({names}) say they are number {answer['index']}; give each a number of its own."
    )


def _verdict(answers: Mapping[int, dict], count: int) -> _Verdict:
    """Says the first thing that is wrong."""
    missing = [str(i) for i in range(count) if i not in answers]
    if missing:
        came = ", ".join(f"{i} ({answers[i]['host']})" for i in sorted(answers))
        return _Verdict(
            f"hosts: of {count} hosts number {', '.join(missing)} did not come, there are {came}; start the missing "
            f"ones with the same command, or raise --hosts.wait-seconds.",
            absent=True,
        )
    if len(answers) > count:
        return _Verdict(
            f"hosts.count: a host with number {max(answers)} came to a run of {count}; give all the same count."
        )
    expected = answers[0]["fields"]
    for index in sorted(answers):
        found = answers[index]["fields"]
        for field in [*expected, *(field for field in found if field not in expected)]:
            if expected.get(field) != found.get(field):
                return _Verdict(
                    f"{field}: host {index} ({answers[index]['host']}) has {found.get(field)!r}, host 0 has "
                    f"{expected.get(field)!r}; start all hosts with the same command and installation."
                )
    return _Verdict()
