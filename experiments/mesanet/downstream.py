"""Ask a trained run the tasks of lm-eval, grouped as the paper does: global, local and recall.

  python -m experiments.mesanet.downstream runs/mesa                                  the paper's three groups
  python -m experiments.mesanet.downstream runs/mesa --tasks lambada_openai recall    a task and a group
  python -m experiments.mesanet.downstream runs/mesa --tasks mine --include tasks/    a task file of your own

Global tasks need a long context, local ones do not, recall tasks ask for what the context says (arXiv 2506.05233,
appendix L). Needs `pip install -c constraints.txt -e ".[eval]"`; lm-eval fetches the data of its own tasks, files of
your own may point to local ones.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
import yaml

from experiments import cli
from experiments.cli import UserError
from experiments.curves.material import drafted, room_in
from experiments.runs import Run, open_run
from mesanet_jax import MesaNet

GROUPS = {
    "global": ("lambada_openai", "hellaswag", "race"),
    "local": (
        "piqa",
        "winogrande",
        "arc_easy",
        "arc_challenge",
        "social_iqa",
        "boolq",
        "openbookqa",
        "storycloze_2016",
    ),
    "recall": ("swde", "squad_completion", "fda", "triviaqa", "nq_open", "drop"),
}
PER_TOKEN = "acc_per_token"  # the option whose loss per token is least, as in the paper
METRICS = (PER_TOKEN, "acc", "contains", "exact_match", "em", "f1")  # the first that a task has stands for it
NEEDED = ("doc_to_text", "doc_to_target")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownstreamConfig:
    """Which model is asked what.

    Attributes:
      run: folder of a trained run.
      tasks: names of tasks of lm-eval or of task files, and of the groups global, local and recall.
      include: folder of task files (YAML); empty means there are none.
      output: folder of the results; empty means "downstream" in the folder of the run.
      limit: documents that are asked of each task; 0 asks all.
      num_fewshot: examples before each question; -1 leaves it to the task.
      tolerance: relative residual to stop the solver at; 0 leaves the run's own setting.
      prompt_length: tokens of a prompt that an answer is written for, the last ones; 0 keeps all. The paper keeps 2000.
      batch_size: texts the model reads at once.
      seed: of examples and of answers that are drawn at random.
    """

    run: tyro.conf.Positional[Path]
    tasks: tuple[str, ...] = tuple(GROUPS)
    include: str = ""
    output: str = ""
    limit: int = 0
    num_fewshot: int = -1
    tolerance: float = 0.0
    prompt_length: int = 2000
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self):
        least = {"limit": 0, "num_fewshot": -1, "prompt_length": 0, "batch_size": 1, "seed": 0}
        for field, low in least.items():
            if getattr(self, field) < low:
                raise ValueError(f"DownstreamConfig: {field}={getattr(self, field)} must be at least {low}.")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"DownstreamConfig: tolerance={self.tolerance} must lie in [0, 1).")
        if not self.tasks:
            raise ValueError("DownstreamConfig: tasks is empty; name at least one.")


class Answer(NamedTuple):
    """How a task went."""

    metric: str
    mean: float
    error: float  # standard error, NaN where lm-eval gives none
    number: int  # documents


def main(config: DownstreamConfig) -> None:
    """Asks the tasks and writes what came of them."""
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager

        from experiments.harness import HarnessModel
    except ModuleNotFoundError:
        raise UserError('tasks: lm-eval is not installed; pip install -c constraints.txt -e ".[eval]".') from None
    run = _with_tolerance(open_run(config.run), config.tolerance)
    check_files(config.include, config.tasks)
    manager = TaskManager(include_path=config.include or None)
    names = expanded(config.tasks, manager.all_tasks)
    for name in names:
        _load(manager, name)
    model = HarnessModel(run, batch_size=config.batch_size, prompt_length=config.prompt_length, seed=config.seed)
    output = Path(config.output or config.run / "downstream")
    limits = {"limit": config.limit or None, "num_fewshot": None if config.num_fewshot < 0 else config.num_fewshot}
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), config.seed)
    with drafted(output) as draft:
        found: Any = simple_evaluate(model, tasks=names, task_manager=manager, **limits, **seeds)
        text = table(answered(found["results"], found["samples"], model.num_tokens))
        with room_in(output):
            _write(draft, found, text)
    print(f"\n{text}\nanswers one by one: {output}")


def expanded(tasks: Sequence[str], known: Sequence[str]) -> list[str]:
    """Returns names of tasks, groups taken apart.

    Raises:
      UserError: lm-eval does not know one.
    """
    names = [name for task in tasks for name in GROUPS.get(task, (task,))]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *GROUPS], n=1)
            meant = f"did you mean {near[0]}?" if near else "give its file with --include."
            raise UserError(f"tasks: lm-eval has no task {name}; {meant}")
    return list(dict.fromkeys(names))


def check_files(folder: str, tasks: Sequence[str]) -> None:
    """Checks the task files of a folder that are asked for, as far as they stand alone.

    Raises:
      UserError: a file cannot be read, or lacks a field.
    """
    if folder and not Path(folder).is_dir():
        raise UserError(f"include: {folder} is not a folder; give that of the task files.")
    for file in sorted(Path(folder).rglob("*.yaml")) if folder else ():
        try:
            task = yaml.load(file.read_text(encoding="utf-8"), _Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"include: {file} is not YAML ({str(error).splitlines()[0]}); mend or move it.") from None
        if isinstance(task, dict) and task.get("task") in tasks and "include" not in task:
            missing = _missing(task)
            if missing:
                raise UserError(f"include: {file} has no {missing}; add that field.")


def answered(results: Mapping[str, Mapping[str, Any]], samples: Mapping[str, list], num_tokens) -> dict[str, Answer]:
    """Returns one number for each task, by the first of METRICS that it has.

    Args:
      results: of lm-eval, by task.
      samples: of lm-eval, by task: questions and answers one by one.
      num_tokens: takes context and continuation, returns how many tokens the latter is.
    """
    found = {}
    for name, numbers in results.items():
        own = {
            key.partition(",")[0]: (value, numbers.get(key.replace(",", "_stderr,", 1)))
            for key, value in numbers.items()
            if "," in key and "_stderr," not in key
        }
        asked = samples.get(name, ())
        right = [_per_token(sample, num_tokens) for sample in asked if len(sample["arguments"]) > 1]
        if right and None not in right:
            shares = np.asarray(right, np.float64)
            own[PER_TOKEN] = float(shares.mean()), float(shares.std() / math.sqrt(max(len(shares) - 1, 1)))
        metric = next((metric for metric in (*METRICS, *own) if metric in own), None)
        if metric:
            mean, error = own[metric]
            number = len({sample["doc_id"] for sample in asked})
            found[name] = Answer(metric, float(mean), error if isinstance(error, float) else math.nan, number)
    return found


def table(answers: Mapping[str, Answer]) -> str:
    """Returns a Markdown table: tasks by group, each group with its mean."""
    rest = tuple(name for name in answers if not any(name in group for group in GROUPS.values()))
    lines = ["| task | metric | value | documents |", "|---|---|---|---|"]
    for group, names in {**GROUPS, "other": rest}.items():
        own = {name: answers[name] for name in names if name in answers}
        for name, one in own.items():
            error = "" if math.isnan(one.error) else f" ± {_shown(one.metric, 1.96 * one.error)}"
            lines.append(f"| {name} | {one.metric} | {_shown(one.metric, one.mean)}{error} | {one.number:,} |")
        if len(own) > 1 and group != "other":
            mean = np.mean([one.mean for one in own.values()])
            lines.append(f"| **{group}** | mean of {len(own)} of {len(names)} | **{100 * mean:.2f}** | |")
    return "\n".join([*lines, "", "Shares in per cent, with 95 % intervals."]) + "\n"


def _shown(metric: str, value: float) -> str:
    return f"{100 * value:.2f}" if metric in METRICS else f"{value:.4g}"


def _per_token(sample: Mapping[str, Any], num_tokens) -> bool | None:
    """Whether the right option has the least loss per token; None if the question has no one right option."""
    target, options = sample["target"], sample["filtered_resps"]
    if not isinstance(target, int) or not 0 <= target < len(options) or len(options) != len(sample["arguments"]):
        return None
    losses = [
        -option[0] / max(num_tokens(*asked), 1) for option, asked in zip(options, sample["arguments"], strict=True)
    ]
    return int(np.argmin(losses)) == target


def _with_tolerance(run: Run, tolerance: float) -> Run:
    if not tolerance:
        return run
    if "mesa" not in run.config.model.pattern:
        raise UserError(f"tolerance: {run.name} has no mesa layer that could stop; leave it out.")
    solver = dataclasses.replace(run.config.model.solver, tolerance=tolerance)
    return run._replace(model=MesaNet(dataclasses.replace(run.config.model, solver=solver)))


def _load(manager, name: str) -> None:
    """Loads a task before anything is asked: what its files or its data lack shows here."""
    try:
        manager.load([name])
    except Exception as error:  # whatever other people's files and data sets raise
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"tasks: {name} cannot be loaded ({said}); mend its file or fetch its data first.") from None


def _write(folder: Path, found: dict[str, Any], text: str) -> None:
    """The table, lm-eval's own results, and a file of questions and answers for each task."""
    (folder / "table.md").write_text(text)
    kept = {name: value for name, value in found.items() if name not in ("samples", "pretty_env_info")}
    (folder / "results.json").write_text(json.dumps(kept, indent=2, default=str))
    for name, samples in found["samples"].items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one, default=str) + "\n" for one in samples))


def _missing(task: Mapping[str, Any]) -> str | None:
    """The first field that a task file lacks."""
    if not task.keys() & {"dataset_path", "custom_dataset"}:
        return "dataset_path"
    if not task.keys() & {"test_split", "validation_split"}:
        return "test_split"
    needed = [*NEEDED, *(["doc_to_choice"] if task.get("output_type") == "multiple_choice" else [])]
    return next((field for field in needed if field not in task), None)


class _Loader(yaml.SafeLoader):
    """Reads past `!function`, which names Python code that only lm-eval may load."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


if __name__ == "__main__":
    cli.run(main, DownstreamConfig)
