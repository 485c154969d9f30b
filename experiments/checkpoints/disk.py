"""What lies in a folder of checkpoints, and the few ways it changes; each a rename, so that a kill leaves no half.

30/                a sealed checkpoint
40.unsealed-...    a draft: being saved now, or when the run was killed
10.deleted         being deleted
damaged/20-1/      set aside, the first time for step 20
"""

import itertools
import os
import re
import shutil
from pathlib import Path

from experiments.checkpoints import manifest

DAMAGED = "damaged"
_DRAFT = re.compile(r"(\d+)\.unsealed")  # orbax appends to it while it writes
_LITTER = re.compile(r"\d+\.(unsealed|deleted)")


def entries(folder: Path) -> list[int]:
    """Returns the steps whose names are taken, oldest first, whether or not a checkpoint stands there."""
    names = [path.name for path in folder.iterdir()]
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def sealed(folder: Path) -> list[int]:
    """Returns the steps of the sealed checkpoints, oldest first; their content is not looked at."""
    return [step for step in entries(folder) if (folder / str(step) / manifest.NAME).is_file()]


def drafts(folder: Path) -> list[int]:
    """Returns the steps that are being saved, or were when the run was killed."""
    found = [_DRAFT.match(path.name) for path in folder.iterdir()]
    return sorted({int(match[1]) for match in found if match})


def strangers(folder: Path) -> list[Path]:
    """Returns the checkpoints under names that are no step, as a hand may give them."""
    steps = {str(step) for step in entries(folder)}
    others = (path for path in folder.iterdir() if path.name not in steps and not _LITTER.match(path.name))
    return sorted(path for path in others if (path / manifest.NAME).exists())


def aside(folder: Path) -> list[Path]:
    """Returns what was set aside."""
    return sorted((folder / DAMAGED).iterdir()) if (folder / DAMAGED).is_dir() else []


def draft(folder: Path, step: int, turn: int) -> Path:
    """Returns where a step is saved before it is sealed.

    Every try has a place of its own: writers of one that failed may come back long after it has been given up.
    """
    return folder / f"{step}.unsealed-{turn}"


def seal(draft: Path, step: int) -> None:
    """Turns a draft into the checkpoint of a step."""
    os.rename(draft, draft.parent / str(step))
    manifest.settle(draft.parent)


def set_aside(folder: Path, step: int) -> Path:
    """Moves what stands in the place of a step to where it is kept but not looked for, and returns where that is."""
    (folder / DAMAGED).mkdir(exist_ok=True)
    places = (folder / DAMAGED / f"{step}-{n}" for n in itertools.count(1))
    place = next(place for place in places if not place.exists())
    os.rename(folder / str(step), place)
    return place


def delete_older(folder: Path, newest: int, keep: int) -> None:
    """Deletes sealed checkpoints up to the newest but for the last `keep`; the newest itself stays in any case."""
    for step in [step for step in sealed(folder) if step <= newest][:-keep]:
        doomed = folder / f"{step}.deleted"
        os.rename(folder / str(step), doomed)
        shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Deletes drafts and what was being deleted when a run was killed."""
    for path in folder.iterdir():
        if _LITTER.match(path.name):
            shutil.rmtree(path, ignore_errors=True)
