"""All that decisions rest on, together: model, references, memory and settings; saved beside the ledger for replay."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from experiments.r2t2.folder import Trained, write
from experiments.r2t2.references import Opened
from r2t2_jax import records
from r2t2_jax.amortised import AmortisedConfig, AmortisedRouter
from r2t2_jax.decision import Decisions
from r2t2_jax.fingerprint import fingerprint
from r2t2_jax.neighbors import NeighborConfig
from r2t2_jax.reroute import RerouteConfig, reroute
from r2t2_jax.shapes import Readout
from r2t2_jax.strategies import Memory, StrategyConfig, Thresholds

PARTS = {"readout": Readout, "amortised": AmortisedRouter, "thresholds": Thresholds}  # of Memory, of several arrays
MEMORY = "memory.safetensors"


class Desk(NamedTuple):
    """All that a decision rests on."""

    trained: Trained
    opened: Opened
    memory: Memory
    config: RerouteConfig

    def decide(self, inputs, active: bool = True) -> Decisions:
        """Re-routes inputs."""
        return reroute(
            self.trained.model,
            self.trained.params,
            self.memory,
            inputs,
            self.config,
            embedder=self.opened.embedder,
            active=active,
        )

    def hashes(self) -> records.Hashes:
        """Returns what the records of these decisions refer to."""
        settings = dataclasses.asdict(self.config)
        return records.Hashes(
            model=self.trained.fingerprint,
            references=self.opened.references.fingerprint,
            config=fingerprint({"settings": settings, "memory": self.memory}),
            embedder=self.opened.embedder.name,
        )

    def record(self, decisions: Decisions, inputs, ids: list[str]) -> list[records.Record]:
        """Returns the ledger's records."""
        return records.records(
            decisions,
            input_ids=ids,
            input_hashes=records.hash_inputs(inputs),
            reference_ids=self.opened.references.ids,
            experts=self.trained.model.experts,
            answers=self.trained.model.answers,
            strategy=self.config.strategy,
            hashes=self.hashes(),
            config=dataclasses.asdict(self.config),
        )


def save_desk(folder: Path, desk: Desk, num_scenes: int) -> None:
    """Saves what was learned from the references, so that a replay rests on the same bits."""
    leaves = {}
    for name, part in desk.memory._asdict().items():
        parts = part._asdict() if name in PARTS else {"": part}
        leaves |= {f"{name}.{key}": np.asarray(array) for key, array in parts.items()}
    header = {"config": json.dumps(dataclasses.asdict(desk.config)), "num_scenes": str(num_scenes)}
    write(folder / MEMORY, safetensors.numpy.save(leaves, header))


def load_desk(trained: Trained, opened: Opened, folder: Path) -> tuple[Desk, int]:
    """Returns the desk that the decisions in a folder were made at, and how many scenes were asked about.

    Raises:
      OSError, ValueError: there is none, or it is damaged.
    """
    try:
        with safetensors.safe_open(folder / MEMORY, framework="np") as file:
            header = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        memory = {}
        for name in Memory._fields:
            own = {key.partition(".")[2]: array for key, array in arrays.items() if key.partition(".")[0] == name}
            memory[name] = PARTS[name](**own) if name in PARTS else own[""]
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MEMORY} is damaged ({error}); decide again into a new folder.") from None
    return Desk(trained, opened, Memory(**memory), _config(json.loads(header["config"]))), int(header["num_scenes"])


def _config(fields: dict) -> RerouteConfig:
    parts = {"neighbors": NeighborConfig, "settings": StrategyConfig, "amortised": AmortisedConfig}
    return RerouteConfig(**fields | {name: part(**fields[name]) for name, part in parts.items()})
