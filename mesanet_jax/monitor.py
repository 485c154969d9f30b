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
    """Returns the range of reports [l, b, t, h] of `apply_with_report` on held-out text; padding does not count.

    Raises:
      TypeError: reports are no sequence of them.
      ValueError: there are no reports, too few tokens to say where the last thousandth begins, or residuals that are
        not finite.
    """
    if isinstance(reports, SolveReport):  # it is a tuple, too
        raise TypeError("solver_range: reports is a SolveReport; pass a sequence of them.")
    reports = [report for report in reports if report is not None]
    for report in reports:
        if not isinstance(report, SolveReport):
            raise TypeError(f"solver_range: reports hold a {type(report).__name__}; pass SolveReports.")
    steps, residual, solved = _by_head(reports) if reports else (np.zeros((1, 1, 0)),) * 3
    if spoilt := np.sum(~np.isfinite(residual)):
        raise ValueError(
            f"solver_range: {spoilt} residuals are not finite; take the range of a model whose solves all are."
        )
    fewest = int(solved.sum(axis=-1).min())
    if fewest < 1 / BEYOND:
        raise ValueError(f"solver_range: {fewest} tokens were solved; give reports of {round(1 / BEYOND)} at least.")

    def edge(values: np.ndarray) -> np.ndarray:
        return np.nanquantile(np.where(solved, values, np.nan), 1 - BEYOND, axis=-1, method="higher")

    return SolverRange(edge(steps), edge(residual))


def check_solves(expected: SolverRange, report: SolveReport, *, false_alarm: float = 1e-6) -> list[str]:
    """Warns if the solves of a call have left the range of validation; returns what the warnings say.

    For each layer and head, a Chernoff bound says how likely so many tokens beyond the range are where 1 % are. Tokens
    of one text are alike, so alarms are a little more frequent than `false_alarm` says. Padding does not count.

    Args:
      expected: the range.
      report: arrays [l, b, t, h] of `apply_with_report` or `generate_with_report`.
      false_alarm: largest probability of a warning, all layers and heads together, while 1 % of the tokens are beyond.

    Raises:
      ValueError: the report is of a model with other layers or heads, or with none that solve; false_alarm is no
        probability.
    """
    if not 0 < false_alarm < 1:
        raise ValueError(f"check_solves: false_alarm={false_alarm} must lie in (0, 1).")
    shape = None if report is None else (report.num_steps.shape[0], report.num_steps.shape[3])
    if expected.num_steps.shape != shape:
        raise ValueError(
            f"check_solves: layers and heads of the report are {shape}, of the range {expected.num_steps.shape}; take "
            f"both from one model."
        )
    steps, residual, solved = _by_head([report])
    number = solved.sum(axis=-1)  # [l, h]
    enough, texts = np.log(2 * number.size / false_alarm), []
    for values, edge, words in (
        (steps, expected.num_steps, "took more than {:.0f} steps"),
        (residual, expected.residual, "were left with residuals above {:.1e}"),
    ):
        # what is no number is beyond every range
        beyond = np.sum(solved & ~(values <= edge[..., None] * ROUNDING), axis=-1) / np.maximum(number, 1)
        for layer, head in np.argwhere(number * _divergence(beyond) > enough):
            texts.append(
                f"mesa layer {layer}, head {head}: {100 * beyond[layer, head]:.0f} % of {number[layer, head]} tokens "
                f"{words.format(edge[layer, head])}, 0.1 % did in validation; the text is unlike it."
            )
    for text in texts:
        warnings.warn(text, SolverDriftWarning, stacklevel=2)
    return texts


def _by_head(reports: list[SolveReport]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps and residuals [l, h, tokens], and which tokens had anything to solve: padding takes and leaves nothing."""

    def together(field: str) -> np.ndarray:
        arrays = [np.moveaxis(np.asarray(getattr(report, field)), 3, 1) for report in reports]  # [l, h, b, t]
        return np.concatenate([x.reshape(*x.shape[:2], -1) for x in arrays], axis=-1)

    steps, residual = together("num_steps"), together("residual")
    return steps, residual, (steps > 0) | (residual != 0)


def _divergence(share: np.ndarray) -> np.ndarray:
    """Nats per token that a share above the tolerated one is worth as evidence; 0 below it."""
    share = np.maximum(share, TOLERATED)
    rest = np.where(share < 1, (1 - share) * np.log(np.maximum(1 - share, 1e-300) / (1 - TOLERATED)), 0)
    return share * np.log(share / TOLERATED) + rest
