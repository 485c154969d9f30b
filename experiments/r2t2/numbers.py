"""The numbers of an evaluation as CSV files, the ones that the page shows."""

import csv
import io
from collections.abc import Iterable, Sequence

from experiments.r2t2.results import Case, Results, Row
from experiments.r2t2.summary import Summary, by_seed, whole

Lines = Iterable[Sequence[object]]


def csv_files(results: Results) -> dict[str, str]:
    """Returns name to content; shares and accuracies are between 0 and 1."""
    return {
        "methods.csv": _csv(_METHODS, _methods(results)),
        "ablations.csv": _csv(
            ("ablation", "setting", "gain", "low", "high", "fixed", "broken"),
            ((ablation.title, *point) for ablation in results.ablations for point in ablation.points),
        ),
        "steps.csv": _csv(("strategy", "step", "accuracy", "fixed", "broken"), _steps(results)),
        "transitions.csv": _csv(("kind", "before", "after", "count"), _transitions(results)),
        "conditions.csv": _csv(
            ("condition", "template", "accuracy before", "accuracy after", "change", "inputs"),
            ((*names, before, after, after - before, n) for *names, before, after, n in results.by_condition),
        ),
        "latency.csv": _csv(("part", "milliseconds per input", "share"), results.latency),
        "cases.csv": _csv(*_cases(results)),
    }


_METHODS = (
    "section", "method", "seed", "inputs", "accuracy before", "accuracy after", "gain", "low", "high", "fixed",
    "broken", "McNemar p", "share of oracle gain", "rerouted", "forecast",
)  # fmt: skip


def _methods(results: Results) -> Lines:
    """A line per seed without what is known of all seeds together alone, and one of all."""
    for row in results.rows:
        for i, seed in enumerate(by_seed(row, results)):
            yield _method(row, str(i), seed, ("", ""))
        forecast = "" if row.forecast is None else row.forecast
        yield _method(row, "all", whole(row, results), (row.rerouted, forecast))


def _method(row: Row, seed: str, total: Summary, rest: tuple) -> Sequence[object]:
    *numbers, recovered, count = total
    return (row.section, row.name, seed, count, *numbers, "" if recovered != recovered else recovered, *rest)


def _steps(results: Results) -> Lines:
    for curve in results.steps:
        columns = zip(curve.accuracy, curve.fixed, curve.broken, strict=True)
        yield from ((curve.name, step, *map(float, values)) for step, values in enumerate(columns))


def _transitions(results: Results) -> Lines:
    for kind, counts in results.transitions.items():
        for before, line in zip(results.experts, counts.tolist(), strict=True):
            yield from ((kind, before, after, n) for after, n in zip(results.experts, line, strict=True))


def _cases(results: Results) -> tuple[Sequence[str], Lines]:
    """A line per case, with as many columns of neighbours as the one that has most."""
    most = max((len(case.neighbors) for case in results.cases), default=0)
    parts = ("question", "answer", "similarity", "weight", "routing")
    header = [
        *("case", "kind", "condition", "question", "truth", "before", "after"),
        *(f"{when} {expert}" for when in ("before", "after") for expert in results.experts),
        *(f"neighbour {i + 1} {part}" for i in range(most) for part in parts),
        "sentence",
    ]
    return header, (_case(case, most * len(parts)) for case in results.cases)


def _case(case: Case, width: int) -> Sequence[object]:
    cells: list[object] = []
    for neighbor in sorted(case.neighbors, key=lambda neighbor: -neighbor.weight):
        routing = " ".join(f"{weight:.4f}" for weight in neighbor.routing)
        cells += [neighbor.question, neighbor.answer, float(neighbor.similarity), float(neighbor.weight), routing]
    said = (case.id, case.kind, case.condition, case.question, case.truth, case.before, case.after)
    routes = (*case.base_routing.tolist(), *case.routing.tolist())
    return (*said, *routes, *cells, *[""] * (width - len(cells)), case.sentence)


def _csv(header: Sequence[str], lines: Lines) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *lines])
    return text.getvalue()
