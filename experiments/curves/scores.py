"""Next-token log-likelihood by position: score documents with any model, keep one row per predicted token.

Position p is the prediction of token p + 1 after reading tokens 0..p of its document; token 0 is BOS, so position 0 is
the prediction after BOS alone, BOS itself is never predicted, and a document of t tokens has t - 1 predictions.
Documents are never packed together: each stands alone, from its start, in rows of one fixed shape.

    scores = score(logits_fn, documents, length=2048)
    save(scores, "scores.npz")
    merge(load("host0.npz"), load("host1.npz"))        # the same as one host that scored everything

What is made of the rows lives beside this file: `bands` (buckets, bands, differences), `findings` (sentences),
`figures` and `page`.
"""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.data import Document

LogitsFn = Callable[[Int[Array, "b t"]], Float[Array, "b t y"]]
Watch = Callable[[Sequence], Iterable]  # wraps the batches, as tqdm does


class Scores(NamedTuple):
    """One row per predicted token, in the order of document name, then position."""

    names: np.ndarray  # [documents] str, sorted
    document: np.ndarray  # [r] int32, place in names
    position: np.ndarray  # [r] int32, tokens read before the prediction, less one
    target: np.ndarray  # [r] int32, the token that came
    num_bytes: np.ndarray  # [r] int32, bytes of text the target stands for
    bytes_before: np.ndarray  # [r] int64, bytes of the document before the target
    nll: np.ndarray  # [r] float64, minus its log-likelihood in nats


class Window(NamedTuple):
    """A stretch of one document that the model reads at once; its tail from `first` on is scored."""

    document: int
    tokens: np.ndarray  # [width]
    targets: np.ndarray  # [width]
    start: int  # position in the document of tokens[0]
    first: int  # place in the window


COLUMNS = {"position": np.int32, "target": np.int32, "num_bytes": np.int32, "bytes_before": np.int64, "nll": np.float64}


def score(
    logits_fn: LogitsFn,
    documents: Sequence[Document],
    *,
    length: int,
    batch_size: int = 8,
    context: int | None = None,
    stride: int | None = None,
    watch: Watch = iter,
) -> Scores:
    """Returns minus the log-likelihood of every token of the documents' first `length` positions.

    The log-softmax is float32 or better whatever the dtype of the logits.

    Args:
      logits_fn: any causal model, tokens [b, t] int32 to logits [b, t, y]; always called with [batch_size, width], the
        rows shorter than that filled up with token 0 at their end.
      documents: tokens with BOS first.
      length: the longest context read; longer documents are scored up to there.
      batch_size: windows per call of the model.
      context: None reads each document from its start in one window. A number w scores each token with only the last w
        tokens of it in view, BOS in place of the oldest: what the text still rewards when the past is cut off.
      stride: with `context`, how many tokens share a window, so a token sees between w - stride + 1 and w tokens;
        1 is exact and dear, None means w // 4. One token costs w / stride tokens of compute.
      watch: what to wrap the sequence of batches in, e.g. tqdm.

    Raises:
      ValueError: no document has two tokens, two share a name, a token lies outside the model's vocabulary, or a
        log-likelihood is not a number; the message names it.
    """
    _check_documents(documents, length)
    if context is None:
        width, windows = length, [whole_window(i, d.tokens, length) for i, d in enumerate(documents)]
    else:
        width, stride = context, _check_ruler(context, stride)
        windows = [w for i, d in enumerate(documents) for w in truncated_windows(i, d.tokens, length, context, stride)]
    windows = [window for window in windows if len(window.targets)]
    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    rows = [
        _rows(w, documents[w.document], losses) for w, losses in _losses(logits_fn, watch(batches), batch_size, width)
    ]
    return _assemble([d.name for d in documents], [np.concatenate(column) for column in zip(*rows, strict=True)])


def whole_window(document: int, tokens: np.ndarray, length: int) -> Window:
    """The document from its start: tokens 0..length-1 are read, each predicts the next; the last of all has none."""
    return Window(document, tokens[:-1][:length], tokens[1:][:length], 0, 0)


def truncated_windows(document: int, tokens: np.ndarray, length: int, context: int, stride: int) -> Iterator[Window]:
    """Overlapping windows that score each position once, BOS standing in for the first token of each."""
    num_positions = min(length, len(tokens) - 1)
    yield whole_window(document, tokens, min(context, length))
    for scored in range(context, num_positions, stride):
        stop = min(scored + stride, num_positions)
        start = scored + stride - context
        inputs = np.concatenate([tokens[:1], tokens[start + 1 : stop]])
        yield Window(document, inputs, tokens[start + 1 : stop + 1], start, scored - start)


