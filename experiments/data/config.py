"""What text a run reads, and how it is cut."""

import dataclasses
import math
from typing import NamedTuple

STANDARD_LIBRARY = "stdlib"


class Origin(NamedTuple):
    """One place that documents come from."""

    source: str
    subset: str = ""
    split: str = "train"
    text_field: str = "text"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it is cut.

    Attributes:
      source: one or several of: "stdlib" (the source text of the Python that runs this), a folder of shards that
        `python -m experiments.data build` made, a .jsonl, .parquet or text file, a folder of them, or the name of a
        Hugging Face dataset. All but shards have to fit in memory.
      weights: share of each source in what is trained on; none means in proportion to their sizes.
      subset: configuration of a Hugging Face dataset.
      split: split of a Hugging Face dataset.
      text_field: column that holds the text.
      tokenizer: a tokenizer.json file; empty means bytes. For shards, the one they were made with.
      bos_token: token that begins a document; empty looks for a usual name.
      held_out: share of documents kept from training, chosen by a hash of their names. For shards, the one
        they were made with.
      length: tokens the model reads at once.
      batch_size: sequences of one optimizer step.
      seed: order of documents and windows.
    """

    source: tuple[str, ...] = (STANDARD_LIBRARY,)
    weights: tuple[float, ...] = ()
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
        if isinstance(self.source, str) or not self.source or not all(self.source):
            raise ValueError(f"DataConfig: source={self.source!r} must name at least one text, as a tuple of names.")
        if len(set(self.source)) < len(self.source):
            raise ValueError(f"DataConfig: source={self.source} names a text twice; give it a larger weight instead.")
        if self.weights and len(self.weights) != len(self.source):
            raise ValueError(
                f"DataConfig: weights={self.weights} must be one for each of {len(self.source)} source(s), or none."
            )
        if self.weights and not (all(0 <= w < math.inf for w in self.weights) and sum(self.weights) > 0):
            raise ValueError(f"DataConfig: weights={self.weights} must be 0 or more, and not all of them 0.")
        if self.length < 2:
            raise ValueError(f"DataConfig: length={self.length} must be at least 2.")
        if self.batch_size < 1:
            raise ValueError(f"DataConfig: batch_size={self.batch_size} must be at least 1.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"DataConfig: seed={self.seed} must lie between 0 and 2**32 - 1.")
        check_share(type(self).__name__, self.held_out)

    @property
    def origins(self) -> list[Origin]:
        """The sources one by one."""
        return [Origin(source, self.subset, self.split, self.text_field) for source in self.source]


def check_share(config: str, held_out: float) -> None:
    """Refuses a share that keeps nothing from training, or everything."""
    if not 0 < held_out < 1:
        raise ValueError(f"{config}: held_out={held_out} must lie between 0 and 1, say 0.05.")
