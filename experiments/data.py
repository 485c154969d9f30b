"""Text to packed batches, through grain: batch number n is a function of (text, config, n) and of nothing else.

So the position in the data is the step of training, and a run that starts again cannot lose or repeat an example.
"""

import dataclasses
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from experiments.cli import UserError
from experiments.tokenizers import Tokenizer
from mesanet_jax.loss import Batch

STANDARD_LIBRARY = "stdlib"
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it is cut.

    Attributes:
      source: "stdlib" (the source text of the Python that runs this), a .jsonl, .parquet or text file, a folder of
        them, or the name of a Hugging Face dataset.
      subset: configuration of a Hugging Face dataset.
      split: split of a Hugging Face dataset.
      text_field: column that holds the text.
      tokenizer: a tokenizer.json file; empty means bytes.
      bos_token: token that begins a document; empty looks for a usual name.
      held_out: share of documents kept from training, chosen by a hash of their names.
      length: tokens the model reads at once.
      batch_size: sequences of one optimizer step.
      seed: order of documents and windows.
    """

    source: str = STANDARD_LIBRARY
    subset: str = ""
    split: str = "train"
    text_field: str = "text"
    tokenizer: str = ""
    bos_token: str = ""
    held_out: float = 0.05
    length: int = 2048
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self):
        if self.length < 2:
            raise ValueError(f"DataConfig: length={self.length} must be at least 2.")
        if self.batch_size < 1:
            raise ValueError(f"DataConfig: batch_size={self.batch_size} must be at least 1.")
        if self.seed < 0:
            raise ValueError(f"DataConfig: seed={self.seed} is negative; use 0 or more.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"DataConfig: held_out={self.held_out} must lie between 0 and 1, say 0.05.")


class Document(NamedTuple):
    """A text as tokens, BOS first."""

    name: str
    tokens: np.ndarray  # [t] int32
    token_bytes: np.ndarray  # [t] int32, bytes of text each token stands for, 0 for BOS


def training_text(config: DataConfig, tokenizer: Tokenizer) -> "PackedWindows":
    """Reads, tokenises and packs what is trained on; it has to fit in memory.

    Raises:
      UserError: the text cannot be read, or there is none.
    """
    return _packed(config, tokenizer, _kept(config))


def held_out_text(config: DataConfig, tokenizer: Tokenizer) -> "PackedWindows":
    """The same for what is held out."""
    return _packed(config, tokenizer, _held_out(config))


def shuffled_batches(windows: "PackedWindows", config: DataConfig) -> grain.MapDataset:
    """Returns an endless dataset whose item n is the Batch of step n, windows in a new order every epoch."""
    shuffled = grain.MapDataset.source(windows).seed(config.seed).shuffle()
    if len(windows) < config.batch_size:
        shuffled = shuffled.repeat(-(-config.batch_size // len(windows)))
    return shuffled.batch(config.batch_size, drop_remainder=True, batch_fn=_stack).repeat()


def ordered_batches(windows: "PackedWindows", batch_size: int) -> grain.MapDataset:
    """Returns every window once, in order; the last Batch is filled up with padding."""

    def stack(some) -> Batch:
        nothing = Batch(np.zeros_like(some[0].tokens), np.full_like(some[0].segment_ids, -1))
        return _stack([*some, *[nothing] * (batch_size - len(some))])

    return grain.MapDataset.source(windows).batch(batch_size, batch_fn=stack)


def held_out_documents(config: DataConfig, tokenizer: Tokenizer) -> list[Document]:
    """Returns the held-out documents one by one, in the order of their names.

    Raises:
      UserError: there are none.
    """
    documents = []
    for name, text in sorted(_held_out(config)):
        ids, num_bytes = tokenizer.encode_with_bytes(text)
        documents.append(Document(name, np.append(np.int32(tokenizer.bos), ids), np.append(np.int32(0), num_bytes)))
    return documents


def is_held_out(name: str, share: float) -> bool:
    """True for the documents whose name hashes into the held-out share; independent of all other documents."""
    return zlib.crc32(name.encode("utf-8", "surrogatepass")) < share * 2**32


class PackedWindows:
    """Windows [t + 1] of documents laid end to end, each after BOS; grain reads them by index."""

    def __init__(self, documents: list[np.ndarray], length: int):
        """Lays the documents, each starting with BOS, end to end in the given order."""
        self._stream = np.concatenate(documents)
        self._starts = np.cumsum([0, *(len(d) for d in documents[:-1])])
        self._length = length

    @property
    def fingerprint(self) -> int:
        """A checksum of all tokens in their order."""
        return zlib.crc32(self._stream.tobytes())

    def __len__(self) -> int:
        """Number of windows; each has `length` targets, the last one perhaps fewer."""
        return max(1, -(-(len(self._stream) - 1) // self._length))

    def __getitem__(self, index: int) -> Batch:
        """Returns window `index` with document numbers from 0; a short last window is padded with id -1."""
        begin = index * self._length
        tokens = self._stream[begin : begin + self._length + 1]
        documents = np.searchsorted(self._starts, begin + np.arange(len(tokens)), side="right")
        padding = (0, self._length + 1 - len(tokens))
        ids = np.pad((documents - documents[0]).astype(np.int32), padding, constant_values=-1)
        return Batch(np.pad(tokens, padding), ids)


def _stack(windows) -> Batch:
    return Batch(*(np.stack(arrays) for arrays in zip(*windows, strict=True)))


def _packed(config: DataConfig, tokenizer: Tokenizer, texts: list[tuple[str, str]]) -> PackedWindows:
    order = np.random.default_rng(config.seed).permutation(len(texts))
    bos = np.int32(tokenizer.bos)
    return PackedWindows([np.append(bos, tokenizer.encode(texts[i][1])) for i in order], config.length)


def _kept(config: DataConfig) -> list[tuple[str, str]]:
    texts = [(name, text) for name, text in _texts(config) if not is_held_out(name, config.held_out)]
    if not texts:
        raise UserError(f"data.source: {config.source} leaves no text to train on with held_out={config.held_out}.")
    return sorted(texts)


def _held_out(config: DataConfig) -> list[tuple[str, str]]:
    texts = [(name, text) for name, text in _texts(config) if is_held_out(name, config.held_out)]
    if not texts:
        raise UserError(f"data.held_out: a share of {config.held_out} leaves no held-out text of {config.source}.")
    return sorted(texts)


def _texts(config: DataConfig) -> Iterator[tuple[str, str]]:
    """Yields (name, text) of every document that is not empty."""
    if config.source == STANDARD_LIBRARY:
        found = _standard_library()
    elif Path(config.source).exists():
        found = _local(Path(config.source), config.text_field)
    else:
        found = _hugging_face(config)
    return ((name, text) for name, text in found if text.strip())


def _standard_library() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED_FOLDERS & set(relative.parts):
            yield relative.as_posix(), path.read_text(encoding="utf-8", errors="replace")


def _local(path: Path, text_field: str) -> Iterator[tuple[str, str]]:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        if file.suffix not in FILE_FORMATS:
            yield name, _read(file)
            continue
        rows = _load(str(file), FILE_FORMATS[file.suffix], data_files=str(file), split="train")
        yield from _rows(rows, text_field, str(file), name)


def _hugging_face(config: DataConfig) -> Iterator[tuple[str, str]]:
    rows = _load(config.source, config.source, name=config.subset or None, split=config.split)
    return _rows(rows, config.text_field, config.source, config.split)


def _rows(rows, text_field: str, source: str, name: str) -> Iterator[tuple[str, str]]:
    if text_field not in rows.column_names:
        raise UserError(f"data.text_field: {source} has no column {text_field!r}; it has {sorted(rows.column_names)}.")
    for number, row in enumerate(rows):
        text = row[text_field] or ""
        if not isinstance(text, str):
            raise UserError(f"data.text_field: {text_field!r} of {source} holds {type(text).__name__}, not text.")
        yield f"{name}:{number}", text


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.source: {file} cannot be read as UTF-8 text ({error}).") from None


def _load(source: str, *args, **kwargs):
    """Loads with `datasets`, which is imported here because it takes seconds and bytes do not need it."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*args, **kwargs)
    except Exception as error:  # hub, file and format errors have no common type
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"data.source: {source} is no readable file or folder and no dataset that the Hub gives ({reason})."
        ) from None
