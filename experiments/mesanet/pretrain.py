"""Pretrain a MesaNet, or a model it is compared with, on real text (arXiv 2506.05233, section 4).

  python -m experiments.mesanet.pretrain                                  a few minutes on a laptop, no downloads
  python -m experiments.mesanet.pretrain tiny --model.pattern attention   a Transformer in the same place
  python -m experiments.mesanet.pretrain 145m --data.source DATASET --data.tokenizer tokenizer.json

The same command goes on with a run that was interrupted, exactly where it was. Afterwards:

  python -m experiments.mesanet.curves RUN [RUN ...]
"""

from pathlib import Path

from experiments import cli, hosts
from experiments.data import DataConfig
from experiments.loop import train
from experiments.runs import RunConfig
from mesanet_jax import SIZES
from mesanet_jax.train import OptimizerConfig

TINY = RunConfig(
    output=Path("runs/tiny"),
    model=SIZES["tiny"],
    data=DataConfig(length=256, batch_size=16, held_out=0.1),
    optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=50),
    num_steps=400,
    save_every=100,
    eval_every=100,
    eval_batches=8,
)


def paper(size: str, peak_lr: float) -> RunConfig:
    """The 15-billion-token runs of the paper: 28,610 steps of 256 sequences of 2,048 tokens."""
    return RunConfig(output=Path("runs") / size, model=SIZES[size], optimizer=OptimizerConfig(peak_lr=peak_lr))


PRESETS = {
    "tiny": ("Bytes of the Python standard library on a laptop.", TINY),
    "145m": ("The paper's small model; set --data.source and --data.tokenizer.", paper("145m", 3e-3)),
    "400m": ("The paper's medium model; set --data.source and --data.tokenizer.", paper("400m", 2.5e-3)),
    "1b": ("The paper's large model; set --data.source and --data.tokenizer.", paper("1b", 2e-3)),
}


def main(config: RunConfig) -> None:
    """Trains and says where the results are."""
    train(config)
    hosts.say(f"log: {config.output / 'log.jsonl'}\ncheckpoints: {config.output / 'checkpoints'}")


if __name__ == "__main__":
    cli.run_preset(main, PRESETS, default="tiny")
