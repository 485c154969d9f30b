"""The texts that several runs are measured on, the same for each, and a folder that changes only as a whole."""

import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from experiments import cli
from experiments.cli import UserError
from experiments.curves.scores import Watch
from experiments.data import Document, held_out_documents
from experiments.runs import Run, open_run
from mesanet_jax import MesaNetConfig

DRAFT = ".draft-"  # what a page is called until it is whole; one that was killed leaves it behind


class Material(NamedTuple):
    """The same texts for every run, each in the run's own tokens."""

    documents: dict[str, list[Document]]
    length: int
    same_tokens: bool
    notes: list[str]  # what is scored, what is not and why


class Progress:
    """A bar on a terminal; elsewhere a line every quarter of a minute."""

    def __init__(self):
        """Counts from now."""
        self._told = time.monotonic()

    def watch(self, label: str) -> Watch:
        """Returns what to wrap batches in while the thing of that name is worked on."""

        def batches_with_progress(batches: Sequence) -> Iterator:
            if sys.stderr.isatty():
                yield from tqdm(batches, desc=label, unit="batch", leave=False, dynamic_ncols=True)
                return
            for i, batch in enumerate(batches, start=1):
                yield batch
                if time.monotonic() - self._told > 15:
                    self._told = time.monotonic()
                    print(f"{label}: {i} of {len(batches)} batches", flush=True)

        return batches_with_progress


def open_runs(paths: Sequence[Path]) -> dict[str, Run]:
    """Opens runs under names of their own: the folder's, or the path where two folders share it.

    Raises:
      UserError: a folder is not a run, or is named twice.
    """
    runs = [open_run(path) for path in paths]
    names = [run.name if sum(run.name == r.name for r in runs) == 1 else str(run.path) for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"runs: {names[0]} is named twice; name different folders.")
    return dict(zip(names, runs, strict=True))


def gather(runs: dict[str, Run], *, length: int, num_documents: int, any_tokens: bool, seed: int) -> Material:
    """Draws held-out documents of the first run and decides how far they are read, before anything is scored.

    Args:
      runs: by name.
      length: tokens read of each; 0 means twice the longest trained length, or the longest document if that is less.
      num_documents: how many; 0 takes all.
      any_tokens: whether the runs may have different tokenizers.
      seed: of the draw.

    Raises:
      UserError: the tokenizers differ and may not, or no document is as long as that.
    """
    (name, first), *_ = runs.items()
    every = {name: held_out_documents(first.config.data, run.tokenizer) for name, run in runs.items()}
    available = len(every[name])
    drawn = sorted(np.random.default_rng(seed).permutation(available)[: num_documents or available].tolist())
    documents = {name: [found[i] for i in drawn] for name, found in every.items()}
    same = _same_tokens(list(documents.values()))
    if not same and not any_tokens:
        raise UserError("runs: they use different tokenizers; add --bits-per-byte to compare them.")
    predictions = np.array([len(document.tokens) - 1 for document in documents[name]])
    if predictions.max() < max(length, 1):
        raise UserError(
            f"length: {length} is more than the {predictions.max()} tokens of the longest document; ask for less."
        )
    length = length or min(int(predictions.max()), 2 * max(run.config.data.length for run in runs.values()))
    scored = np.minimum(predictions, length).sum()
    notes = [
        f"Scored: {scored:,} tokens of {len(drawn):,} held-out documents of {' + '.join(first.config.data.source)}, "
        f"tokens as {name} counts them. Not scored: {available - len(drawn):,} held-out documents that were not drawn "
        f"(num_documents, seed), and {predictions.sum() - scored:,} tokens that lie beyond position {length:,}."
    ]
    others = [name for name, run in runs.items() if _origin(run) != _origin(first)]
    if others:
        notes.append(f"Beware: {', '.join(others)} was trained on other data, perhaps on these very documents.")
    return Material(documents, length, same, notes)


def stretched(run: Run, length: int) -> MesaNetConfig:
    """Returns the run's model, with room for attention to look back over the whole length."""
    model = run.config.model
    return dataclasses.replace(model, max_context=max(model.max_context, length))


def check_output(output: Path, mark: str) -> None:
    """Refuses a folder with something in it and no earlier page among that; asked before any work is done.

    Args:
      output: folder that a page and its files are to be written into.
      mark: words that every page of the command holds, and nothing else.

    Raises:
      UserError: it holds something else, or cannot be read.
    """
    try:
        held = {path.name for path in output.iterdir() if not path.name.startswith(DRAFT)} if output.exists() else ()
        ours = not held or ("report.html" in held and cli.is_page(output / "report.html", mark))
    except OSError as error:
        raise cli.unwritable("output", output, error, "folder") from None
    if not ours:
        raise UserError(f"output: {output} is not empty and holds no earlier page of this command; give a new folder.")


@contextlib.contextmanager
def drafted(output: Path) -> Iterator[Path]:
    """Makes an empty folder whose files replace those of the output when the block ends well; else nothing changes.

    Raises:
      UserError: the output cannot be written, or has no room.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        draft = tempfile.TemporaryDirectory(dir=output, prefix=DRAFT)
    except OSError as error:
        raise cli.unwritable("output", output, error, "folder") from None
    with draft as folder:
        yield Path(folder)
        for path in sorted(Path(folder).iterdir()):
            os.replace(path, output / path.name)


@contextlib.contextmanager
def room_in(output: Path) -> Iterator[None]:
    """Says whose disk it was where a page cannot be written to the end.

    Raises:
      UserError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"output: {output} has no room ({error.strerror}); what it held is untouched.") from None


def _same_tokens(documents: Sequence[list[Document]]) -> bool:
    first, *others = documents
    return all(np.array_equal(a.tokens, b.tokens) for other in others for a, b in zip(first, other, strict=True))


def _origin(run: Run) -> tuple:
    data = run.config.data
    return data.source, data.subset, data.split, data.held_out
