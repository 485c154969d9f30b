"""The nested preconditioner: its factor against dense inverses, its steps over the study, and what it falls back to."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import LAW, NESTED, assert_near

from experiments.bench import torture
from pallas_kernels import MesaState, SolverConfig, mesa_chunk
from pallas_kernels.mesa_chunk import algebra, chunks, nested, positive, solver, xla
from pallas_kernels.mesa_chunk.cases import STUDY, Case, Inputs, adversary, sample
from pallas_kernels.mesa_chunk.contract import zero_state

SIDES = ("forward", "adjoint")
MOST_STEPS = {1e-4: 9, 1e-6: 12}
BUDGET = 100  # far above what any token takes, so that tokens stop by themselves


class Study:
    """A row of the study at three chunks, with its dense systems in float64."""

    def __init__(self, case: Case):
        inputs = sample(dataclasses.replace(case, length=min(case.length, 192)))
        self.operands = tuple(jnp.asarray(x, jnp.float32) for x in inputs[:6])
        self.dout = jnp.asarray(np.random.default_rng(1).normal(size=inputs.v.shape), jnp.float32)
        _, k, _, log_decay, beta, ridge = (np.asarray(x, np.float64) for x in self.operands)
        self.matrices = np.empty((k.shape[1], *[k.shape[-1]] * 2))
        kk = np.zeros(self.matrices.shape[1:])
        for t in range(len(self.matrices)):
            kk = np.exp(log_decay[0, t, 0]) * kk + beta[0, t, 0] * np.outer(k[0, t, 0], k[0, t, 0])
            self.matrices[t] = kk + np.diag(ridge[0])

    def solve(self, **choices) -> dict[str, "Solved"]:
        """Solves both sides with these choices of a SolverConfig."""
        found = jax.device_get(_solve(self.operands, self.dout, config=dataclasses.replace(FACTOR, **choices)))
        return {side: self._judge(*map(_tokens_first, found[side])) for side in SIDES}

    def _judge(self, num_steps, reported, rhs, solution) -> "Solved":
        size = np.linalg.norm(rhs, axis=-1)
        size = np.where(size, size, 1)
        error = rhs - np.einsum("tij,tj->ti", self.matrices, np.float64(solution))
        products = np.einsum("tij,tj->ti", np.abs(self.matrices), np.abs(solution))
        residual, rounding = (np.linalg.norm(x, axis=1) / size for x in (error, products * 2.0**-24))
        return Solved(num_steps[:, 0], reported[:, 0], residual, rounding)


class Solved(NamedTuple):
    """[t] each: what the solver says, and what is true."""

    num_steps: np.ndarray
    reported: np.ndarray
    residual: np.ndarray  # relative, in float64
    rounding: np.ndarray  # what one rounding of float32 of each entry of A x makes of a residual


@functools.cache
def study(name: str) -> Study:
    return Study(STUDY[name])


@functools.partial(jax.jit, static_argnames="config")
def _solve(operands, dout, *, config: SolverConfig):
    q, k, v, log_decay, beta, ridge = operands
    starts = jnp.zeros(q.shape[:2], jnp.int32)
    tiles, _ = xla.cut(k, v, log_decay, beta, ridge, zero_state(q, v), starts, xla.XlaConfig())

    def solve_tile(inputs):
        q, dout, tile, expected = inputs
        factor = xla.factor_tile(tile, expected, config)
        sides = zip(SIDES, (q, algebra.adjoint_rhs(dout, tile)), strict=True)
        return {side: (rhs, nested.solve_tile(rhs, tile, factor, config)) for side, rhs in sides}

    columns = (chunks.to_columns(x, tiles.k.shape[-2]) for x in (q, dout))
    arrays = *columns, tiles, nested.expected_decays(tiles.decays)
    found = jax.lax.map(solve_tile, jax.tree.map(lambda x: x[:, 0, 0], arrays))
    sizes = {side: jax.vmap(solver.relative_size)(found[side][1].residual, found[side][0]) for side in SIDES}
    return {side: (x.num_steps, sizes[side], rhs, x.solution) for side, (rhs, x) in found.items()}


def _tokens_first(x: np.ndarray) -> np.ndarray:
    """[n, k, c] -> [t, k]."""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1])


each_row = pytest.mark.parametrize("name", STUDY)


@each_row
@pytest.mark.parametrize("tolerance", MOST_STEPS)
def test_steps_are_few_and_the_reported_residual_is_true_in_every_row_of_the_study(name, tolerance):
    for side, found in study(name).solve(max_steps=BUDGET, tolerance=tolerance).items():
        assert found.num_steps.max() <= MOST_STEPS[tolerance], side
        allowed = NESTED["floor"] * found.rounding
        assert (np.abs(found.reported - found.residual) <= allowed).all(), side
        assert (found.residual <= tolerance + allowed).all(), side


@each_row
def test_without_a_tolerance_a_residual_ends_at_what_float32_allows(name):
    for side, found in study(name).solve(max_steps=30).items():
        assert (found.residual <= NESTED["floor"] * found.rounding).all(), side


@pytest.mark.parametrize("precision", ["bfloat16_3x", "bfloat16"])
def test_low_precision_reaches_the_same_tolerance(precision):
    for name in ("silu, 0.95-1", "low_rank, 1"):
        for side, found in study(name).solve(max_steps=BUDGET, tolerance=1e-4, precision=precision).items():
            assert found.num_steps.max() <= 12, (name, side)
            allowed = NESTED["floor"] * found.rounding
            assert (np.abs(found.reported - found.residual) <= allowed).all(), (name, side)
            assert (found.residual <= 1e-4 + allowed).all(), (name, side)


def test_nested_steps_are_a_fraction_of_plain_ones_once_the_gates_are_known():
    steps = {
        preconditioner: study("low_rank, 1").solve(max_steps=BUDGET, tolerance=1e-4, preconditioner=preconditioner)
        for preconditioner in ("none", "nested")
    }
    for side in SIDES:
        nested_steps, plain = (steps[name][side].num_steps[64:].max() for name in ("nested", "none"))
        assert 6 * nested_steps <= plain


rng = np.random.default_rng(0)
STARTS = {  # of documents, among 24 tokens of a chunk of keys of size 8
    "one document": (),
    "a document of its own": (0,),
    "three documents, the first began before": (9, 15),
    "three documents, the last of one token": (0, 10, 23),
}


class Pack:
    """A random tile of 24 tokens in float64, and its systems written out."""

    def __init__(self, starts: tuple[int, ...], gates=(0.95, 1.0), ridge: float = 0.5):
        k, roots = rng.normal(size=(24, 8)), rng.normal(size=(8, 3))
        self.starts = np.isin(np.arange(24), starts).astype(np.int32)
        self.gates = np.where(self.starts, 0.0, np.log(rng.uniform(*gates, size=24)))
        self.k, self.kk, self.beta = k, roots @ roots.T, rng.uniform(size=24)
        self.ridge = ridge * rng.uniform(1, 3, size=8)

    def tile(self, dtype=jnp.float64) -> algebra.Tile:
        k, kk, beta, ridge, gates = (
            jnp.asarray(x, dtype) for x in (self.k, self.kk, self.beta, self.ridge, self.gates)
        )
        decays = algebra.cumulative_decays(gates[None], jnp.asarray(self.starts)[None])
        return algebra.Tile(k, k, beta[None], decays, kk, kk, ridge[:, None])

    def matrices(self) -> np.ndarray:
        """H_t + Lambda [t, k, k], by the recurrence."""
        found, kk = [], self.kk
        for start, gate, beta, k in zip(self.starts, self.gates, self.beta, self.k, strict=True):
            kk = (0 if start else np.exp(gate) * kk) + beta * np.outer(k, k)
            found.append(kk + np.diag(self.ridge))
        return np.stack(found)

    def since_start(self) -> np.ndarray:
        """Log of the decay [t] to a token from before its document's first token in the chunk."""
        documents = np.cumsum(self.starts)
        return np.array([self.gates[(documents == documents[t]) & (np.arange(24) <= t)].sum() for t in range(24)])

    def frozen(self) -> np.ndarray:
        """The systems M_t [t, k, k]: those of the tokens as their document's beginning saw them, but for the ridge."""
        documents = np.cumsum(self.starts)
        anchors = np.exp(-np.where(documents == documents[0], EXPECTED, math.log(nested.UNKNOWN_KEPT)) / 2)
        memories = self.matrices() - np.diag(self.ridge)
        return np.exp(-self.since_start())[:, None, None] * memories + anchors[:, None, None] * np.diag(self.ridge)


