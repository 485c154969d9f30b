"""Text to ids and back: raw bytes by default, or any file of the `tokenizers` library."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers

from experiments.cli import UserError

BOS_NAMES = ("<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "[CLS]")


class Tokenizer(Protocol):
    """What data and sampling need."""

    vocab_size: int
    bos: int

    def encode(self, text: str) -> np.ndarray:
        """Returns ids [t] int32 without BOS."""
        ...

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the same of each text, on all cores if it can."""
        ...

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids [t] and the number of UTF-8 bytes [t] that each stands for; these add up to the text's."""
        ...

    def decode(self, ids) -> str:
        """Returns the text of ids, BOS left out."""
        ...


class ByteTokenizer:
    """UTF-8 bytes are ids 0 to 255; BOS is 256."""

    vocab_size = 257
    bos = 256

    def encode(self, text: str) -> np.ndarray:
        """Returns ids [t] int32 without BOS."""
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int32)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids [t] and ones [t]."""
        ids = self.encode(text)
        return ids, np.ones_like(ids)

    def decode(self, ids) -> str:
        """Returns the text of ids; what is not UTF-8 becomes the replacement character, ids from BOS up nothing."""
        return bytes(int(i) for i in ids if i < self.bos).decode("utf-8", "replace")


class FileTokenizer:
    """A `tokenizer.json` file."""

    def __init__(self, path: Path, bos_token: str = ""):
        """Loads the file and finds the BOS token, by name or among BOS_NAMES.

        Raises:
          UserError: the file is not a tokenizer, or BOS is not in it.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"data.tokenizer: {path} is not a tokenizer.json file ({error}).") from None
        self._tokenizer.encode_special_tokens = True  # a "<s>" in the text is text, and begins no document
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1  # ids may have gaps
        names = (bos_token,) if bos_token else BOS_NAMES
        ids = [i for name in names if (i := self._tokenizer.token_to_id(name)) is not None]
        if not ids:
            raise UserError(f"data.bos_token: {path} has none of {names}; name the token that begins a document.")
        self.bos = ids[0]

    def encode(self, text: str) -> np.ndarray:
        """Returns ids [t] int32 without BOS."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids [t] and bytes [t]: a token stands for the text from the end of the one before to its own."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ends = np.maximum.accumulate([end for _, end in encoding.offsets] or [0])[: len(encoding.ids)]
        if len(ends):
            ends[-1] = len(text)
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        size = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)  # bytes of each character in UTF-8
        total = np.concatenate([[0], np.cumsum(size)])
        return np.asarray(encoding.ids, np.int32), np.diff(total[ends], prepend=0).astype(np.int32)

    def decode(self, ids) -> str:
        """Returns the text of ids, special tokens left out."""
        return self._tokenizer.decode([int(i) for i in ids])


def load_tokenizer(path: str, bos_token: str = "") -> Tokenizer:
    """Returns the tokenizer of a file, or bytes where the path is empty."""
    if not path:
        return ByteTokenizer()
    if not Path(path).is_file():
        raise UserError(f"data.tokenizer: {path} is not a file; give a tokenizer.json or leave it empty for bytes.")
    return FileTokenizer(Path(path), bos_token)
