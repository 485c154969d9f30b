"""Builds of shards that are killed at every moment that matters; started by test_data_build.py.

python builders.py SOURCE TOKENIZER FOLDER

FOLDER/undisturbed is built in one go. FOLDER/n is killed with SIGKILL at the n-th call that touches the disk or
tokenises, and then goes on; in FOLDER/hunted one build after another is killed, each one call later than the last.
"""

import functools
import itertools
import os
import signal
import sys
from pathlib import Path

from experiments.data import build, encoding, shards

SOURCE, TOKENIZER, FOLDER = sys.argv[1:]
NEVER = -1
WATCHED = (
    (os, "fsync"),
    (os, "replace"),
    (build, "encode_all"),
    (shards, "digest"),
    (Path, "unlink"),
)


def deadly(function, calls: itertools.count, last: int):
    """The function, but the process is killed instead of call number `last`."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


def killed(folder: Path, last: int) -> bool:
    """Builds in a process of its own; True if it came to its last call."""
    pid = os.fork()
    if pid == 0:
        encoding.BATCH_CHARACTERS = 800
        calls = itertools.count()
        for owner, name in WATCHED:
            setattr(owner, name, deadly(getattr(owner, name), calls, last))
        build.build(config(folder, TOKENIZER))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"the build failed, {last}"
    return os.WIFSIGNALED(status)


def config(folder: Path, tokenizer: str) -> build.BuildConfig:
    """A build of three pairs of files."""
    return build.BuildConfig(source=SOURCE, tokenizer=tokenizer, output=folder, held_out=0.3, shard_tokens=200)


folder = Path(FOLDER)
build.build(config(folder / "bytes", ""))  # imports what is imported late, once for all
killed(folder / "undisturbed", NEVER)
kills = 0
while killed(folder / str(kills), kills):
    killed(folder / str(kills), NEVER)
    kills += 1
hunts = next(n for n in itertools.count() if not killed(folder / "hunted", n))
print(kills, hunts)