FACTOR = SolverConfig(tolerance=0.0)


EXPECTED = -0.4  # log of the decay over the chunk that the factor is made for


def factor_of(tile: algebra.Tile, expected: float = EXPECTED) -> nested.Factor:
    factor = xla.factor_tile(tile, jnp.full((1, 1), expected, tile.k.dtype), FACTOR)
    assert factor is not None
    return factor


@pytest.mark.parametrize("name", STARTS)
def test_the_factor_inverts_the_frozen_system_of_every_token_of_every_document(name):
    pack = Pack(STARTS[name])
    with jax.enable_x64(True):
        tile = pack.tile()
        factor = factor_of(tile)
        assert factor.usable.all()
        search = jax.jit(lambda r: nested.pose_tile(r, tile, factor, FACTOR)[1][0].search(r)[0])
        # the r-th unit vector at all tokens at once gives the r-th column of all inverses
        inverses = np.stack([search(np.repeat(unit[:, None], 24, axis=1)) for unit in np.eye(8)], axis=1)
    assert_near(inverses.transpose(2, 0, 1), np.linalg.inv(pack.frozen()), NESTED["factor"])


@pytest.mark.parametrize("name", STARTS)
def test_the_image_of_a_direction_is_the_matrix_times_it_without_a_product(name):
    pack = Pack(STARTS[name])
    with jax.enable_x64(True):
        tile, r = pack.tile(), rng.normal(size=(8, 24))
        (method, _) = nested.pose_tile(r, tile, factor_of(tile), FACTOR)[1]
        direction, frozen = method.search(jnp.asarray(r))
        image = method.image(direction, frozen)
        expected = np.einsum("tij,jt->it", pack.matrices(), direction) * np.exp(-pack.since_start())
    assert_near(image, expected, NESTED["factor"])
    assert_near(method.scale[0], np.exp(-pack.since_start()), LAW["float64"])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_one_step_solves_where_nothing_is_forgotten(dtype):
    pack, rhs = Pack((), gates=(1.0, 1.0)), rng.normal(size=(8, 24))
    with jax.enable_x64(True):
        tile = pack.tile(dtype)
        factor = factor_of(tile, expected=0.0)
        found = nested.solve_tile(jnp.asarray(rhs, dtype), tile, factor, dataclasses.replace(FACTOR, max_steps=1))
        solution = np.float64(found.solution)
    error = np.linalg.norm(rhs - np.einsum("tij,jt->it", pack.matrices(), solution), axis=0)
    assert (error <= NESTED["one step"][dtype] * np.linalg.norm(rhs, axis=0)).all()


