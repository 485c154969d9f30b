"""Serving notices ground that validation has not seen, and stays calm on the ground that it has."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesanet_jax.monitor import SolverDriftWarning, SolverRange, check_solves, solver_range
from pallas_kernels import SolveReport


def made_up(seed: int, rows: int = 8, length: int = 256, **changes) -> SolveReport:
    """Steps about 5 and residuals about 1e-5, of 2 layers and 3 heads; changed in one head of one layer."""
    rng = np.random.default_rng(seed)
    shape = (2, rows, length, 3)
    steps, residual = rng.poisson(5, shape), 1e-5 * rng.lognormal(0, 0.3, shape)
    steps[1, :, :, 2] += changes.get("steps", 0)
    residual[0, :, :, 1] *= changes.get("residual", 1)
    return SolveReport(jnp.asarray(steps), jnp.asarray(residual))


RANGE = solver_range(made_up(seed) for seed in range(4))


def test_a_range_holds_all_but_a_thousandth_of_validation():
    seen = [made_up(seed) for seed in range(4)]
    for field in ("num_steps", "residual"):
        values = np.concatenate([getattr(report, field) for report in seen], axis=1)
        beyond = np.mean(values > getattr(RANGE, field)[:, None, None, :], axis=(1, 2))
        assert (beyond <= 1e-3).all() and (beyond > 0).any()


def test_what_is_like_validation_raises_no_alarm():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(100, 200):
            assert check_solves(RANGE, made_up(seed)) == []
            assert check_solves(RANGE, made_up(seed, rows=1, length=3)) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"steps": 5},
            r"^mesa layer 1, head 2: \d+ % of 2048 tokens took more than 1\d steps, 0.1 % did in validation",
        ),
        ({"residual": 3.0}, r"^mesa layer 0, head 1: \d+ % of 2048 tokens were left with residuals above \d.\de-05"),
        ({"residual": np.nan}, r"^mesa layer 0, head 1: 100 % of 2048 tokens were left with residuals above"),
    ],
)
def test_a_head_that_leaves_its_range_is_named(changes, words):
    with pytest.warns(SolverDriftWarning, match=words):
        (text,) = check_solves(RANGE, made_up(7, **changes))
    assert text.endswith("the text is unlike it.")


def test_padding_neither_hides_an_alarm_nor_widens_the_range():
    def padded(report: SolveReport) -> SolveReport:
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 9 * x.shape[2]), (0, 0))), report)

    found = solver_range(padded(made_up(seed)) for seed in range(4))
    jax.tree.map(np.testing.assert_array_equal, found, RANGE)
    with pytest.warns(SolverDriftWarning, match=r"% of 2048 tokens took more"):
        check_solves(RANGE, padded(made_up(7, steps=5)))


def test_a_few_tokens_beyond_are_no_alarm_and_a_few_more_are():
    steps = np.full((1, 1, 100, 1), 4)
    for beyond, alarms in ((5, 0), (40, 1)):
        steps[0, 0, :beyond] = 9
        report = SolveReport(jnp.asarray(steps), jnp.zeros(steps.shape))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert len(check_solves(SolverRange(np.array([[5]]), np.array([[1.0]])), report)) == alarms


def test_reports_of_another_model_and_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match=r"heads of the report are \(2, 3\), of the range \(1, 3\); take both"):
        check_solves(jax.tree.map(lambda x: x[:1], RANGE), made_up(0))
    with pytest.raises(ValueError, match="of the report are None"):
        check_solves(RANGE, None)
    with pytest.raises(ValueError, match=r"false_alarm=0 must lie in \(0, 1\)"):
        check_solves(RANGE, made_up(0), false_alarm=0)
    with pytest.raises(ValueError, match="30 tokens were solved; give reports of 1000 at least"):
        solver_range([made_up(0, rows=1, length=30)])
    with pytest.raises(ValueError, match="0 tokens were solved"):
        solver_range([None])


def test_a_range_is_taken_of_reports_alone_and_of_finite_residuals():
    with pytest.raises(TypeError, match="solver_range: reports is a SolveReport; pass a sequence of them"):
        solver_range(made_up(0))
    with pytest.raises(TypeError, match="solver_range: reports hold a tuple; pass SolveReports"):
        solver_range([tuple(made_up(0))])
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="solver_range: 2048 residuals are not finite; take the range of a model"):
            solver_range([made_up(0), made_up(1, residual=bad)])
