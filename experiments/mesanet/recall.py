"""How far back does a mixer still know, and beyond the length it was trained on? Recall, needles and copying.

  python -m experiments.mesanet.recall smoke    mesa against a window of 8 tokens: minutes on 2 cores
  python -m experiments.mesanet.recall small    six mixers, trained on 64 tokens, tested on up to 256: half an hour

Every answer stands somewhere in the sequence: the page draws how often it is known by how long ago that was, with
bands, for the trained length and longer ones. One line of cells.jsonl is one trained model; the same command goes on
where it was.
"""

import dataclasses
import itertools
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments import cli
from experiments.mesh import MeshConfig
from experiments.pictures import COLORS, DASHES, INK, MARKERS, STYLE, inline_svg, new_figure, save_figure
from experiments.sweep import computed
from experiments.synthetic import memory
from experiments.synthetic.examples import IGNORED
from experiments.synthetic.fit import Choice, FitConfig, predictor
from experiments.synthetic.memory import AXES, SHORTEST, VOCAB_SIZE, Asked, TaskName
from experiments.synthetic.models import check_fit, check_mixers, fit_model, make_model, mesh_for, shaped
from experiments.synthetic.scores import CONFIDENCE, Score, Tally, accuracy, score, tally
from experiments.webpage import Drawing, Table, page, provenance
from mesanet_jax import MesaNetConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallConfig:
    """Which models on which tasks.

    Attributes:
      output: folder of the cells and the page.
      mixers: what is compared, at most six; "+" joins the layers of a hybrid from the bottom up.
      tasks: what they are asked.
      length: tokens of the sequences that are trained on.
      factors: lengths of the tests, in trained lengths.
      num_train: training sequences.
      num_test: sequences of each test.
      model: size of the models.
      fit: how each is trained.
      peak_lr: learning rate after warm-up.
      weight_decay: of matrices.
      seeds: of parameters and order; the picture shows the first.
      mesh: how devices share a batch.
    """

    output: Path = Path("runs/recall/small")
    mixers: tuple[str, ...] = ("mesa", "gated_deltanet", "gla", "mamba2", "hawk", "attention")
    tasks: tuple[TaskName, ...] = TaskName.__args__
    length: int = 64
    factors: tuple[int, ...] = (1, 2, 4)
    num_train: int = 6400
    num_test: int = 320
    model: MesaNetConfig = MesaNetConfig(num_layers=2, model_dim=64, num_heads=2, key_dim=32, value_dim=32)
    fit: FitConfig = FitConfig(epochs=8, warmup_steps=100)
    peak_lr: float = 3e-3
    weight_decay: float = 0.01
    seeds: tuple[int, ...] = (0,)
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        for field in ("mixers", "tasks", "factors", "seeds"):
            if not getattr(self, field):
                raise ValueError(f"RecallConfig: {field} is empty; name at least one.")
        if len(self.mixers) > len(COLORS):
            raise ValueError(
                f"RecallConfig: {len(self.mixers)} mixers are more than the {len(COLORS)} that can be drawn."
            )
        least = {"length": SHORTEST, "num_train": 1, "num_test": 1}
        for field, low in least.items():
            if getattr(self, field) < low:
                raise ValueError(f"RecallConfig: {field}={getattr(self, field)} must be at least {low}.")
        if min(self.factors) < 1:
            raise ValueError(f"RecallConfig: factors={self.factors} must be at least 1.")
        check_mixers("RecallConfig", self.mixers, (self.model.num_layers,))


PRESETS = {
    "smoke": (
        "mesa against a window of 8 tokens",
        RecallConfig(
            output=Path("runs/recall/smoke"),
            mixers=("mesa", "sliding_window"),
            tasks=("recall",),
            factors=(1, 2),
            model=dataclasses.replace(RecallConfig().model, window=8),
            fit=FitConfig(epochs=6, warmup_steps=100),
        ),
    ),
    "small": ("six mixers, up to four times the trained length", RecallConfig()),
}


