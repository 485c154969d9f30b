"""Tokenizers that are made in no time."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers


def words_file(path: Path, words: int, suffix: str = ":") -> Path:
    """Writes a tokenizer whose tokens are the whole words 0:, 1:, 2: and so on; all others are unknown to it."""
    vocabulary = {"<s>": 0, "[UNK]": 1} | {f"{i}{suffix}": i + 2 for i in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return path
