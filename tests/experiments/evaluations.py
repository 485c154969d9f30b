"""Made-up evaluations of re-routing, with as much fixed and broken as a test asks for."""

import dataclasses

import numpy as np

from experiments.r2t2.results import Ablation, Case, NeighborCase, Point, Results, Row, Steps
from r2t2_jax.evaluate import Paired

EXPERTS = ("picture", "edges", "chroma", "digit", "layout", "language")
CONDITIONS = ("clean", "noise", "stripes", "blur", "washed out")
TEMPLATES = ("read digit", "digit colour", "colour of shape", "shape of colour", "count shape", "is there", "left of")
SIZE, SEEDS = 600, 3


def answers(fixed, broken, seed=0, right=0.77):
    """Answers before, 77 % of them right, of which given shares are then fixed and broken."""
    draw = np.random.default_rng(seed)
    order = draw.permutation(SIZE)
    before = np.arange(SIZE) < round(right * SIZE)
    after = before.copy()
    after[: round(broken * SIZE)] = False
    after[SIZE - round(fixed * SIZE) :] = True
    return Paired(before[order], after[order])


def made_up_row(section, name, fixed, broken, forecast=None, **options):
    seeds = tuple(answers(fixed + 0.002 * i, broken, seed=i, **options) for i in range(SEEDS))
    return Row(section=section, name=name, note=f"what {name} is", seeds=seeds, rerouted=0.64, forecast=forecast)


def made_up_case(kind, i, truth="red", image=True):
    rng = np.random.default_rng(i)
    before = truth if kind == "broken" else "blue"
    after = truth if kind == "fixed" else "blue"
    routing = rng.dirichlet(np.ones(6) / 2, size=10)
    neighbors = tuple(
        NeighborCase(
            rng.integers(0, 256, (32, 32, 3)).astype(np.uint8) if image and j else None,
            f"which colour has the circle ({j})?", "red", 0.9 - 0.05 * j, 0.3 - 0.03 * j, routing[j + 2],
        )
        for j in reversed(range(8))
    )  # fmt: skip
    return Case(
        id=f"{kind} {i}", kind=kind, image=rng.integers(0, 256, (32, 32, 3)).astype(np.uint8), condition="noise",
        question="what is the colour of the <circle>?", truth=truth, before=before, after=after,
        base_routing=routing[0], routing=routing[1], neighbors=neighbors,
        sentence="Weight moved from edges to chroma & picture, because its neighbours are answered better there.",
    )  # fmt: skip


def made_up_results(fixed=0.05, broken=0.02, **changes):
    rng = np.random.default_rng(0)
    accuracy = 0.77 + 0.03 * (1 - np.exp(-np.arange(11) / 3))
    point = [Point(f"setting {i}", 0.01 * i - 0.01, 0.01 * i - 0.02, 0.01 * i, 0.01 * i + 0.01, 0.02) for i in range(5)]
    fields = {
        "rows": (
            made_up_row("strategies", "amortised, guarded", fixed, broken, forecast=0.031),
            made_up_row("strategies", "descent, paper's settings", 0.028, 0.014, forecast=0.01),
            made_up_row("strategies", "kernel regression", 0.02, 0.02),
            made_up_row("same labels", "best per template", 0.03, 0.015),
            made_up_row("same labels", "random neighbours", 0.02, 0.11),
            made_up_row("same labels", "neighbours' vote", 0.03, 0.38),
            made_up_row("oracles", "oracle", 0.115, 0.002),
            made_up_row("oracles", "existence oracle", 0.18, 0.0),
            made_up_row("oracles", "null oracle", 0.30, 0.01, right=0.08),
        ),
        "experts": EXPERTS,
        "transitions": {kind: rng.poisson(3, (6, 6)) for kind in ("fixed", "broken")},
        "steps": tuple(
            Steps(name=name, accuracy=accuracy - 0.005 * i, fixed=accuracy - 0.76, broken=np.full(11, 0.01))
            for i, name in enumerate(("descent, all references", "descent"))
        ),
        "ablations": tuple(
            Ablation(title=title, note="how many", points=tuple(point[: 3 + i % 3]))
            for i, title in enumerate(("neighbours", "kernel", "learning rate"))
        ),
        "by_condition": tuple(
            (c, t, 0.7, 0.7 + 0.005 * (i - 1) + 0.01 * (j - 2), 100 + i)
            for i, c in enumerate(CONDITIONS)
            for j, t in enumerate(TEMPLATES)
        ),
        "latency": (("embedding", 0.2, 0.25), ("nearest neighbours", 0.1, 0.125), ("strategy", 0.5, 0.625)),
        "cases": tuple(made_up_case(*one) for one in (("broken", 1), ("fixed", 2), ("abstained", 3), ("kept", 4))),
        "choices": (("amortised, guarded", "2", "hidden 64, dropout 0.1"),),
    }
    return Results(**(fields | changes))


def chosen(fixed, broken, **changes):
    """Results whose chosen strategy fixes and breaks these shares, the same in every seed."""
    results = made_up_results(**changes)
    seeds = tuple(answers(fixed, broken, seed=i) for i in range(SEEDS))
    return dataclasses.replace(results, rows=(dataclasses.replace(results.rows[0], seeds=seeds), *results.rows[1:]))
