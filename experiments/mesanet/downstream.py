"""Ask a trained run the tasks of lm-eval, grouped as the paper does: global, local and recall.

  python -m experiments.mesanet.downstream runs/mesa                                  the paper's three groups
  python -m experiments.mesanet.downstream runs/mesa --tasks lambada_openai recall    a task and a group
  python -m experiments.mesanet.downstream runs/mesa --tasks mine --include tasks/    a task file of your own

Global tasks need a long context, local ones do not, recall tasks ask for what the context says (arXiv 2506.05233,
appendix L). Needs `pip install -c constraints.txt -e ".[eval]"`; lm-eval fetches the data of its own tasks (storycloze
must be asked for by hand), files of your own may point to local ones. A member of a group that cannot be loaded is left
out, and the table says so. Interrupted, the same command goes on with the next task.
"""

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
import yaml

from experiments import cli
from experiments.cli import UserError
from experiments.runs import Run, open_run
from experiments.sweep import opened
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
BOOTSTRAPS = 1000  # resamples behind standard errors that have no formula


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownstreamConfig:
    """Which model is asked what.

    Attributes:
      run: folder of a trained run.
      tasks: names of tasks of lm-eval or of task files, and of the groups global, local and recall.
      include: folder of task files (YAML); empty means there are none.
      output: folder of the results, which the same command goes on in; None means "downstream" in the run's folder.
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
    output: Path | None = None
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
    error: float | None  # standard error, if lm-eval gives one
    number: int  # documents


def main(config: DownstreamConfig) -> None:
    """Asks the tasks that have not been asked yet and writes the table."""
    try:
        from lm_eval.tasks import TaskManager

        from experiments.harness import HarnessModel
    except ModuleNotFoundError:
        raise UserError('tasks: lm-eval is not installed; pip install -c constraints.txt -e ".[eval]".') from None
    run = _with_tolerance(open_run(config.run), config.tolerance)
    config = dataclasses.replace(config, output=config.output or config.run / "downstream")
    check_files(config.include, config.tasks)
    manager = TaskManager(include_path=config.include or None)
    names, left_out = loadable(manager, expanded(config.tasks, manager.all_subtasks), config.tasks)
    model = HarnessModel(run, batch_size=config.batch_size, prompt_length=config.prompt_length, seed=config.seed)
    with opened(config) as sweep:
        cells = [{"task": name, "step": run.step} for name in names]
        entries = sweep.compute(cells, partial(ask, model, manager, config))
        text = table({entry["cell"]["task"]: Answer(*(entry[x] for x in Answer._fields)) for entry in entries})
        text += "".join(f"\nLeft out: {line}\n" for line in left_out)
        (sweep.folder / "table.md").write_text(text)
    print(f"\n{text}\nanswers one by one: {config.output}")


def ask(model, manager, config: DownstreamConfig, *, task: str, step: int) -> dict[str, Any]:
    """Asks one task; keeps lm-eval's results and every question and answer beside the cells."""
    from lm_eval.evaluator import simple_evaluate

    del step
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval would fork a process that has threads
    limits = {"limit": config.limit or None, "num_fewshot": None if config.num_fewshot < 0 else config.num_fewshot}
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), config.seed)
    found: Any = simple_evaluate(
        model, tasks=[task], task_manager=manager, bootstrap_iters=BOOTSTRAPS, **limits, **seeds
    )
    samples = found["samples"].get(task, [])
    assert config.output is not None
    (config.output / f"{task}.jsonl").write_text("".join(json.dumps(one, default=str) + "\n" for one in samples))
    kept = {name: value for name, value in found.items() if name not in ("samples", "pretty_env_info")}
    (config.output / f"{task}.json").write_text(json.dumps(kept, indent=2, default=str))
    return answered(found["results"][task], samples, model.num_tokens)._asdict()


