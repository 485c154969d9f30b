"""RegBench: which mixer learns a language from examples? As arXiv 2401.12973, and figure 9 of arXiv 2506.05233.

  python -m experiments.mesanet.regbench smoke    mesa against a window of 4 tokens: minutes on 2 cores
  python -m experiments.mesanet.regbench small    every mixer on short strings of small automata: 20 minutes on 2 cores
  python -m experiments.mesanet.regbench paper    the paper's grid of sizes, learning rates and decays: weeks on one GPU

A sequence holds strings of one random automaton, and every sequence has another; a prediction is right if the automaton
could go on so. One line of cells.jsonl is one trained model; the same command goes on where it was. Of each mixer the
best choice stands in the output's table.md.
"""

import dataclasses
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import cli
from experiments.mesh import MeshConfig
from experiments.sweep import computed
from experiments.synthetic import automata
from experiments.synthetic.automata import VOCAB_SIZE, AutomataConfig
from experiments.synthetic.fit import Choice, FitConfig
from experiments.synthetic.models import ALL_MIXERS, check_fit, check_mixers, fills, fit_model, mesh_for, shaped
from experiments.synthetic.scores import accuracy, grouped, score
from mesanet_jax import MesaNetConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegBenchConfig:
    """Which models on which automata.

    Attributes:
      output: folder of the cells and the table.
      mixers: what is compared; "+" joins the layers of a hybrid from the bottom up.
      automata: what they are tested on.
      num_train: numbers of training sequences.
      num_test: sequences of the test.
      model_dims: widths to try; the best choice of all counts.
      depths: numbers of layers to try.
      heads: numbers of heads to try.
      model: size of queries, keys and values, and all else about the models.
      fit: how each is trained.
      peak_lrs: learning rates to try.
      weight_decays: weight decays to try.
      seeds: of parameters and order; scores are means over them.
      mesh: how devices share a batch.
    """

    output: Path = Path("runs/regbench/paper")
    mixers: tuple[str, ...] = ALL_MIXERS
    automata: AutomataConfig = AutomataConfig()
    num_train: tuple[int, ...] = (5000,)
    num_test: int = 500
    model_dims: tuple[int, ...] = (64, 128, 256, 512, 1024)
    depths: tuple[int, ...] = (1, 2, 4, 8, 12)
    heads: tuple[int, ...] = (1, 2, 4)
    model: MesaNetConfig = MesaNetConfig()
    fit: FitConfig = FitConfig(epochs=50, warmup_steps=25_000, final_lr=2.5e-5, b2=0.99)
    peak_lrs: tuple[float, ...] = (1e-4, 2.5e-4, 1e-3)
    weight_decays: tuple[float, ...] = (0.01, 0.1)
    seeds: tuple[int, ...] = (0,)
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        tried = ("num_train", "model_dims", "depths", "heads", "peak_lrs", "weight_decays", "seeds")
        for field in ("mixers", *tried):
            if not getattr(self, field):
                raise ValueError(f"RegBenchConfig: {field} is empty; name at least one.")
        if min(self.num_test, *self.num_train) < 1:
            raise ValueError("RegBenchConfig: num_train and num_test must be at least 1.")
        check_mixers("RegBenchConfig", self.mixers, self.depths)


LITTLE = RegBenchConfig(
    output=Path("runs/regbench/small"),
    automata=AutomataConfig(states=(4, 6), alphabet=(4, 8), strings=(8, 12), string_length=(4, 12)),
    num_train=(1000,),
    num_test=200,
    model_dims=(64,),
    depths=(2,),
    heads=(2,),
    model=MesaNetConfig(key_dim=32, value_dim=32),
    fit=FitConfig(epochs=30, warmup_steps=100, b2=0.99),
    peak_lrs=(3e-3,),
    weight_decays=(0.1,),
)
PRESETS = {
    "smoke": (
        "mesa against a window of 4 tokens",
        dataclasses.replace(
            LITTLE,
            output=Path("runs/regbench/smoke"),
            mixers=("mesa", "sliding_window"),
            model=dataclasses.replace(LITTLE.model, window=4),
            fit=dataclasses.replace(LITTLE.fit, epochs=8),
        ),
    ),
    "small": ("every mixer on short strings of small automata", LITTLE),
    "paper": ("the grid of the paper", RegBenchConfig()),
}


