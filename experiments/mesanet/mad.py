"""MAD: which ability does which mixer have? Six tasks of tokens (arXiv 2403.17844) as in arXiv 2506.05233, table 9.

  python -m experiments.mesanet.mad smoke    mesa recalls what a window of 4 tokens cannot: 3 minutes on 2 cores
  python -m experiments.mesanet.mad small    five mixers on every task at its baseline: 75 minutes on 2 cores
  python -m experiments.mesanet.mad paper    all difficulties, learning rates and decays: weeks on one GPU

One line of cells.jsonl is one model trained on one setting; the same command goes on where it was. At the end a table
stands in the output's table.md, the paper's figures beside ours.
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
from experiments.synthetic import mad
from experiments.synthetic.fit import Choice, FitConfig
from experiments.synthetic.mad import Setting, TaskName
from experiments.synthetic.models import ALL_MIXERS, check_fit, check_mixers, fit_model, mesh_for, shaped
from experiments.synthetic.scores import Score, Tally, accuracy, grouped, mean, score, tally
from mesanet_jax import MesaNetConfig

# arXiv 2506.05233, table 9, in percent; the columns are COLUMNS
PAPER = {
    "mamba2": (100, 51.2, 42.0, 95.4, 41.3),
    "gla": (100, 39.0, 82.5, 96.1, 42.3),
    "mlstm": (100, 47.6, 79.8, 95.4, 43.4),
    "deltanet": (100, 55.5, 40.8, 98.8, 43.3),
    "gated_deltanet": (100, 32.7, 81.7, 95.7, 45.0),
    "hawk": (93.0, 13.6, 91.3, 77.0, 47.7),
    "mesa": (100, 58.5, 77.2, 99.2, 45.4),
    "hawk+mesa": (100, 30.2, 85.6, 99.6, 52.3),
    "attention": (100, 48.6, 84.7, 96.0, 49.5),
}
COLUMNS: dict[str, tuple[TaskName, ...]] = {
    "recall": ("in-context-recall", "noisy-in-context-recall"),
    "fuzzy": ("fuzzy-in-context-recall",),
    "memorize": ("memorization",),
    "copy": ("selective-copying",),
    "compress": ("compression",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadConfig:
    """Which models on which tasks.

    Attributes:
      output: folder of the cells and the table.
      mixers: what is compared; "+" joins the layers of a hybrid from the bottom up.
      tasks: what they are tested on.
      harder: also all difficulties that the benchmark varies, not only the baseline of each task.
      model: size of the models; vocabulary, context and pattern come from task and mixer.
      fit: how each is trained.
      peak_lrs: learning rates to try; the best one counts.
      weight_decays: weight decays to try; the best one counts.
      seeds: of parameters and order; scores are means over them.
      mesh: how devices share a batch.
    """

    output: Path = Path("runs/mad/small")
    mixers: tuple[str, ...] = ALL_MIXERS
    tasks: tuple[TaskName, ...] = TaskName.__args__
    harder: bool = False
    model: MesaNetConfig = MesaNetConfig(num_layers=2, model_dim=128, num_heads=8, key_dim=16, value_dim=16)
    fit: FitConfig = FitConfig()
    peak_lrs: tuple[float, ...] = (3e-3, 1e-3, 5e-4, 1e-4)
    weight_decays: tuple[float, ...] = (0.01, 0.1)
    seeds: tuple[int, ...] = (0,)
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        for field in ("mixers", "tasks", "peak_lrs", "weight_decays", "seeds"):
            if not getattr(self, field):
                raise ValueError(f"MadConfig: {field} is empty; name at least one.")
        check_mixers("MadConfig", self.mixers, (self.model.num_layers,))


QUICK = MadConfig(
    model=MesaNetConfig(num_layers=2, model_dim=64, num_heads=4, key_dim=16, value_dim=16),
    fit=FitConfig(epochs=3, least_steps=1200, warmup_steps=100),
    peak_lrs=(3e-3,),
    weight_decays=(0.01,),
)
PRESETS = {
    "smoke": (
        "mesa recalls, a window of 4 tokens cannot",
        dataclasses.replace(
            QUICK,
            output=Path("runs/mad/smoke"),
            mixers=("mesa", "sliding_window"),
            tasks=("in-context-recall",),
            model=dataclasses.replace(QUICK.model, window=4),
            fit=dataclasses.replace(QUICK.fit, epochs=1, least_steps=0),
        ),
    ),
    "small": (
        "five mixers on every task at its baseline",
        dataclasses.replace(QUICK, mixers=("mesa", "gated_deltanet", "gla", "hawk", "attention")),
    ),
    "paper": ("all difficulties, learning rates and decays", MadConfig(output=Path("runs/mad/paper"), harder=True)),
}


def cells(config: MadConfig) -> list[dict[str, Any]]:
    """Returns what is trained and tested, task by task."""
    settings = [x for task in config.tasks for x in (mad.sweep(task) if config.harder else [mad.baseline(task)])]
    choices = (settings, config.mixers, config.peak_lrs, config.weight_decays, config.seeds)
    return [
        {"mixer": mixer, **dataclasses.asdict(setting), "peak_lr": lr, "weight_decay": decay, "seed": seed}
        for setting, mixer, lr, decay, seed in itertools.product(*choices)
    ]


def plan(config: MadConfig, *, mixer, peak_lr, weight_decay, seed, **setting) -> tuple[Setting, MesaNetConfig, Choice]:
    """Returns what a cell stands for.

    Raises:
      UserError: it cannot be computed.
    """
    difficulty, choice = Setting(**setting), Choice(peak_lr, weight_decay, seed)
    check_fit(config.fit, choice, difficulty.num_train)
    return difficulty, shaped(config.model, mixer, difficulty.vocab_size, difficulty.length), choice


def result(mesh: jax.sharding.Mesh, config: MadConfig, **cell) -> dict:
    """Trains and tests one cell."""
    setting, shape, choice = plan(config, **cell)
    train, test = mad.draw(setting)

    def counts(predictions: np.ndarray) -> Tally:
        return tally(predictions, test.targets, setting.vocab_size)

    found = fit_model(
        shape,
        train,
        test,
        lambda predictions: float(accuracy(counts(predictions))),
        config.fit,
        choice,
        mesh,
        compresses=setting.task == "compression",
    )
    return {**score(counts(found.predictions))._asdict(), "epochs": found.num_epochs, "seconds": found.seconds}


def main(config: MadConfig) -> None:
    """Computes the cells that are missing and writes the table."""
    mesh = mesh_for(config.mesh, config.fit.batch_size)
    text = table(config, computed(config, cells(config), plan, partial(result, mesh)))
    (config.output / "table.md").write_text(text)
    print(f"\n{text}\ntable: {config.output / 'table.md'}")


def scores(entries: list[dict]) -> dict[tuple[str, TaskName], Score]:
    """Returns the score of each mixer on each task: the mean over settings of what the best choice has there."""
    fields = [field.name for field in dataclasses.fields(Setting)]
    best: dict[tuple, Score] = {}
    for (*place, _, _), found in grouped(entries, ["mixer", *fields, "peak_lr", "weight_decay"]).items():
        best[tuple(place)] = max(found, best.get(tuple(place), found))
    settings: dict[tuple, list[Score]] = {}
    for (mixer, task, *_), found in best.items():
        settings.setdefault((mixer, task), []).append(found)
    return {place: mean(found) for place, found in settings.items()}


def table(config: MadConfig, entries: list[dict]) -> str:
    """Returns the scores in percent with their intervals, the paper's in brackets beside them."""
    found = scores(entries)
    columns = {name: [task for task in tasks if task in config.tasks] for name, tasks in COLUMNS.items()}
    columns = {name: tasks for name, tasks in columns.items() if tasks}
    lines = ["| mixer | " + " | ".join([*columns, "mean"]) + " |", "|---" * (len(columns) + 2) + "|"]
    for mixer in config.mixers:
        ours = [mean([found[mixer, task] for task in tasks]) for tasks in columns.values()]
        theirs = [PAPER[mixer][list(COLUMNS).index(name)] for name in columns] if mixer in PAPER else []
        shown = [_percent(*pair) for pair in itertools.zip_longest([*ours, mean(ours)], [*theirs, *_mean(theirs)])]
        lines.append(f"| {mixer} | " + " | ".join(shown) + " |")
    what = "All difficulties" if config.harder else "The baseline of each task alone"
    choices, seeds = len(config.peak_lrs) * len(config.weight_decays), len(config.seeds)
    tried = f"the best of {choices} choices" if choices > 1 else "one choice"
    least = f" or {config.fit.least_steps:,} steps, whichever is more," if config.fit.least_steps else ""
    lines.append(
        f"\nPer cent of right answers, the mean over ids, with the interval over test sequences; in brackets arXiv "
        f"2506.05233, table 9. {what}, {config.fit.epochs} epochs{least} at most, {tried} of learning rate and "
        f"weight decay, {seeds} {'seeds' if seeds > 1 else 'seed'}."
    )
    return "\n".join(lines) + "\n"


def _mean(values: list[float]) -> list[float]:
    return [float(np.mean(values))] if values else []


def _percent(ours: Score, theirs: float | None) -> str:
    shown = f"{100 * ours.mean:.1f} ± {100 * ours.half:.1f}"
    return shown if theirs is None else f"{shown} ({theirs:.1f})"


if __name__ == "__main__":
    cli.run_preset(main, PRESETS, default="smoke")
