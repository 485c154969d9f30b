"""Ways that checkpoints go bad on a disk or under a hand, each drawn at random and told in a few words.

A corruption takes a source of randomness and a folder of at least two checkpoints, spoils the newest of them in place
and returns what it did. Files are drawn by bytes or by name with equal chance, so that arrays and manifests both get
their share.
"""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

Corruption = Callable[[random.Random, Path], str]


def corrupt(rng: random.Random, folder: Path) -> str:
    """Applies a corruption of CORRUPTIONS drawn at random."""
    return rng.choice(list(CORRUPTIONS.values()))(rng, folder)


def flip_bit(rng: random.Random, folder: Path) -> str:
    """One bit of one file."""
    return _flip(rng, _file(rng, _newest(folder)), folder)


def flip_bit_of_manifest(rng: random.Random, folder: Path) -> str:
    """One bit of the file that vouches for the others."""
    return _flip(rng, _newest(folder) / "manifest.json", folder)


def zero_stretch(rng: random.Random, folder: Path) -> str:
    """A stretch of zeros, as a block that never reached the disk leaves."""
    file = _file(rng, _newest(folder))
    content = bytearray(file.read_bytes())
    begin = rng.randrange(len(content))
    end = rng.randint(begin + 1, len(content))
    content[begin:end] = bytes(end - begin)
    file.write_bytes(content)
    return f"zeroed bytes {begin} to {end} of {_told(file, folder)}"


def truncate(rng: random.Random, folder: Path) -> str:
    """The end of a file is missing, or all of it."""
    file = _file(rng, _newest(folder))
    size = rng.randrange(file.stat().st_size)
    with file.open("r+b") as stream:
        stream.truncate(size)
    return f"cut {_told(file, folder)} to {size} bytes"


def append(rng: random.Random, folder: Path) -> str:
    """A file has grown."""
    file = _file(rng, _newest(folder))
    with file.open("ab") as stream:
        stream.write(rng.randbytes(rng.randint(1, 64)))
    return f"added bytes to {_told(file, folder)}"


def delete(rng: random.Random, folder: Path) -> str:
    """A file is gone."""
    file = _file(rng, _newest(folder))
    file.unlink()
    return f"deleted {_told(file, folder)}"


def delete_manifest(rng: random.Random, folder: Path) -> str:
    """The file that vouches for the others is gone."""
    file = _newest(folder) / "manifest.json"
    file.unlink()
    return f"deleted {_told(file, folder)}"


def swap(rng: random.Random, folder: Path) -> str:
    """Two files have each other's content."""
    one, other = rng.sample(_files(_newest(folder)), 2)
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)
    return f"swapped {_told(one, folder)} and {_told(other, folder)}"


def take_older(rng: random.Random, folder: Path) -> str:
    """A file of another step stands in place of a file, under the same name if there is one."""
    file, older = _file(rng, _newest(folder)), _steps(folder)[-2]
    twin = older / file.relative_to(_newest(folder))
    source = twin if twin.is_file() else _file(rng, older)
    shutil.copyfile(source, file)
    return f"put {_told(source, folder)} in place of {_told(file, folder)}"


def take_older_manifest(rng: random.Random, folder: Path) -> str:
    """The manifest is the one of another step."""
    older, newest = _steps(folder)[-2:]
    shutil.copyfile(older / "manifest.json", newest / "manifest.json")
    return f"put the manifest of {older.name} in {newest.name}"


def add(rng: random.Random, folder: Path) -> str:
    """A file that was not saved."""
    file = rng.choice(_files(_newest(folder))).parent / f"{rng.getrandbits(64):x}"
    file.write_bytes(rng.randbytes(16))
    return f"added {_told(file, folder)}"


def swap_folders(rng: random.Random, folder: Path) -> str:
    """The two newest checkpoints have each other's names."""
    older, newest = _steps(folder)[-2:]
    between = folder / "between"
    newest.rename(between)
    older.rename(newest)
    between.rename(older)
    return f"swapped {older.name} and {newest.name}"


def rename_folder(rng: random.Random, folder: Path) -> str:
    """An older checkpoint under the name of a step that is yet to come."""
    older, newest = _steps(folder)[-2:]
    later = folder / str(int(newest.name) + rng.randint(1, 1000))
    older.rename(later)
    return f"renamed {older.name} to {later.name}"


def hide_folder(rng: random.Random, folder: Path) -> str:
    """The newest checkpoint under a name that is no step."""
    newest = _newest(folder)
    hidden = folder / f"{newest.name}.bak"
    newest.rename(hidden)
    return f"renamed {newest.name} to {hidden.name}"


def empty_folder(rng: random.Random, folder: Path) -> str:
    """Nothing is left but the folder."""
    newest = _newest(folder)
    shutil.rmtree(newest)
    newest.mkdir()
    return f"emptied {newest.name}"


def file_for_folder(rng: random.Random, folder: Path) -> str:
    """A file stands where the checkpoint was."""
    newest = _newest(folder)
    shutil.rmtree(newest)
    newest.write_bytes(rng.randbytes(16))
    return f"put a file in place of {newest.name}"


def folder_for_file(rng: random.Random, folder: Path) -> str:
    """A folder stands where a file was."""
    file = _file(rng, _newest(folder))
    file.unlink()
    file.mkdir()
    return f"put a folder in place of {_told(file, folder)}"


def link_to_nowhere(rng: random.Random, folder: Path) -> str:
    """A link whose target is gone stands where a file was."""
    file = _file(rng, _newest(folder))
    file.unlink()
    file.symlink_to("nowhere")
    return f"put a broken link in place of {_told(file, folder)}"


CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function
    for function in (
        *(flip_bit, flip_bit_of_manifest, zero_stretch, truncate, append, delete, delete_manifest, swap),
        *(take_older, take_older_manifest, add, swap_folders, rename_folder, hide_folder, empty_folder),
        *(file_for_folder, folder_for_file, link_to_nowhere),
    )
}


def _flip(rng: random.Random, file: Path, folder: Path) -> str:
    content = bytearray(file.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    return f"flipped bit {bit} of {_told(file, folder)}"


def _steps(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))


def _newest(folder: Path) -> Path:
    return _steps(folder)[-1]


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)


def _file(rng: random.Random, checkpoint: Path) -> Path:
    files = _files(checkpoint)
    sizes = [file.stat().st_size for file in files]
    return rng.choices(files, sizes if rng.random() < 0.5 else None)[0]


def _told(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()