def cells(config: RegBenchConfig) -> list[dict[str, Any]]:
    """Returns what is trained and tested."""
    c = config
    values = {
        "mixer": c.mixers,
        "num_train": c.num_train,
        "model_dim": c.model_dims,
        "num_layers": c.depths,
        "num_heads": c.heads,
        "peak_lr": c.peak_lrs,
        "weight_decay": c.weight_decays,
        "seed": c.seeds,
    }
    every = (dict(zip(values, cell, strict=True)) for cell in itertools.product(*values.values()))
    return [cell for cell in every if fills(cell["mixer"], cell["num_layers"])]


def plan(
    config: RegBenchConfig, *, mixer, num_train, peak_lr, weight_decay, seed, **sizes
) -> tuple[MesaNetConfig, Choice]:
    """Returns what a cell stands for.

    Raises:
      UserError: it cannot be computed.
    """
    choice = Choice(peak_lr, weight_decay, seed)
    check_fit(config.fit, choice, num_train)
    return shaped(config.model, mixer, VOCAB_SIZE, config.automata.length, **sizes), choice


def result(mesh: jax.sharding.Mesh, config: RegBenchConfig, **cell) -> dict:
    """Trains and tests one cell."""
    shape, choice = plan(config, **cell)
    train, test = automata.draw(config.automata, cell["num_train"], config.num_test)

    def share(predictions: np.ndarray) -> float:
        return float(accuracy(automata.tally(predictions, test)))

    found = fit_model(shape, train.examples, test.examples, share, config.fit, choice, mesh)
    counts = automata.tally(found.predictions, test)
    return {**score(counts)._asdict(), "epochs": found.num_epochs, "seconds": found.seconds}


def main(config: RegBenchConfig) -> None:
    """Computes the cells that are missing and writes the table."""
    mesh = mesh_for(config.mesh, config.fit.batch_size)
    text = table(config, computed(config, cells(config), plan, partial(result, mesh)))
    (config.output / "table.md").write_text(text)
    print(f"\n{text}\ntable: {config.output / 'table.md'}")


def table(config: RegBenchConfig, entries: list[dict]) -> str:
    """Returns the best choice of each mixer for each number of training sequences, in percent with its interval."""
    fields = ("mixer", "num_train", "model_dim", "num_layers", "num_heads", "peak_lr", "weight_decay")
    best: dict[tuple, tuple] = {}
    for (mixer, number, *choice), found in grouped(entries, fields).items():
        best[mixer, number] = max((found, choice), best.get((mixer, number), (found, choice)))
    lines = ["| mixer | " + " | ".join(f"{number:,} sequences" for number in config.num_train) + " |"]
    lines.append("|---" * (len(config.num_train) + 1) + "|")
    for mixer in config.mixers:
        shown = (_shown(*best[mixer, number]) for number in config.num_train)
        lines.append(f"| {mixer} | " + " | ".join(shown) + " |")
    lines.append(
        f"\nPer cent of predictions that the automaton accepts, with the interval over {config.num_test} automata of "
        f"the test; the best of all widths, depths, heads, rates and decays, {len(config.seeds)} seeds, "
        f"{config.fit.epochs} epochs."
    )
    return "\n".join(lines) + "\n"


def _shown(found, choice) -> str:
    width, depth, heads, rate, decay = choice
    accuracy = f"{100 * found.mean:.1f} ± {100 * found.half:.1f}"
    return f"{accuracy} (width {width}, {depth} layers, {heads} heads, lr {rate:g}, wd {decay:g})"


if __name__ == "__main__":
    cli.run_preset(main, PRESETS, default="smoke")
