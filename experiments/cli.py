"""Commands: a frozen dataclass in, one sentence out when something is wrong."""

import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import tyro

Config = TypeVar("Config")


class UserError(Exception):
    """A mistake the user can mend; the message is one sentence that names the field and the remedy."""

    status = 2  # that the command ends with


def run(function: Callable[[Config], object], config: type[Config], args: Sequence[str] | None = None) -> None:
    """Parses the command line into `config` and calls `function`."""
    _guarded(lambda: function(tyro.cli(config, prog=program(), description=_description(function), args=args)))


def run_preset(
    function: Callable[[Config], object],
    presets: Mapping[str, tuple[str, Config]],
    default: str,
    args: Sequence[str] | None = None,
) -> None:
    """The same, where the first word names a preset (by default `default`) and options override its fields."""
    args = list(sys.argv[1:] if args is None else args)
    args = args[1:] if args[:1] == ["--preset"] else args  # for those who like to say so
    if args[:1] not in (["-h"], ["--help"]) and (not args or args[0].startswith("-")):
        args = [default, *args]
    parse = tyro.extras.overridable_config_cli
    _guarded(lambda: function(parse(presets, prog=program(), description=_description(function), args=args)))


def start_anew(output: Path) -> None:
    """Makes an empty folder for a demo; removes an earlier demo from it, and nothing that is not one.

    Raises:
      UserError: the folder holds something else, or cannot be written.
    """
    mark = output / "made-by-demo"
    if output.is_dir() and any(output.iterdir()):
        if not mark.exists():
            raise UserError(f"output: {output} is not empty and holds no earlier demo; give a new folder.")
        shutil.rmtree(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise unwritable("output", output, error, "folder") from None


def check_page(field: str, page: Path, mark: str) -> None:
    """Refuses to replace what is no earlier page of a command; asked before any work is done.

    Args:
      field: that names the page.
      page: where it is to be written.
      mark: words that every page of the command holds, and nothing else.

    Raises:
      UserError: something else is there.
    """
    try:
        ours = not page.exists() or is_page(page, mark)
    except OSError as error:
        raise unwritable(field, page, error) from None
    if not ours:
        raise UserError(f"{field}: {page} is no page of this command; give a new file.")


def is_page(page: Path, mark: str) -> bool:
    """Returns whether a file holds the mark."""
    return mark in page.read_text(encoding="utf-8", errors="replace")


def unwritable(field: str, path: Path, error: OSError, kind: str = "file") -> UserError:
    """Says that the path of a field cannot be written."""
    return UserError(f"{field}: {path} cannot be written ({error.strerror}); give another {kind}.")


def _guarded(call: Callable[[], object]) -> None:
    """Turns mistakes into a sentence and an exit status, mostly 2; everything else keeps its traceback."""
    try:
        try:
            call()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # nobody reads any more, as behind `| head`; the interpreter would complain when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except UserError as error:
        complaint, status = str(error), error.status
    except OSError as error:  # what no field is to blame for: permissions, a disk that fills up at an odd moment
        complaint = f"{error.filename or 'a file'}: {error.strerror or error}; nothing saved before was touched."
        status = UserError.status
    except KeyboardInterrupt:
        complaint, status = "interrupted; nothing saved before was touched, the same command goes on.", 130
    else:
        return
    print(f"error: {complaint}", file=sys.stderr)
    sys.exit(status)


def program() -> str:
    """Returns what the user typed: python -m and the module."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


def _description(function: Callable) -> str:
    """The experiment's page: the docstring of the module that defines its main function.

    Its fields and commands become paragraphs, or else they would be run together.
    """
    return re.sub(r"(?<!\n)\n(?=[A-Z][a-z]+: |python -m )", "\n\n", sys.modules[function.__module__].__doc__ or "")