@jax.jit
def token_nll(logits: Float[Array, "b t y"], targets: Int[Array, "b t"]) -> Float[Array, "b t"]:
    """Minus the log-softmax at the targets, in float32 or the wider dtype of the logits."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def merge(*parts: Scores) -> Scores:
    """One table of several, e.g. of several hosts; refuses a token that was scored twice."""
    names = np.concatenate([part.names for part in parts])
    shifts = np.cumsum([0, *(len(part.names) for part in parts[:-1])])
    document = np.concatenate([part.document + shift for part, shift in zip(parts, shifts, strict=True)])
    columns = [np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS]
    return _assemble(names, [document, *columns])


def save(scores: Scores, path: Path | str) -> None:
    """Writes the rows, losslessly: .csv for people and other tools, .npz for speed."""
    if Path(path).suffix == ".npz":
        np.savez_compressed(path, **scores._asdict())
        return
    if Path(path).suffix != ".csv":
        raise ValueError(f"save writes .csv and .npz, but the path is {path}")
    columns = [getattr(scores, name).tolist() for name in COLUMNS]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["document", *COLUMNS])
        writer.writerows(zip(scores.names[scores.document].tolist(), *columns, strict=True))


def load(path: Path | str) -> Scores:
    """Reads what `save` wrote."""
    if Path(path).suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return Scores(**{name: arrays[name] for name in Scores._fields})
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    if header != ["document", *COLUMNS]:
        raise ValueError(f"{path} does not hold scores: its columns are {header}, not {['document', *COLUMNS]}")
    names, *columns = zip(*rows, strict=True)
    names, document = np.unique(names, return_inverse=True)
    typed = [np.asarray(c).astype(dtype) for c, dtype in zip(columns, COLUMNS.values(), strict=True)]
    return _assemble(names, [document, *typed])


def _losses(logits_fn, batches, batch_size, width) -> Iterator[tuple[Window, np.ndarray]]:
    """Runs the model on full batches of one shape; what pads them is dropped unseen."""
    for windows in batches:
        tokens, targets = np.zeros((2, batch_size, width), np.int32)
        for row, window in enumerate(windows):
            tokens[row, : len(window.tokens)] = window.tokens
            targets[row, : len(window.targets)] = window.targets
        logits = logits_fn(jnp.asarray(tokens))
        _check_logits(logits, tokens, targets)
        losses = np.asarray(token_nll(jnp.asarray(logits), targets), np.float64)
        for row, window in enumerate(windows):
            yield window, losses[row, window.first : len(window.targets)]


def _rows(window: Window, document: Document, nll: np.ndarray) -> tuple[np.ndarray, ...]:
    """The columns of Scores after `names`, for the scored places of one window."""
    position = np.arange(window.start + window.first, window.start + len(window.targets))
    if np.isnan(nll).any():
        where = position[np.isnan(nll)][0]
        raise ValueError(
            f"the model's log-likelihood of document {document.name!r} at position {where} is not a number"
        )
    num_bytes = np.asarray(document.token_bytes, np.int64)
    bytes_before = np.cumsum(num_bytes) - num_bytes
    targets = position + 1
    numbers = np.full(len(nll), window.document)
    return numbers, position, document.tokens[targets], num_bytes[targets], bytes_before[targets], nll


def _assemble(names, columns) -> Scores:
    """Sorts the documents by name and the rows by document and position, so that no order of work shows."""
    document, *columns = columns
    used, document = np.unique(document, return_inverse=True)
    sorted_names, places = np.unique(np.asarray(names, dtype=str)[used], return_inverse=True)
    document = places[document]
    order = np.lexsort((columns[0], document))
    document, columns = document[order], [column[order] for column in columns]
    twice = (np.diff(document) == 0) & (np.diff(columns[0]) == 0)
    if twice.any():
        row = np.argmax(twice)
        raise ValueError(f"position {columns[0][row]} of document {str(sorted_names[document[row]])!r} is scored twice")
    typed = [column.astype(dtype) for column, dtype in zip(columns, COLUMNS.values(), strict=True)]
    return Scores(sorted_names, document.astype(np.int32), *typed)


def _check_documents(documents: Sequence[Document], length: int) -> None:
    if length < 1:
        raise ValueError(f"length must be at least 1, but is {length}")
    if not any(len(document.tokens) > 1 for document in documents):
        raise ValueError("documents holds nothing to predict: give at least one with a token after BOS")
    names, counts = np.unique([document.name for document in documents], return_counts=True)
    if counts.max() > 1:
        raise ValueError(f"documents must have names of their own, but {str(names[counts.argmax()])!r} occurs twice")
    for name, tokens, token_bytes in documents:
        if np.shape(tokens) != np.shape(token_bytes):
            raise ValueError(f"document {name!r} has {np.shape(tokens)} tokens but {np.shape(token_bytes)} token_bytes")


def _check_ruler(context: int, stride: int | None) -> int:
    """Returns the stride."""
    stride = max(1, context // 4) if stride is None else stride
    if context < 2:
        raise ValueError(f"context must be at least 2, BOS and one token, but is {context}")
    if not 1 <= stride < context:
        raise ValueError(f"stride must lie between 1 and context - 1 = {context - 1}, but is {stride}")
    return stride


def _check_logits(logits, tokens, targets) -> None:
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(f"logits_fn must return [b, t, y] for tokens {tokens.shape}, but returned {logits.shape}")
    largest = max(tokens.max(), targets.max())
    if largest >= logits.shape[-1]:
        raise ValueError(
            f"the documents hold token {largest} but the model's vocabulary has {logits.shape[-1]}; "
            "tokenize them with the tokenizer of the model"
        )
