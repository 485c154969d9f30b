"""Checkpoints of a run: written while training goes on, verified before they are read, never given up in silence.

disk.py        what lies in the folder: sealed steps, drafts, what was set aside
manifest.py    the content of one checkpoint: arrays, files, digests
likeness.py    whether the arrays saved are those asked for
saver.py       arrays -> draft -> manifest -> sealed, behind training
peers.py       several processes, one decision
store.py       Checkpoints, which is all that others import
"""

from experiments.checkpoints.store import Checkpoints

__all__ = ["Checkpoints"]