def test_no_token_takes_more_steps_than_the_budget():
    tile, rhs = Pack((9,)).tile(jnp.float32), jnp.asarray(rng.normal(size=(8, 24)), jnp.float32)
    found = nested.solve_tile(rhs, tile, factor_of(tile), dataclasses.replace(FACTOR, max_steps=2))
    assert found.num_steps.max() == 2


def spoiled(kind: str) -> tuple[algebra.Tile, nested.Factor]:
    """A tile whose factor is of no use, and that factor."""
    tile = Pack(()).tile(jnp.float32)
    if kind == "expected to forget too fast":
        return tile, factor_of(tile, expected=math.log(nested.LEAST_KEPT) - 0.1)
    if kind == "state is NaN":
        tile = tile._replace(kk=jnp.full_like(tile.kk, jnp.nan))
    if kind == "state is not positive":
        tile = tile._replace(kk=-10 * jnp.eye(8))
    if kind == "ridge vanishes":
        keys, ridge = tile.k[:1] * jnp.ones_like(tile.k) * 1e6, jnp.full_like(tile.ridge, 1e-30)
        tile = tile._replace(ridge=ridge, kk=tile.kk * 1e12, k=keys)
    return tile, factor_of(tile)


SPOILED = ("expected to forget too fast", "state is NaN", "state is not positive", "ridge vanishes")


