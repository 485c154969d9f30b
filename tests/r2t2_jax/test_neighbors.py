"""Search equals brute force, ties included; weights are those of the kernels, however far the neighbours are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2t2_jax.neighbors import (
    BLOCK,
    KERNELS,
    SCALE_FREE,
    NeighborConfig,
    leave_one_out,
    median_bandwidth,
    nearest,
    nearest_over_mesh,
    weigh,
)
from tests import tolerances
from tests.tolerances import assert_near

K = 3
SHORTCUT = 2 * K * BLOCK  # more references than that go through blocks
_nearest = jax.jit(nearest, static_argnums=2)
SCALED = [name for name in KERNELS if name not in SCALE_FREE]


def whole_numbers(count, seed=0):
    """Vectors whose products are exact and often equal."""
    return np.random.default_rng(seed).integers(-1, 2, size=(count, 4)).astype(np.float32)


def unit(count, seed=0, width=8, dtype=np.float32):
    x = np.random.default_rng(seed).normal(size=(count, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)


def brute_force(queries, references, k, excluded=None):
    """The k best of everyone, the first of equals first."""
    product = queries @ references.T
    if excluded is not None:
        product[excluded] = -np.inf
    order = np.argsort(-product, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(product, order, 1)


def assert_same(found, expected):
    np.testing.assert_array_equal(found[1], expected[1])
    exists = np.isfinite(expected[1])
    np.testing.assert_array_equal(np.asarray(found[0])[exists], expected[0][exists])


@pytest.mark.parametrize("count", [2, SHORTCUT, SHORTCUT + 1])
def test_the_nearest_are_those_of_brute_force_and_of_equals_the_first(count):
    queries, references = whole_numbers(20), whole_numbers(count, 1)
    expected = brute_force(queries, references, K)
    assert count < 10 or (np.diff(expected[1]) == 0).any()
    assert_same(_nearest(queries, references, K), expected)


@pytest.mark.parametrize("count", [50, SHORTCUT + 1])
def test_excluded_pairs_are_no_neighbours(count):
    queries, references = whole_numbers(20), whole_numbers(count, 1)
    excluded = np.random.default_rng(2).random((20, count)) < 0.5
    excluded[0] = True
    excluded[1, 2:] = True
    found = _nearest(queries, references, K, excluded=excluded)
    assert_same(found, brute_force(queries, references, K, excluded))
    assert (np.asarray(found[0]) < count).all()
    assert np.isneginf(np.asarray(found[1])[0]).all() and np.isneginf(np.asarray(found[1])[1, 2:]).all()


@pytest.mark.parametrize("count", [4, 2 * SHORTCUT + 2])
def test_references_shared_by_two_devices_give_the_neighbours_of_one(count):
    mesh = jax.make_mesh((2,), ("r",), axis_types=(jax.sharding.AxisType.Auto,))
    queries, references = whole_numbers(20), whole_numbers(count, 1)
    found = nearest_over_mesh(queries, references, K, mesh=mesh, axis="r")
    assert_same(found, brute_force(queries, references, K))


def test_devices_that_cannot_share_evenly_refuse():
    mesh = jax.make_mesh((2,), ("r",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="51 references do not divide over 2 devices of axis 'r'; leave 1 of them out"):
        nearest_over_mesh(whole_numbers(2), whole_numbers(51), K, mesh=mesh, axis="r")


_weigh = jax.jit(weigh, static_argnums=2)


def weighed(cosine, bandwidth=1.0, **fields):
    """Neighbours 0, 1, ... of these cosines."""
    cosine = jnp.asarray(np.atleast_2d(cosine))
    indices = jnp.broadcast_to(jnp.arange(cosine.shape[1]), cosine.shape)
    return jax.device_get(_weigh(indices, cosine, NeighborConfig(**fields), jnp.asarray(bandwidth, cosine.dtype)))


def cosines(distance):
    return 1 - np.asarray(distance) ** 2 / 2


def test_a_ball_holds_those_within_reach_and_may_be_empty():
    found = weighed([cosines([0.1, 0.5, 0.9]), cosines([0.7, 0.8, 0.9])], epsilon=0.6)
    np.testing.assert_array_equal(found.indices, [[0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(np.isfinite(found.distance), [[True, True, False], [False] * 3])
    assert (found.weights[0, :2] > 0).all() and found.weights[0, 2] == 0 and (found.weights[1] == 0).all()
    np.testing.assert_array_equal(np.isneginf(found.similarity), ~np.isfinite(found.distance))


def closed_form(name, d, cosine):
    """Kernels as textbooks write them."""
    return {
        "gaussian": np.exp(-(d**2) / 2),
        "matern_1_2": np.exp(-d),
        "matern_3_2": (1 + 3**0.5 * d) * np.exp(-(3**0.5) * d),
        "matern_5_2": (1 + 5**0.5 * d + 5 * d**2 / 3) * np.exp(-(5**0.5) * d),
        "linear": np.maximum(cosine, 0),
        "polynomial": ((1 + cosine) / 2) ** 3,
    }[name]


@pytest.mark.parametrize("name", KERNELS)
def test_weights_are_the_kernel_of_the_distance_scaled_to_sum_one(name):
    distance = np.linspace(0.05, 1.9, 12)
    expected = closed_form(name, distance / 0.7, cosines(distance))
    with jax.enable_x64(True):
        found = weighed(cosines(distance), 0.7, kernel=name)
    assert found.weights.dtype == np.float64
    assert_near(found.weights[0], expected / expected.sum(), tolerances.LAW["float64"], name)
    assert_near(found.distance[0], distance, tolerances.LAW["float64"], "distance")


@pytest.mark.parametrize("name", KERNELS)
def test_farther_is_never_heavier(name):
    assert (np.diff(weighed(np.linspace(1, -1, 40), 0.5, kernel=name).weights[0]) <= 0).all()


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "linear"])  # cut at 0, it is not a kernel
def test_kernels_are_positive_definite(name):
    x = unit(40, width=3, dtype=np.float64)
    cosine = np.clip(x @ x.T, -1, 1)
    with jax.enable_x64(True):
        gram = np.exp(KERNELS[name](jnp.sqrt(jnp.asarray(2 - 2 * cosine)) / 0.7, jnp.asarray(cosine)))
    assert np.linalg.eigvalsh(gram).min() > -1e-8  # rounding: square roots of 1e-16 on the diagonal


@pytest.mark.parametrize(
    ("name", "bandwidth"), [*itertools.product(SCALED, [1e-3]), *itertools.product(SCALE_FREE, [1.0])]
)
def test_weights_sum_to_one_wherever_there_is_anyone_and_to_zero_elsewhere(name, bandwidth):
    rng = np.random.default_rng(0)
    cosine = np.sort(rng.uniform(-0.9, 0.9, size=(30, 5)).astype(np.float32))[:, ::-1].copy()
    cosine[:, 0] = np.maximum(cosine[:, 0], 0.1)  # the linear kernel counts nobody beyond a right angle
    cosine[rng.random((30, 5)).cumsum(1) > 2] = -np.inf
    cosine[:3] = -np.inf
    total = weighed(cosine, bandwidth, kernel=name).weights.sum(1)
    assert (total[:3] == 0).all()
    np.testing.assert_allclose(total[3:], 1, rtol=tolerances.LAW["float32"])


def test_a_query_that_is_not_a_number_has_no_neighbours():
    found = weighed([[np.nan, np.nan]])
    assert (found.weights == 0).all() and np.isinf(found.distance).all()


@pytest.mark.parametrize(("name", "near"), [*itertools.product(SCALED, [0.5]), ("gaussian", 0.0), ("matern_3_2", 1.3)])
def test_perplexity_sets_the_effective_number_of_neighbours(name, near):
    rng = np.random.default_rng(0)
    distance = near + np.sort(rng.uniform(0.01, 0.1, size=(20, 6)))
    with jax.enable_x64(True):
        weights = weighed(cosines(distance), kernel=name, k=6, perplexity=0.5).weights
    np.testing.assert_allclose(1 / (weights**2).sum(1), 3, rtol=tolerances.PERPLEXITY)


def test_perplexity_counts_the_neighbours_there_are():
    cosine = cosines([[0.5, 0.6, 0.7, 0.8, 0.9, 1.0]])
    cosine[:, 4:] = -np.inf
    weights = weighed(cosine, k=6, perplexity=0.5).weights
    np.testing.assert_allclose(1 / (weights**2).sum(1), 2, rtol=1e-4)


@pytest.mark.parametrize("count", [30, SHORTCUT + 5])
def test_a_reference_is_never_a_neighbour_of_its_own_source(count):
    vectors = unit(count)
    sources = np.array([f"image{i // 3}" for i in range(count)])
    indices, cosine = leave_one_out(vectors, sources, K, batch_size=200)
    assert indices.shape == cosine.shape == (count, K) and np.isfinite(cosine).all()
    assert (sources[indices] != sources[:, None]).all()
    product = vectors @ vectors.T
    product[sources[:, None] == sources] = -np.inf
    np.testing.assert_allclose(cosine, -np.sort(-product)[:, :K], atol=1e-6)


def test_where_other_sources_are_few_neighbours_are_missing():
    sources = np.array(["a"] * 1000 + ["b"] * 2)
    indices, cosine = leave_one_out(unit(1002), sources, K)
    assert np.isfinite(cosine[:1000, :2]).all() and np.isneginf(cosine[:1000, 2]).all()
    assert (indices < 1002).all()


def test_the_bandwidth_is_the_median_distance_to_the_last_neighbour():
    cosine = np.stack([np.full(5, 0.9), cosines([0.2, 0.4, 0.3, 0.6, 0.5])], 1)
    assert median_bandwidth(cosine) == pytest.approx(0.4)
    cosine[:2, 1] = -np.inf
    assert median_bandwidth(cosine) == pytest.approx(0.5)
    assert median_bandwidth(np.full((5, 2), -np.inf)) == 1
    assert median_bandwidth(np.ones((5, 2))) == 1e-3  # duplicates everywhere


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k=0 must be at least 1"),
        ({"epsilon": 0.0}, "epsilon=0.0 must be above 0"),
        ({"epsilon": np.nan}, "epsilon=nan must be above 0"),
        ({"kernel": "cosine"}, "kernel='cosine' is unknown; use one of"),
        ({"bandwidth": -1.0}, "bandwidth=-1.0 must be positive"),
        ({"bandwidth": np.inf}, "bandwidth=inf must be positive"),
        ({"perplexity": 1.0}, "perplexity=1.0 must be at least 0 and below 1"),
        ({"perplexity": 0.5, "kernel": "linear"}, "the linear kernel has no length scale"),
        ({"bandwidth": 0.5, "kernel": "polynomial"}, "the polynomial kernel has no length scale"),
        ({"bandwidth": 0.5, "perplexity": 0.5}, "both set the length scale"),
    ],
)
def test_a_bad_config_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        NeighborConfig(**fields)