def cells(config: RecallConfig) -> list[dict[str, Any]]:
    """Returns what is trained and tested."""
    choices = itertools.product(config.tasks, config.mixers, config.seeds)
    lengths = [factor * config.length for factor in sorted(set(config.factors))]
    return [{"task": task, "mixer": mixer, "seed": seed, "lengths": lengths} for task, mixer, seed in choices]


def plan(
    config: RecallConfig, *, task: TaskName, mixer: str, seed: int, lengths: list[int]
) -> tuple[MesaNetConfig, Choice]:
    """Returns what a cell stands for.

    Raises:
      UserError: it cannot be computed.
    """
    del task
    choice = Choice(config.peak_lr, config.weight_decay, seed)
    check_fit(config.fit, choice, config.num_train)
    return shaped(config.model, mixer, VOCAB_SIZE, max(config.length, *lengths)), choice


def result(mesh: jax.sharding.Mesh, config: RecallConfig, **cell) -> dict:
    """Trains one model and tests it on all lengths."""
    c, task = config, cell["task"]
    shape, choice = plan(config, **cell)
    train, near = (memory.draw(task, c.length, number, seed=i) for i, number in enumerate((c.num_train, c.num_test)))

    def share(predictions: np.ndarray) -> float:
        return float(accuracy(_as_one(predictions, near)))

    found = fit_model(shape, train.examples, near.examples, share, c.fit, choice, mesh)
    _, apply = make_model(shape)
    curves = []
    for length in cell["lengths"]:
        test = memory.draw(task, length, c.num_test, seed=1)
        predictions = predictor(apply, test.examples.inputs, c.fit.batch_size, mesh)(found.params)
        curves.append(curve(predictions, test, task))
    return {"mean": share(found.predictions), "epochs": found.num_epochs, "seconds": found.seconds, "curves": curves}


def curve(predictions: np.ndarray, test: Asked, task: TaskName) -> dict[str, Any]:
    """Returns accuracies with their intervals, over all and by octaves of the axis."""
    along, asked = test.along(task), test.examples.targets != IGNORED
    edges = 2 ** np.arange(int(np.log2(along.max())) + 2)
    buckets = []
    for low, high in itertools.pairwise(edges.tolist()):
        here = asked & (along >= low) & (along < high)
        if here.any():
            inside = Asked(
                test.examples._replace(targets=np.where(here, test.examples.targets, IGNORED)), test.distance
            )
            buckets.append({"from": low, "to": high - 1, **score(_as_one(predictions, inside))._asdict()})
    return {"length": int(predictions.shape[1]), **score(_as_one(predictions, test))._asdict(), "buckets": buckets}


def _as_one(predictions: np.ndarray, test: Asked) -> Tally:
    """Counts all ids as one: every question counts the same."""
    right = np.where(predictions == test.examples.targets, 0, 1)
    counts = tally(right, np.where(test.examples.targets == IGNORED, IGNORED, 0), 2)
    return Tally(counts.due[:, :1], counts.due[:, :1], counts.right[:, :1])


def main(config: RecallConfig) -> None:
    """Computes the cells that are missing and writes the page."""
    mesh = mesh_for(config.mesh, config.fit.batch_size)
    entries = computed(config, cells(config), plan, partial(result, mesh))
    said, blocks = findings(config, entries), []
    for task in config.tasks:
        own = [entry for entry in entries if entry["cell"]["task"] == task]
        blocks += [_drawing(config, task, own), table(config, task, own)]
    notes = [f"{config.num_train:,} training sequences, {config.fit.epochs} epochs at most, {config.num_test} tests."]
    facts = provenance(["python", "-m", "experiments.mesanet.recall", *sys.argv[1:]], config.seeds[0])
    text = page("What a mixer still knows", "by distance and length", said, blocks, notes, facts)
    (config.output / "report.html").write_text(text)
    print("\n" + "\n".join(said) + f"\n\npage: {config.output / 'report.html'}")


