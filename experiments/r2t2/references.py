"""Show the frozen model labelled examples and keep what re-routing needs of them: a reference set.

  python -m experiments.r2t2.references --run runs/r2t2/seed0

Examples come from the shifted domain (noise, stripes, blur, washed-out colors beside clean scenes), with handwriting of
its own that no test shares. Prints what the set is worth by leaving each reference out once. Neither pictures nor words
are stored unless asked for.
"""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments import cli
from experiments.cli import UserError
from experiments.r2t2 import scenes
from experiments.r2t2.folder import Trained, open_model, write
from r2t2_jax.calibrate import Forecast, prepare
from r2t2_jax.embedders import Embedder, Standardised, beside
from r2t2_jax.linearise import linearised
from r2t2_jax.models.scenes import picture_statistics
from r2t2_jax.neighbors import NeighborConfig
from r2t2_jax.reference_build import build
from r2t2_jax.reference_files import load, save
from r2t2_jax.references import ReferenceSet
from r2t2_jax.reroute import RerouteConfig
from r2t2_jax.strategies import StrategyConfig

DESCENT = RerouteConfig(
    strategy="descent", neighbors=NeighborConfig(k=50), settings=StrategyConfig(learning_rate=1.0, trust=0.0)
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferencesConfig:
    """Which references are built.

    Attributes:
      run: folder of a trained model.
      readout: which of its models, "affine" or "deep".
      output: folder to save to; by default references-<readout> in the run.
      num_examples: labelled scenes to show to the model.
      correct_only: keep only what the frozen model answers rightly, as the paper does; a wrong answer has a label too.
      picture: how much the picture counts beside the question in who is a neighbour; 0 is the paper's choice.
      deduplicate: similarity above which the later of two references with the same label goes; 0 keeps all.
      per_source: most references of one piece of handwriting; 0 sets no limit.
      size: most references, chosen to cover; 0 sets no limit.
      store_inputs: keep pictures and questions too, so that pages can show neighbours.
      overwrite: replace a set that is already there.
    """

    run: Path = Path("runs/r2t2/seed0")
    readout: str = "affine"
    output: Path | None = None
    num_examples: int = 6000
    correct_only: bool = False
    picture: float = 0.5
    deduplicate: float = 0.0
    per_source: int = 0
    size: int = 0
    store_inputs: bool = False
    overwrite: bool = False

    def __post_init__(self):
        if self.num_examples < 2:
            raise ValueError(f"ReferencesConfig: num_examples={self.num_examples} must be at least 2.")
        if not 0 <= self.deduplicate < 1:
            raise ValueError(f"ReferencesConfig: deduplicate={self.deduplicate} must be at least 0 and below 1.")
        for field in ("picture", "per_source", "size"):
            if getattr(self, field) < 0:
                raise ValueError(f"ReferencesConfig: {field}={getattr(self, field)} must not be negative.")


class Opened(NamedTuple):
    """References, and the embedder that goes with them."""

    references: ReferenceSet
    embedder: Embedder


def main(config: ReferencesConfig) -> None:
    """Builds, reports, saves."""
    trained = open_model(config.run, config.readout)
    folder = config.output or config.run / f"references-{config.readout}"
    if folder.exists() and not config.overwrite:
        raise UserError(f"output: {folder} exists; give another folder, or --overwrite to replace the set in it.")
    data = scenes.make("reference", config.num_examples, trained.settings["seed"])
    opened = collect(trained, data, config.picture, store_inputs=config.store_inputs)
    references = opened.references.correct_only() if config.correct_only else opened.references
    references = references.deduplicate(config.deduplicate) if config.deduplicate else references
    references = references.cap_per_source(config.per_source) if config.per_source else references
    references = references.cap(config.size) if config.size else references
    print(references)
    try:
        _, forecast = prepare(references, DESCENT)
    except ValueError as error:
        raise UserError(f"references: {error}") from None
    print(report(references, forecast))
    save(references, folder, overwrite=config.overwrite)
    write(folder / "picture.json", json.dumps(constants(trained, data, config.picture)).encode())
    print(f"saved: {folder}")


def collect(trained: Trained, data: scenes.Scenes, picture: float, *, store_inputs: bool = False) -> Opened:
    """Returns references made of scenes; those of a deep model hold its linearisation at the router's routing."""
    embedder = embedder_of(trained, constants(trained, data, picture))
    references = build(
        trained.model,
        trained.params,
        data.inputs,
        data.label,
        [f"scene-{i}" for i in range(len(data))],
        [f"handwriting-{i}" for i in data.source],
        store_inputs=store_inputs,
        readout=None if trained.model.readout else linearised(trained.model),
        embed=embedder.embed,
        embedder=embedder.name,
    )
    return Opened(references, embedder)


def open_references(trained: Trained, folder: Path) -> Opened:
    """Loads a reference set and the embedder it was built with.

    Raises:
      UserError: there is none, it is damaged, or it belongs to another model.
    """
    if not folder.is_dir():
        raise UserError(
            f"references: {folder} does not exist; build it: python -m experiments.r2t2.references --run RUN "
            f"--readout {trained.config.readout} --output {folder}"
        )
    try:
        references = load(folder)
        references.check_model(trained.model, trained.fingerprint)
        embedder = embedder_of(trained, json.loads((folder / "picture.json").read_text()))
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"references: {error}") from None
    if embedder.name != references.embedder:
        raise UserError(f"references: {folder / 'picture.json'} is not that of the set; build the set again.")
    return Opened(references, embedder)


def constants(trained: Trained, data: scenes.Scenes, share: float) -> dict:
    """Returns what fixes the embedder: scale of the picture's statistics, and how much they count."""
    measured = Standardised.measured(_statistics, trained.params, data.inputs)
    return {"center": measured.center, "spread": measured.spread, "share": share}


def embedder_of(trained: Trained, constants: dict) -> Embedder:
    """Returns the embedder with these constants."""
    picture = Standardised(view=_statistics, center=tuple(constants["center"]), spread=tuple(constants["spread"]))
    return beside(trained.model.embed, picture, constants["share"])


def _statistics(params, inputs):
    return picture_statistics(jnp.asarray(inputs["image"]).astype(jnp.float32) / 255)


def report(references: ReferenceSet, forecast: Forecast) -> str:
    """Says what leaving each reference out once shows."""
    order = np.argsort(forecast.values)
    worst = ", ".join(f"{references.ids[i]} ({forecast.values[i]:+.2f})" for i in order[:3])
    best = ", ".join(f"{references.ids[i]} ({forecast.values[i]:+.2f})" for i in order[::-1][:3])
    harmful = (forecast.values < 0).mean()
    return (
        f"left out one by one: the frozen model answers {forecast.accuracy:.1%}; descent would mend "
        f"{forecast.mended:.2%} and break {forecast.broken:.2%} of the answers\n"
        f"worth most to others: {best} nats; least: {worst}; {harmful:.0%} do more harm than good"
    )


if __name__ == "__main__":
    cli.run(main, ReferencesConfig)
