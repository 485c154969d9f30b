"""Several processes that share a folder of checkpoints and must come to one decision. Alone, all of this is free."""

import json
from collections.abc import Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Value = TypeVar("Value")


def gathered(value: Value) -> list[Value]:
    """Returns the values (anything JSON can say) of all processes, in their order; every process has to call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(text)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def of_first(value: Value) -> Value:
    """Returns the value of process 0; every process has to call it."""
    return gathered(value)[0]


def is_first() -> bool:
    """Whether this is the process that renames, deletes and speaks for all."""
    return jax.process_index() == 0


def share(sizes: Mapping[str, int]) -> list[str]:
    """Returns the files that this process reads, so that each of them reads about as many bytes."""
    loads, mine = [0] * jax.process_count(), []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        process = loads.index(min(loads))
        loads[process] += sizes[name]
        if process == jax.process_index():
            mine.append(name)
    return mine