@pytest.mark.parametrize("kind", SPOILED)
def test_a_factor_of_no_use_is_marked_and_holds_zeros(kind):
    _, factor = spoiled(kind)
    assert not factor.usable.any() and not factor.rows.any() and not factor.inverse.any()


@pytest.mark.parametrize("kind", SPOILED)
def test_without_a_factor_a_tile_is_solved_as_if_there_had_been_none(kind):
    (tile, factor), rhs = spoiled(kind), jnp.asarray(rng.normal(size=(8, 24)), jnp.float32)
    found = nested.solve_tile(rhs, tile, factor, FACTOR)
    expected = nested.solve_tile(rhs, tile, None, FACTOR)
    np.testing.assert_array_equal(found.solution, expected.solution)
    np.testing.assert_array_equal(found.num_steps, expected.num_steps)
    assert np.isfinite(found.solution).all()


@pytest.mark.parametrize("n", [1, 7, 33, 65, 100])
def test_inverses_and_roots_by_blocks_are_those_of_dense_decompositions(n):
    a = rng.normal(size=(2, n, n))
    a = a @ a.swapaxes(-1, -2) / n + np.eye(n)
    with jax.enable_x64(True):
        inverse, root = positive.inverse(jnp.asarray(a)), positive.inverse_root(jnp.asarray(a))
    assert_near(inverse, np.linalg.inv(a), NESTED["factor"])
    assert_near(root, np.linalg.inv(np.linalg.cholesky(a)), NESTED["factor"])
    assert not np.triu(root, 1).any()