def loadable(manager, names: Sequence[str], asked: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the tasks that can be asked, and why other members of a group cannot.

    Raises:
      UserError: a task that is asked for by its name cannot.
    """
    fine, left_out = [], []
    for name in names:
        reason = _obstacle(manager, name)
        if reason and name in asked:
            raise UserError(f"tasks: {name} cannot be asked ({reason}); mend its file or fetch its data first.")
        if reason:
            left_out.append(f"{name} ({reason})")
        else:
            fine.append(name)
    if not fine:
        raise UserError(f"tasks: none can be asked: {'; '.join(left_out)}.")
    return fine, left_out


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
        text = file.read_text(encoding="utf-8", errors="replace")
        if not any(task in text for task in tasks):
            continue
        try:
            task = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise UserError(f"include: {file} is not YAML ({str(error).splitlines()[0]}); mend or move it.") from None
        if isinstance(task, dict) and task.get("task") in tasks and "include" not in task:
            missing = _missing(task)
            if missing:
                raise UserError(f"include: {file} has no {missing}; add that field.")


def answered(numbers: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], num_tokens) -> Answer:
    """Returns one number for a task: the first of METRICS that it has, or else its own first; its first filter's.

    Args:
      numbers: of lm-eval, "metric,filter" to value.
      samples: of lm-eval: questions and answers one by one.
      num_tokens: takes context and continuation, returns how many tokens the latter is.
    """
    own: dict[str, tuple[Any, Any]] = {}
    for key, value in numbers.items():
        if "," in key and "_stderr," not in key:
            own.setdefault(key.partition(",")[0], (value, numbers.get(key.replace(",", "_stderr,", 1))))
    right = [_per_token(sample, num_tokens) for sample in samples if len(sample["arguments"]) > 1]
    if right and None not in right:
        shares = np.asarray(right, np.float64)
        own[PER_TOKEN] = float(shares.mean()), float(shares.std() / math.sqrt(max(len(shares) - 1, 1)))
    metric = next(metric for metric in (*METRICS, *own) if metric in own)
    mean, error = own[metric]
    number = len({sample["doc_id"] for sample in samples})
    return Answer(metric, float(mean), error if isinstance(error, float) else None, number)


def table(answers: Mapping[str, Answer]) -> str:
    """Returns a Markdown table: tasks by group, each group with its mean."""
    rest = tuple(name for name in answers if not any(name in group for group in GROUPS.values()))
    lines = ["| task | metric | value | documents |", "|---|---|---|---|"]
    for group, names in {**GROUPS, "other": rest}.items():
        own = {name: answers[name] for name in names if name in answers}
        lines += [f"| {name} | {one.metric} | {_shown(one)} | {one.number:,} |" for name, one in own.items()]
        if len(own) > 1 and group != "other":
            mean = np.mean([one.mean * _scale(one) for one in own.values()])
            lines.append(f"| **{group}** | mean of {len(own)} of {len(names)} | **{mean:.2f}** | |")
    return "\n".join([*lines, "", "Shares in per cent, with 95 % intervals."]) + "\n"


def _shown(one: Answer) -> str:
    error = "" if one.error is None else f" ± {1.96 * one.error * _scale(one):.2f}"
    return f"{one.mean * _scale(one):.2f}{error}"


def _scale(one: Answer) -> float:
    """Per cent of what is a share; some metrics of lm-eval are in per cent already."""
    return 100.0 if one.metric in METRICS and one.mean <= 1 else 1.0


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


def _obstacle(manager, name: str) -> str | None:
    """Why a task cannot be asked: what its files or its data lack shows before anything is."""
    from experiments.harness import unknown_choices

    try:
        (task,) = manager.load([name])["tasks"].values()
    except Exception as error:  # whatever other people's files and data sets raise
        return (str(error).splitlines() or [type(error).__name__])[0]
    for needed in ("UNSAFE_CODE", "MULTIMODAL"):
        if getattr(task, needed, False):
            return f"it is {needed.lower().replace('_', ' ')}, which is not done here"
    choices = task.get_config("generation_kwargs") if task.get_config("output_type") == "generate_until" else None
    unknown = unknown_choices(choices or {})
    return f"its generation_kwargs ask for {unknown[0]}" if unknown else None


def _missing(task: Mapping[str, Any]) -> str | None:
    """The first field that a task file lacks."""
    if task.keys() & {"class", "use_prompt"}:  # Python code, or a collection of prompts, has the rest
        return None
    if not task.keys() & {"dataset_path", "custom_dataset"}:
        return "dataset_path"
    if not task.keys() & {"test_split", "validation_split"}:
        return "test_split"
    needed = [*NEEDED, *(["doc_to_choice"] if task.get("output_type") == "multiple_choice" else [])]
    return next((field for field in needed if field not in task), None)


class _Loader(yaml.SafeLoader):
    """Reads past `!function` and the like, which name Python code that only lm-eval may load."""


_Loader.add_multi_constructor("!", lambda loader, tag, node: tag)


if __name__ == "__main__":
    cli.run(main, DownstreamConfig)
