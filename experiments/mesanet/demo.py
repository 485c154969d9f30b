"""Train a MesaNet and a Transformer of the same size on real text and draw where in the context each wins.

Takes about five minutes on two CPU cores and downloads nothing: the text is the source of Python's standard library,
split by file. Draws the report of `experiments.mesanet.curves`, lets the MesaNet write a few lines, prints one table.
"""

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments import cli, logbook
from experiments.loop import train
from experiments.mesanet.curves import CurvesConfig
from experiments.mesanet.curves import main as draw_curves
from experiments.mesanet.pretrain import TINY
from experiments.mesh import MeshConfig, make_mesh
from experiments.runs import RunConfig, open_run
from mesanet_jax import MesaNet, MesaNetConfig, SamplingConfig, SolverConfig, generate
from mesanet_jax.model import num_parameters

PROMPT = "import os\nimport sys\n\n\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo does.

    Attributes:
      output: folder for runs and pictures; a demo in it is replaced.
      num_steps: optimizer steps of each model.
      num_documents: held-out files that the curves are computed on.
      cpu_devices: devices to split the CPU into, each with half of the batch.
      seed: initial parameters and sampling.
    """

    output: Path = Path("demo/mesanet")
    num_steps: int = 300
    num_documents: int = 64
    cpu_devices: int = 2
    seed: int = 0

    def __post_init__(self):
        for field in ("num_steps", "num_documents", "cpu_devices"):
            if getattr(self, field) < 1:
                raise ValueError(f"DemoConfig: {field}={getattr(self, field)} must be at least 1.")


def main(config: DemoConfig) -> None:
    """Trains both models, draws, samples, and prints where everything is."""
    begin = time.monotonic()
    mesh = MeshConfig(cpu_devices=config.cpu_devices)
    make_mesh(mesh)  # the CPU is split once, before anything uses it
    runs = {
        name: dataclasses.replace(
            TINY,
            output=config.output / name,
            model=model,
            mesh=mesh,
            num_steps=config.num_steps,
            save_every=config.num_steps,
            log_every=50,
            seed=config.seed,
        )
        for name, model in models().items()
    }
    curves = CurvesConfig(
        runs=tuple(run.output for run in runs.values()),
        output=str(config.output / "curves"),
        num_documents=config.num_documents,
        sweep_documents=8,
        step_budgets=(0, 2, 5, 30),
        tolerances=(1e-1, 1e-2, 1e-4),
        seed=config.seed,
    )
    cli.start_anew(config.output)
    for run in runs.values():
        train(run)
    draw_curves(curves)
    print(f"\nThe MesaNet goes on from {PROMPT!r}:\n{sample(config.output / 'mesanet', PROMPT, config.seed)}\n")
    print(_table(runs))
    print(f"\nDone in {(time.monotonic() - begin) / 60:.1f} minutes. Open {config.output / 'curves' / 'report.html'}")


def models() -> dict[str, MesaNetConfig]:
    """A MesaNet, and a Transformer with slightly wider feed-forward layers so that both have as many parameters."""
    mesanet = dataclasses.replace(TINY.model, solver=SolverConfig(max_steps=30, tolerance=1e-2))
    transformer = dataclasses.replace(mesanet, pattern=("attention",))
    missing = size(mesanet) - size(transformer)
    wider = round(missing / (3 * transformer.model_dim * transformer.num_layers))
    return {
        "mesanet": mesanet,
        "transformer": dataclasses.replace(transformer, mlp_dim=transformer.feed_forward_dim + wider),
    }


def size(config: MesaNetConfig) -> int:
    """Returns the number of parameters."""
    return num_parameters(jax.eval_shape(MesaNet(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))


def sample(run: Path, prompt: str, seed: int, num_tokens: int = 240) -> str:
    """Returns the prompt and what the model of a run makes of it."""
    trained = open_run(run)
    ids = jnp.asarray([[trained.tokenizer.bos, *trained.tokenizer.encode(prompt)]], jnp.int32)
    sampling = SamplingConfig(temperature=0.8, top_p=0.95)
    key = jax.random.key(seed)
    tokens = generate(trained.model, trained.params, ids, num_tokens=num_tokens, key=key, sampling=sampling)
    return prompt + trained.tokenizer.decode(tokens[0])


def _table(runs: dict[str, RunConfig]) -> str:
    """One row per model, from its logbook."""
    rows = [f"{'model':<14}{'parameters':>12}{'held-out nats/byte':>20}{'tokens/s':>10}{'solver steps':>14}"]
    for name, run in runs.items():
        entries = logbook.read(run.output / "log.jsonl")
        speeds = sorted(e["tokens_per_second"] for e in entries)
        steps = entries[-1]["solver_steps"]
        rows.append(
            f"{name:<14}{size(run.model):>12,}{entries[-1]['held_out_loss']:>20.4f}{speeds[len(speeds) // 2]:>10,.0f}"
            f"{'-' if steps is None else f'{steps:.1f}':>14}"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    cli.run(main, DemoConfig)
