"""Building shards, once: documents stream in, are tokenised on all cores, and leave as files that are never changed."""

import dataclasses
import itertools
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments.cli import UserError
from experiments.data.config import Origin, check_share
from experiments.data.draft import Draft, Mark, Part, add_pair, claimed, find_draft, find_finished, finish, save_draft
from experiments.data.encoding import Document, ahead, batches, document_of, encode_all, is_held_out
from experiments.data.shards import TOKENIZER, Index, Settings, Shard, signature
from experiments.data.texts import Text, read_texts
from experiments.tokenizers import Tokenizer, load_tokenizer

QUIET = 15  # seconds between lines where there is no terminal
NO_BYTES = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Tokenise text once, into a folder of shards that training maps into memory.

    Killed and started again, it goes on after the last finished shard, and the files are the same to the byte.

    Attributes:
      source: a .jsonl, .parquet or text file, a folder of them, the name of a Hugging Face dataset, or "stdlib" (the
        source text of the Python that runs this). It is streamed, neither downloaded whole nor held in memory.
      output: folder of the shards; if a build in it was interrupted, it goes on.
      tokenizer: a tokenizer.json file; empty means bytes.
      bos_token: token that begins a document; empty looks for a usual name.
      subset: configuration of a Hugging Face dataset.
      split: split of a Hugging Face dataset.
      text_field: column that holds the text.
      held_out: share of documents kept from training, chosen by a hash of their names.
      shard_tokens: tokens of one file to train on; a file is held in memory until it is whole.
    """

    source: str
    output: Path
    tokenizer: str = ""
    bos_token: str = ""
    subset: str = ""
    split: str = "train"
    text_field: str = "text"
    held_out: float = 0.05
    shard_tokens: int = 100_000_000

    def __post_init__(self):
        check_share("BuildConfig", self.held_out)
        if self.shard_tokens < 1:
            raise ValueError(f"BuildConfig: shard_tokens={self.shard_tokens} must be at least 1, say 100000000.")


def build(config: BuildConfig) -> Index:
    """Builds the shards, or what is still missing of them; returns their index.

    Raises:
      UserError: source, tokenizer or folder do not fit, the disk is full, or the network stays away; shards that are
        finished stay.
    """
    tokenizer = load_tokenizer(config.tokenizer, config.bos_token)
    settings = _settings(config, tokenizer)
    if (index := find_finished(config.output, settings)) is not None:
        print(f"{config.output} is finished; there is nothing left to do")
        return index
    draft = find_draft(config.output, settings)
    texts = _texts_after(draft.mark, config)
    with claimed(config.output):
        if find_finished(config.output, settings) is not None or find_draft(config.output, settings) != draft:
            raise UserError(f"output: another build has just been at work in {config.output}; start this one again.")
        save_draft(config.output, draft)
        _keep_tokenizer(config)
        for part in _parts(texts, tokenizer, config, _Progress(draft)):
            draft = add_pair(config.output, draft, part)
        finish(config.output, draft.index)
    return draft.index


def describe(config: BuildConfig, index: Index, seconds: float) -> str:
    """Returns what was built as a table, and the command that trains on it."""
    size = sum(shard.size for shard in (*index.train, *index.held_out)) / 1e9
    return f"""{"":<12}{"files":>10}{"documents":>16}{"tokens":>20}
{_row("train", index.train)}
{_row("held out", index.held_out)}