def _drawing(config: RecallConfig, task: TaskName, entries: list[dict]) -> Drawing:
    figure, title = draw_task(config, task, entries), f"{task.capitalize()}, trained on {config.length} tokens"
    said = f"Share of answers known by {AXES[task]}, in octaves; dotted, the trained length."
    paths = save_figure(figure, config.output, task, title, said)
    caption = f"{said} Bands hold {100 * CONFIDENCE:.0f} % of resamples of the test's sequences."
    return Drawing(title, inline_svg(figure, title, said), caption, [path.name for path in paths])


def findings(config: RecallConfig, entries: list[dict]) -> list[str]:
    """Returns who knows most, task by task."""
    said = []
    for task in config.tasks:
        own = {}
        for entry in entries:
            if entry["cell"]["task"] == task:
                for found in entry["curves"]:
                    own.setdefault((entry["cell"]["mixer"], found["length"]), []).append(found["mean"])
        lengths = sorted({length for _, length in own})
        shown = ("; ".join(f"{mixer} {100 * np.mean(own[mixer, n]):.1f} %" for mixer in config.mixers) for n in lengths)
        said.append(
            f"{task}: " + ". ".join(f"At {n} tokens {text}" for n, text in zip(lengths, shown, strict=True)) + "."
        )
    return said


def table(config: RecallConfig, task: TaskName, entries: list[dict]) -> Table:
    """Returns the accuracy of each mixer at each length."""
    lengths = [found["length"] for found in entries[0]["curves"]]
    rows = []
    for mixer in config.mixers:
        own = [entry["curves"] for entry in entries if entry["cell"]["mixer"] == mixer]
        scores = [[Score(found["mean"], found["half"]) for found in column] for column in zip(*own, strict=True)]
        cells = [f"{100 * np.mean([x.mean for x in s]):.1f} ± {100 * np.mean([x.half for x in s]):.1f}" for s in scores]
        rows.append((mixer, *cells))
    header = ("mixer", *(f"{length} tokens" for length in lengths))
    return Table(f"{task.capitalize()} in numbers", header, rows, "Per cent of all questions.")


def draw_task(config: RecallConfig, task: TaskName, entries: list[dict]) -> Figure:
    """One panel for each length, one line for each mixer."""
    with matplotlib.rc_context(STYLE):
        figure = new_figure(3.4 * len(set(config.factors)) + 0.6, 3.4)
        panels = figure.subplots(1, len(set(config.factors)), sharey=True, squeeze=False)[0]
        for entry in entries:
            if entry["cell"]["seed"] != config.seeds[0]:
                continue
            number = config.mixers.index(entry["cell"]["mixer"])
            for panel, found in zip(panels, entry["curves"], strict=True):
                _draw_line(panel, entry["cell"]["mixer"], number, found["buckets"])
        for panel, factor in zip(panels, sorted(set(config.factors)), strict=True):
            panel.set(title=f"{factor * config.length} tokens", xlabel=AXES[task], ylim=(-0.03, 1.03))
            panel.set_xscale("log", base=2)
            panel.axvline(memory.reach(task, config.length), color=INK, linewidth=0.8, linestyle=":")
            panel.grid(visible=True, axis="y")
        panels[0].set_ylabel("share of answers known")
        panels[-1].legend(fontsize=8)
    return figure


def _draw_line(panel, mixer: str, number: int, buckets: list[dict]) -> None:
    x = [np.sqrt(bucket["from"] * bucket["to"]) for bucket in buckets]
    mean, half = (np.array([bucket[name] for bucket in buckets]) for name in ("mean", "half"))
    color = COLORS[number]
    panel.fill_between(x, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)
    panel.plot(x, mean, color=color, linestyle=DASHES[number], marker=MARKERS[number], label=mixer)


if __name__ == "__main__":
    cli.run_preset(main, PRESETS, default="smoke")
