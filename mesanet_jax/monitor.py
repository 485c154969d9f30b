"""Are systems still solved as in validation? Tokens that take more steps, or are solved worse, are on new ground."""

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from pallas_kernels import SolveReport

BEYOND = 1e-3  # share of the tokens of validation that lie beyond the range
TOLERATED = 1e-2  # share of later ones that may
ROUNDING = 1 + 1e-3  # of residuals, which other batches add up in another order


class SolverDriftWarning(UserWarning):
    """More tokens than by chance took more steps, or were left with larger residuals, than in validation."""


class SolverRange(NamedTuple):
    """What 99.9 % of the tokens of validation stayed within, for each layer and head [l, h]."""

    num_steps: np.ndarray
    residual: np.ndarray


def solver_range(reports: Iterable[SolveReport]) -> SolverRange:
    """Returns the range of reports [l, b, t, h] of `apply_with_report` on held-out text.

    Raises:
      ValueError: there are no reports, or too few tokens to say where the last thousandth begins.
    """
    reports = [report for report in reports if report is not None]
    tokens = sum(report.num_steps.shape[1] * report.num_steps.shape[2] for report in reports)
    if tokens < 1 / BEYOND:
        raise ValueError(f"solver_range: {tokens} tokens were solved; give reports of {round(1 / BEYOND)} at least.")

    def edge(field: str) -> np.ndarray:
        together = [np.moveaxis(np.asarray(getattr(report, field)), 3, 1) for report in reports]  # [l, h, b, t]
        values = np.concatenate([x.reshape(*x.shape[:2], -1) for x in together], axis=-1)
        return np.quantile(values, 1 - BEYOND, axis=-1, method="higher")

    return SolverRange(edge("num_steps"), edge("residual"))


def check_solves(expected: SolverRange, report: SolveReport, *, false_alarm: float = 1e-6) -> list[str]:
    """Warns if the solves of a call have left the range of validation; returns what the warnings say.

    For each layer and head, a Chernoff bound says how likely so many tokens beyond the range are where 1 % are. Tokens
    of one text are alike, so alarms are a little more frequent than `false_alarm` says.

    Args:
      expected: the range.
      report: arrays [l, b, t, h] of `apply_with_report` or `generate`.
      false_alarm: largest probability of a warning, all layers and heads together, while 1 % of the tokens are beyond.

    Raises:
      ValueError: the report is of a model with other layers or heads.
    """
    layers, rows, length, heads = report.num_steps.shape
    if expected.num_steps.shape != (layers, heads):
        raise ValueError(
            f"check_solves: the report is of {layers} layers of {heads} heads, the range of "
            f"{expected.num_steps.shape[0]} of {expected.num_steps.shape[1]}; take both from one model."
        )
    number, texts = rows * length, []
    enough = np.log(2 * layers * heads / false_alarm)
    said = {"num_steps": "took more than {:.0f} steps", "residual": "were left with residuals above {:.1e}"}
    for field, words in said.items():
        edge = getattr(expected, field)
        # what is no number is beyond every range
        inside = np.asarray(getattr(report, field)) <= edge[:, None, None, :] * ROUNDING
        beyond = np.sum(~inside, axis=(1, 2))
        surprise = number * _divergence(beyond / number)
        for layer, head in np.argwhere(surprise > enough):
            texts.append(
                f"mesa layer {layer}, head {head}: {100 * beyond[layer, head] / number:.0f} % of {number} tokens "
                f"{words.format(edge[layer, head])}, 0.1 % did in validation; the text is unlike it."
            )
    for text in texts:
        warnings.warn(text, SolverDriftWarning, stacklevel=2)
    return texts


def _divergence(share: np.ndarray) -> np.ndarray:
    """Nats per token that a share above the tolerated one is worth as evidence; 0 below it."""
    share = np.maximum(share, TOLERATED)
    rest = np.where(share < 1, (1 - share) * np.log(np.maximum(1 - share, 1e-300) / (1 - TOLERATED)), 0)
    return share * np.log(share / TOLERATED) + rest
