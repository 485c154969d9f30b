"""What all tasks are made of."""

from typing import NamedTuple

import numpy as np

IGNORED = -1  # target of a position that is not asked for


class Examples(NamedTuple):
    """Sequences, and what is asked at their positions."""

    inputs: np.ndarray  # [n, t] int32
    targets: np.ndarray  # [n, t] int32, IGNORED where nothing is
