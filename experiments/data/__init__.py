"""Text to rows of tokens: from memory or from shards on disk, several sources by weight, any row at any time."""

from experiments.data.config import DataConfig
from experiments.data.corpus import held_out_documents, held_out_text, training_text
from experiments.data.encoding import Document, is_held_out
from experiments.data.mixture import Windows, ordered_batches, shuffled_rows, stack
from experiments.data.windows import PackedWindows

__all__ = [
    "DataConfig",
    "Document",
    "PackedWindows",
    "Windows",
    "held_out_documents",
    "held_out_text",
    "is_held_out",
    "ordered_batches",
    "shuffled_rows",
    "stack",
    "training_text",
]