{config.output}: {size:,.2f} GB in {seconds:,.0f} s; to train on it:
{_command(config, index)}"""


def _row(name: str, shards: Sequence[Shard]) -> str:
    documents, tokens = sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards)
    return f"{name:<12}{len(shards):>10,}{documents:>16,}{tokens:>20,}"


def _command(config: BuildConfig, index: Index) -> str:
    words = ["python -m experiments.mesanet.pretrain 145m", f"--data.source {shlex.quote(str(config.output))}"]
    if config.tokenizer:
        words.append(f"--data.tokenizer {shlex.quote(str(config.output / TOKENIZER))}")
    if config.bos_token:
        words.append(f"--data.bos-token {shlex.quote(config.bos_token)}")
    vocab_size = -(-index.settings.vocab_size // 128) * 128  # devices share a round number more easily
    return " ".join([*words, f"--data.held-out {config.held_out}", f"--model.vocab-size {vocab_size}"])


def _settings(config: BuildConfig, tokenizer: Tokenizer) -> Settings:
    return Settings(
        source=config.source,
        subset=config.subset,
        split=config.split,
        text_field=config.text_field,
        held_out=config.held_out,
        shard_tokens=config.shard_tokens,
        tokenizer=signature(tokenizer),
        vocab_size=tokenizer.vocab_size,
        bos=tokenizer.bos,
    )


def _texts_after(mark: Mark | None, config: BuildConfig) -> Iterator[Text]:
    """Returns the texts that follow a mark; reads the first one, so that a wrong source is noticed at once.

    Raises:
      UserError: there is none, or what stands at the mark is another text than it was.
    """
    origin = Origin(config.source, config.subset, config.split, config.text_field)
    texts = read_texts(origin, mark.place) if mark else read_texts(origin)
    first = next(texts, None)
    if mark is None:
        if first is None:
            raise UserError(f"source: {config.source} holds no text; name another.")
        return itertools.chain([first], texts)
    if first is None or Mark.of(first) != mark:
        raise UserError(
            f"source: {config.source} has changed since the shards in {config.output} were begun; give a new --output."
        )
    return texts


def _keep_tokenizer(config: BuildConfig) -> None:
    """Copies the tokenizer beside the shards, so that they stay of use wherever they are moved."""
    if config.tokenizer and Path(config.tokenizer).resolve() != (config.output / TOKENIZER).resolve():
        draft = config.output / f"{TOKENIZER}.draft"
        draft.write_bytes(Path(config.tokenizer).read_bytes())
        os.replace(draft, config.output / TOKENIZER)


def _parts(texts: Iterable[Text], tokenizer: Tokenizer, config: BuildConfig, progress: "_Progress") -> Iterator[Part]:
    """Yields a part whenever it has enough tokens; where it ends depends on the documents alone."""
    part = Part(tokenizer.vocab_size)
    with progress:
        for text, document, held_out in _documents(texts, tokenizer, config.held_out):
            part.add(text, document, held_out)
            progress.count(len(document.tokens))
            if part.num_tokens >= config.shard_tokens:
                yield part
                part = Part(tokenizer.vocab_size)
        if part.last:
            yield part


def _documents(texts: Iterable[Text], tokenizer: Tokenizer, share: float) -> Iterator[tuple[Text, Document, bool]]:
    """Yields (text, document, held out?) in order; what bytes a token stands for is known of those held out."""
    for batch in ahead(batches(texts)):
        kept = iter(encode_all([text.text for text in batch if not is_held_out(text.name, share)], tokenizer))
        for text in batch:
            if is_held_out(text.name, share):
                yield text, document_of(text.name, text.text, tokenizer), True
            else:
                yield text, Document(text.name, next(kept), NO_BYTES), False


class _Progress:
    """A bar on a terminal, otherwise a line now and then."""

    def __init__(self, draft: Draft):
        """Starts at what is finished already."""
        shards = (*draft.index.train, *draft.index.held_out)
        self._documents, self._tokens = sum(s.documents for s in shards), sum(s.tokens for s in shards)
        self._first, self._begin = self._tokens, time.monotonic()
        self._told = self._begin
        bar = {"initial": self._tokens, "unit": " tokens", "unit_scale": True, "dynamic_ncols": True}
        self._bar = tqdm(**bar, disable=not sys.stderr.isatty())
        if shards:
            self._bar.write(f"goes on after {self._documents:,} documents in {len(shards)} files")

    def count(self, tokens: int) -> None:
        """Takes in one more document."""
        self._documents += 1
        self._tokens += tokens
        self._bar.set_postfix_str(f"{self._documents:,} documents", refresh=False)
        self._bar.update(tokens)
        if self._bar.disable and time.monotonic() - self._told > QUIET:
            self._told = time.monotonic()
            rate = (self._tokens - self._first) / (self._told - self._begin)
            print(f"{self._documents:,} documents, {self._tokens:,} tokens, {rate:,.0f} tokens/s", flush=True)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error) -> None:
        """Leaves the bar as it is."""
        self._bar.close()
