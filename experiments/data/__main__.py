"""Text for training at scale: tokenised once into shards, which are mapped into memory and never read whole.

  python -m experiments.data build --source DATASET --tokenizer tokenizer.json --output shards/DATASET
  python -m experiments.data verify shards/DATASET

Training checks the size of each shard when it starts; `verify` reads every byte.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from experiments import cli
from experiments.cli import UserError
from experiments.data.build import BuildConfig, build, describe
from experiments.data.shards import check_digest, read_index


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Compare every byte of finished shards with the digests in their index.

    Attributes:
      folder: folder of the shards.
    """

    folder: tyro.conf.Positional[Path]


Command = (
    Annotated[BuildConfig, tyro.conf.subcommand("build")] | Annotated[VerifyConfig, tyro.conf.subcommand("verify")]
)


def main(config: BuildConfig | VerifyConfig) -> None:
    """Builds or verifies, and prints a summary."""
    if isinstance(config, VerifyConfig):
        return verify(config.folder)
    begin = time.monotonic()
    try:
        index = build(config)
    except KeyboardInterrupt:
        raise UserError("stopped; finished shards stay, and the same command goes on with them.") from None
    print(describe(config, index, time.monotonic() - begin))


def verify(folder: Path) -> None:
    """Reads all shards of a folder.

    Raises:
      UserError: one of them is damaged.
    """
    index = read_index(folder)
    shards = (*index.train, *index.held_out)
    for shard in tqdm(shards, unit="file", dynamic_ncols=True, disable=not sys.stderr.isatty()):
        check_digest(folder / shard.file, shard)
    print(f"{folder}: {len(shards)} files are what they were when they were built")


if __name__ == "__main__":
    cli.run(main, Command)