def test_a_matrix_that_is_not_positive_gives_nan_unless_rounding_made_it_so():
    a = np.diag(np.float32([2, -1e-9]))
    assert np.isnan(positive.inverse(a)).any() and np.isnan(positive.inverse_root(a)).any()
    np.testing.assert_array_equal(positive.inverse_root(a, least=1.0)[1, 1], 1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16_3x"])
def test_a_memory_of_a_few_directions_many_times_over_is_solved_no_worse_than_by_plain_steps(precision):
    """Conditions of 1e4 and more: thousands of tokens that repeat a handful of keys and are never forgotten."""
    pack, rhs = Pack((), gates=(1.0, 1.0)), jnp.asarray(rng.normal(size=(8, 24)), jnp.float32)
    for scale in (1e2, 1e4, 1e6 if precision == "float32" else 1e4):
        pack.kk = scale * np.outer(pack.k[0], pack.k[0])
        tile = pack.tile(jnp.float32)
        ours = nested.solve_tile(rhs, tile, factor_of(tile), dataclasses.replace(FACTOR, precision=precision))
        plain = nested.solve_tile(rhs, tile, None, SolverConfig(tolerance=0.0, preconditioner="none"))
        worst, other = (solver.relative_size(x.residual, rhs).max() for x in (ours, plain))
        assert worst <= max(4 * other, 1e-6), scale


def test_a_factor_that_is_not_positive_costs_one_step_and_no_accuracy():
    tile, rhs = Pack(()).tile(jnp.float32), jnp.asarray(rng.normal(size=(8, 24)), jnp.float32)
    wrong = factor_of(tile)._replace(inverse=-jnp.eye(8), rows=jnp.zeros((24, 8)))
    ours, ridge = (nested.solve_tile(rhs, tile, factor, FACTOR) for factor in (wrong, None))
    assert_near(ours.solution, ridge.solution, LAW["float32"])
    assert (ours.num_steps > 1).all() and (ours.num_steps <= ridge.num_steps + 8).all()


def test_what_a_method_has_made_worse_than_it_was_the_next_begins_anew():
    tile, rhs = Pack(()).tile(jnp.float32), jnp.asarray(rng.normal(size=(8, 24)), jnp.float32)
    problem, methods, _ = nested.pose_tile(rhs, tile, None, FACTOR)
    grown = jnp.where(jnp.arange(24) < 5, -9.0, 0.5)
    found = solver.Solution(grown * problem.rhs, grown * problem.rhs, jnp.full((1, 24), 3))
    rounds = solver.first_round(problem, methods[0], found)
    assert not rounds.found.solution[:, :5].any()
    np.testing.assert_array_equal(rounds.found.residual[:, :5], problem.rhs[:, :5])
    np.testing.assert_array_equal(rounds.found.solution[:, 5:], found.solution[:, 5:])
    assert rounds.wanted.all()


def test_keys_whose_products_overflow_leave_their_tokens_unsolved_but_finite():
    tile, rhs = Pack(()).tile(jnp.float32), jnp.asarray(rng.normal(size=(8, 24)), jnp.float32)
    tile = tile._replace(k=1e20 * tile.k)
    found = nested.solve_tile(rhs, tile, factor_of(tile), FACTOR)
    assert not found.solution.any()
    assert_near(found.residual, rhs, LAW["float32"])


def test_tokens_that_forgot_more_than_expected_take_steps_on_the_matrix():
    pack = Pack((14,), gates=(0.6, 0.7))
    tile, rhs = pack.tile(jnp.float32), jnp.asarray(rng.normal(size=(8, 24)), jnp.float32)
    (shared, _) = nested.pose_tile(rhs, tile, factor_of(tile), FACTOR)[1]
    np.testing.assert_array_equal(shared.wanted[0], np.isin(np.arange(24), [0, 1, 2, *range(14, 19)]))
    assert (np.isfinite(shared.scale) & (shared.scale >= 1)).all()
    ours = nested.solve_tile(rhs, tile, factor_of(tile), FACTOR).solution
    assert_near(
        ours,
        nested.solve_tile(rhs, tile, None, SolverConfig(tolerance=0.0, preconditioner="none")).solution,
        LAW["float32"],
    )


def test_the_decay_expected_of_a_chunk_is_that_of_the_tokens_before_it_in_its_document():
    gates = np.log([0.9] * 4 + [0.8, 0.8, 1.0, 0.7] + [0.5] * 4 + [1.0, 0.6, 0.6, 0.6])
    starts = np.zeros(16, np.int32)
    starts[[6, 12]] = 1  # in the middle of the second chunk of four, and at the front of the last
    decays = algebra.cumulative_decays(jnp.float32(gates).reshape(4, 1, 4), jnp.asarray(starts).reshape(4, 1, 4))
    unknown = math.log(nested.UNKNOWN_KEPT)
    expected = [unknown, 4 * math.log(0.9), 2 * math.log(0.7), unknown]
    np.testing.assert_allclose(nested.expected_decays(decays)[:, 0, 0], expected, rtol=LAW["float32"])


@pytest.mark.parametrize(("c", "k", "serves"), [(1, 4, False), (2, 16, True), (15, 128, False), (16, 128, True)])
def test_a_factor_is_made_only_for_chunks_long_enough_to_pay_for_it(c, k, serves):
    assert nested.serves(c, k) == serves


# dtype of the inputs, precision of the steps, heads, tokens: 72 tokens are two chunks
TORTURE = [
    ("float32", "float32", 400, 72),
    ("bfloat16", "bfloat16_3x", 800, 16),
    ("float32", "bfloat16", 800, 16),
]


@pytest.mark.parametrize(("dtype", "precision", "heads", "length"), TORTURE)
def test_no_value_and_no_gradient_is_ever_nan_or_infinite(dtype, precision, heads, length):
    config = dataclasses.replace(FACTOR, precision=precision)
    assert torture.all_finite(adversary(heads, length, 8), dtype, config).all()


def test_what_is_not_finite_would_have_been_seen():
    heads = adversary(800, 16, 8)
    heads.inputs.q[3, 0, 5] = np.nan
    finite = torture.all_finite(heads, "float32", dataclasses.replace(FACTOR, precision="bfloat16"))
    assert np.flatnonzero(~finite).tolist() == [3]


LOOSE = dataclasses.replace(FACTOR, tolerance=1e-1)  # leaves enough unsolved to see on what the way there depends


def few_steps(inputs: Inputs, segment_ids: np.ndarray, config: SolverConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns outputs and steps taken."""
    arrays, state = [jnp.asarray(x, jnp.float32) for x in inputs[:6]], MesaState(*map(jnp.float32, inputs[6:]))
    out, _, report = mesa_chunk(*arrays, state, segment_ids=segment_ids, solver=config, with_report=True)
    return np.asarray(out), np.asarray(report.num_steps)


def disturbed(inputs: Inputs, name: str, tokens: slice) -> Inputs:
    """The same with other values in one array at these tokens."""
    changed = getattr(inputs, name).copy()
    changed[:, tokens] = -2.0 if name == "log_decay" else 3 * changed[:, tokens] + 1
    return inputs._replace(**{name: changed})


HISTORY = sample(dataclasses.replace(STUDY["low_rank, 0.95-1"], length=160, key_dim=32, value_dim=32))
precisions = pytest.mark.parametrize("config", [LOOSE, dataclasses.replace(LOOSE, precision="bfloat16")], ids=str)
sequences = pytest.mark.parametrize("name", ["k", "v", "log_decay", "beta"])


@precisions
@sequences
def test_no_output_depends_on_later_tokens_not_even_in_what_is_left_unsolved(name, config):
    ids, last = np.zeros((1, 160), np.int32), 107  # of the tokens before, in the middle of the second of three chunks
    before, num_steps = few_steps(HISTORY, ids, config)
    after, same_steps = few_steps(disturbed(HISTORY, name, slice(last, None)), ids, config)
    np.testing.assert_array_equal(before[:, :last], after[:, :last])
    np.testing.assert_array_equal(num_steps[:, :last], same_steps[:, :last])
    assert (before[:, last:] != after[:, last:]).any()
    assert (num_steps[:, :last] < 6).all(), "converged, so that nothing could have been seen"


def test_a_memory_that_cannot_be_factored_changes_nothing_in_the_next_document():
    ids = np.repeat([[0, 1]], [10, 150], axis=1)
    hopeless = HISTORY._replace(kk=-1e3 * np.eye(32)[None, None] * np.ones_like(HISTORY.kk))
    (before, _), (after, _) = (few_steps(x, ids, LOOSE) for x in (HISTORY, hopeless))
    np.testing.assert_array_equal(before[:, 10:], after[:, 10:])


@precisions
@sequences
def test_no_output_depends_on_other_documents_not_even_in_what_is_left_unsolved(name, config):
    ids = np.repeat([[0, 1, 2]], [50, 60, 50], axis=1)
    before, _ = few_steps(HISTORY, ids, config)
    after, _ = few_steps(disturbed(HISTORY, name, slice(0, 50)), ids, config)
    np.testing.assert_array_equal(before[:, 50:], after[:, 50:])
    assert (before[:, :50] != after[:, :50]).any()
