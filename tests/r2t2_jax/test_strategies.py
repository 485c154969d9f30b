"""Every strategy stays on the simplex and takes each input by itself; each does what its equation says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2t2_jax.amortised import untrained
from r2t2_jax.shapes import Readout
from r2t2_jax.strategies import (
    PAPER,
    STRATEGIES,
    Memory,
    Problem,
    StrategyConfig,
    Thresholds,
    divergence,
    draw_back,
    project,
    split_groups,
    surrogate,
)
from tests import tolerances
from tests.tolerances import assert_near

GROUPS = [(6,), (3, 3)]
BATCH, NEIGHBORS, REFERENCES, FEATURES, ANSWERS = 16, 5, 40, 3, 4
HEEDS_NEIGHBORS = ("descent", "literal", "kernel_regression", "optimised_regression", "amortised_descent")

each_group = pytest.mark.parametrize("groups", GROUPS, ids=str)
each_strategy = pytest.mark.parametrize("name", STRATEGIES)


def simplex(rng, groups, *lead):
    return np.concatenate([rng.dirichlet(np.ones(size), lead) for size in groups], -1)


def made_up(groups, *, seed=0, dtype=np.float32, batch=BATCH) -> tuple[Problem, Memory]:
    """A problem whose neighbours have much to say, and a memory to go with it."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(NEIGHBORS), batch)
    problem = Problem(
        routing=simplex(rng, groups, batch),
        features=rng.normal(size=(batch, FEATURES)),
        weights=weights,
        similarity=rng.uniform(0.2, 1, size=weights.shape),
        readout=Readout(2 * rng.normal(size=(*weights.shape, 6, ANSWERS)), rng.normal(size=(*weights.shape, ANSWERS))),
        labels=rng.integers(ANSWERS, size=weights.shape),
        neighbor_routing=simplex(rng, groups, *weights.shape),
        neighbor_optimised=simplex(rng, groups, *weights.shape),
        own_readout=Readout(2 * rng.normal(size=(batch, 6, ANSWERS)), rng.normal(size=(batch, ANSWERS))),
        own_label=rng.integers(ANSWERS, size=batch),
    )
    memory = Memory(
        embedding=rng.normal(size=(REFERENCES, 4)),
        labels=rng.integers(ANSWERS, size=REFERENCES),
        routing=simplex(rng, groups, REFERENCES),
        optimised=simplex(rng, groups, REFERENCES),
        readout=Readout(np.zeros((REFERENCES, 6, ANSWERS)), np.zeros((REFERENCES, ANSWERS))),
        amortised=untrained(rng.normal(size=(REFERENCES, FEATURES)), 6),
        bandwidth=np.ones(()),
        thresholds=Thresholds(*np.zeros(3)),
    )
    return cast((problem, memory), dtype)


def cast(tree, dtype):
    return jax.tree.map(lambda x: np.asarray(x, dtype if np.asarray(x).dtype.kind == "f" else np.int32), tree)


def moved(memory: Memory) -> Memory:
    """With an amortised re-router that points away from the router."""
    outer = np.random.default_rng(9).normal(size=memory.amortised.outer.shape).astype(np.float32)
    return memory._replace(amortised=memory.amortised._replace(outer=outer))


@functools.cache
def compiled(name: str, config: StrategyConfig, groups: tuple[int, ...]):
    return jax.jit(lambda problem, memory: STRATEGIES[name](problem, memory, config, groups))


def run(name, problem, memory, groups, **settings):
    return np.asarray(compiled(name, StrategyConfig(**settings), groups)(problem, memory))


def absent(problem: Problem, places) -> Problem:
    """Without the neighbours at these places, which hold what is no number."""
    places = np.broadcast_to(places, problem.weights.shape)

    def erase(x):
        return np.where(places.reshape(*places.shape, *[1] * (x.ndim - 2)), np.nan, x).astype(x.dtype)

    return problem._replace(
        weights=np.where(places, 0, problem.weights).astype(problem.weights.dtype),
        similarity=np.where(places, -np.inf, problem.similarity).astype(problem.weights.dtype),
        readout=jax.tree.map(erase, problem.readout),
        neighbor_routing=erase(problem.neighbor_routing),
        neighbor_optimised=erase(problem.neighbor_optimised),
    )


def assert_on_simplex(routing, groups):
    assert (routing >= 0).all()
    for part in split_groups(jnp.asarray(routing), groups):
        np.testing.assert_allclose(part.sum(-1), 1, atol=4 * tolerances.LAW["float32"])


# --- laws of all ---


@each_group
@each_strategy
def test_a_routing_stays_on_the_simplex_of_each_group_and_absent_neighbours_do_not_matter(name, groups):
    problem, memory = made_up(groups)
    memory = moved(memory)
    last = np.arange(NEIGHBORS) >= 3
    weights = np.where(last, 0, problem.weights)
    problem = problem._replace(weights=weights / weights.sum(1, keepdims=True))
    routing = run(name, absent(problem, last), memory, groups)
    assert_on_simplex(routing, groups)
    present = [problem._replace(weights=problem.weights.astype(np.float32))]
    np.testing.assert_array_equal(routing, run(name, *present, memory, groups))
    assert name == "router" or np.abs(routing - problem.routing).max() > 0.01


@each_group
@pytest.mark.parametrize("name", ["router", *HEEDS_NEIGHBORS])
def test_without_neighbours_the_routing_stays_that_of_the_router(name, groups):
    problem, memory = made_up(groups)
    routing = run(name, absent(problem, True), memory, groups)
    assert_near(routing, problem.routing, tolerances.LAW["float32"], name)


@each_group
@each_strategy
def test_each_input_is_taken_by_itself(name, groups):
    problem, memory = made_up(groups)
    memory = moved(memory)
    order = np.random.default_rng(1).permutation(BATCH)
    mixed = jax.tree.map(lambda x: x[order], problem)
    np.testing.assert_array_equal(run(name, problem, memory, groups)[order], run(name, mixed, memory, groups))


@each_strategy
def test_inputs_are_split_over_devices(name):
    groups, mesh = GROUPS[1], jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    problem, memory = made_up(groups)
    specs = jax.P("data"), jax.P()
    split = jax.shard_map(compiled(name, StrategyConfig(), groups), mesh=mesh, in_specs=specs, out_specs=specs[0])
    assert_near(jax.jit(split)(problem, memory), run(name, problem, memory, groups), tolerances.LAW["float32"])


@each_group
@pytest.mark.parametrize("name", ["descent", "literal", "mode_finding", "oracle", "amortised_descent"])
def test_no_steps_change_nothing(name, groups):
    problem, memory = made_up(groups)
    routing = run(name, problem, memory, groups, steps=0)
    assert_near(routing, problem.routing, tolerances.LAW["float32"], name)


# --- each by its equation, in float64 ---


def in_float64(function):
    @functools.wraps(function)
    def test(**kwargs):
        with jax.enable_x64(True):
            function(**kwargs)

    return test


def on_simplex(logits, groups):
    return jnp.concatenate([jax.nn.softmax(x) for x in split_groups(logits, groups)], -1)


def loss(problem: Problem, routing):
    """Equation 3 for all inputs, written anew."""
    logits = jnp.einsum("be,bmey->bmy", routing, problem.readout.weight) + problem.readout.offset
    right = jax.nn.one_hot(problem.labels, ANSWERS)
    return -(problem.weights[..., None] * right * jax.nn.log_softmax(logits)).sum((1, 2))


@each_group
@in_float64
def test_descent_is_gradient_descent_on_the_logits_of_the_routing(groups):
    problem, memory = made_up(groups, dtype=np.float64)
    config = StrategyConfig(steps=4, learning_rate=1.5, final_learning_rate=0.1, prox=0.2)
    start = jnp.log(problem.routing)

    def objective(logits):
        routing = on_simplex(logits, groups)
        return (loss(problem, routing) + config.prox * divergence(problem.routing, routing)).sum()

    gradient, logits = jax.jit(jax.grad(objective)), start
    for rate in np.asarray(config.learning_rates(), np.float64):
        logits = logits - rate * gradient(logits)
    found = compiled("descent", config, groups)(problem, memory)
    assert_near(found, on_simplex(logits, groups), tolerances.DESCENT_ORACLE, "routing")


def projected(x, groups):
    """The nearest point of each simplex, by bisection of what is taken off everywhere."""
    parts = []
    for part in np.split(np.asarray(x, np.float64), np.cumsum(groups)[:-1], axis=-1):
        low, high = part.min(-1, keepdims=True) - 1, part.max(-1, keepdims=True)
        for _ in range(60):
            middle = (low + high) / 2
            much = np.maximum(part - middle, 0).sum(-1, keepdims=True) > 1
            low, high = np.where(much, middle, low), np.where(much, high, middle)
        parts.append(np.maximum(part - low, 0))
    return np.concatenate(parts, -1)


@each_group
@in_float64
def test_projection_gives_the_nearest_point_of_each_simplex(groups):
    x = np.random.default_rng(0).normal(size=(50, 6)) * np.logspace(-1, 1, 50)[:, None]
    assert_near(project(jnp.asarray(x), groups), projected(x, groups), tolerances.LAW["float64"], "point")
    inside = simplex(np.random.default_rng(1), groups, 20)
    assert_near(project(jnp.asarray(inside), groups), inside, tolerances.LAW["float64"], "point inside")


@each_group
@in_float64
def test_literal_descent_is_equation_one_put_back_on_the_simplex(groups):
    problem, memory = made_up(groups, dtype=np.float64)
    config = StrategyConfig(steps=4, learning_rate=1.5, final_learning_rate=0.1)
    gradient, routing = jax.jit(jax.grad(lambda r: loss(problem, r).sum())), problem.routing
    for rate in np.asarray(config.learning_rates(), np.float64):
        routing = projected(routing - rate * gradient(routing), groups)
    assert (routing == 0).any()  # it has met the edge
    found = compiled("literal", config, groups)(problem, memory)
    assert_near(found, routing, tolerances.DESCENT_ORACLE, "routing")


@each_group
@in_float64
def test_kernel_regression_finds_the_best_point_of_the_segment(groups):
    problem, memory = made_up(groups, dtype=np.float64, batch=40)
    mean = (problem.weights[..., None] * problem.neighbor_routing).sum(1)
    shares = np.linspace(0, 1, 2001)
    grid = jax.vmap(lambda a: loss(problem, a * problem.routing + (1 - a) * mean))(shares)
    best = shares[np.argmin(grid, 0)]
    assert {0.0, 1.0} < set(best.tolist())  # both ends, and in between
    found = run("kernel_regression", problem, memory, groups, steps=30)
    share = ((found - mean) * (problem.routing - mean)).sum(1) / ((problem.routing - mean) ** 2).sum(1)
    np.testing.assert_allclose(share, best, atol=1 / 2000)
    assert (np.asarray(loss(problem, found)) <= np.min(grid, 0) + 1e-8).all()


@each_group
@in_float64
def test_optimised_regression_goes_as_far_as_the_neighbours_are_similar(groups):
    problem, memory = made_up(groups, dtype=np.float64)
    mean = (problem.weights[..., None] * problem.neighbor_optimised).sum(1)
    share = (problem.weights * problem.similarity).sum(1, keepdims=True) ** 2
    found = run("optimised_regression", problem, memory, groups, confidence=2.0)
    expected = share * mean + (1 - share) * problem.routing
    assert_near(found, expected, tolerances.LAW["float64"], "routing")


@each_group
@in_float64
def test_mode_finding_is_mean_shift_and_ends_at_a_mode(groups):
    problem, memory = made_up(groups, dtype=np.float64)
    routing = problem.routing
    for _ in range(3):
        square = ((routing[:, None] - memory.routing) ** 2).sum(-1)
        kernel = np.exp(-square / (2 * 0.3**2))
        mean = kernel @ memory.routing / kernel.sum(1, keepdims=True)
        routing = 0.4 * routing + 0.6 * mean
    settings = {"mode_bandwidth": 0.3, "mode_step": 0.6}
    found = run("mode_finding", problem, memory, groups, steps=3, **settings)
    assert_near(found, routing, tolerances.LAW["float64"], "routing")
    mode = run("mode_finding", problem, memory, groups, steps=2000, **settings)
    further = run("mode_finding", problem._replace(routing=mode), memory, groups, steps=1, **settings)
    np.testing.assert_allclose(further, mode, atol=1e-9)
    assert np.abs(mode - routing).max() > 0.01


@each_group
def test_the_oracle_lowers_the_loss_of_the_own_label(groups):
    problem, memory = made_up(groups)

    def own(routing):
        log_answer = jax.nn.log_softmax(problem.own_readout(routing))
        return -np.take_along_axis(np.asarray(log_answer), problem.own_label[:, None], 1)[:, 0]

    routing = run("oracle", problem, memory, groups, learning_rate=0.5)
    assert (own(routing) < own(problem.routing)).all()
    with pytest.raises(ValueError, match="needs the labels of the inputs"):
        STRATEGIES["oracle"](problem._replace(own_label=None), memory, StrategyConfig(), groups)


@each_group
def test_amortised_descent_starts_where_the_network_points(groups):
    problem, memory = made_up(groups)
    memory = moved(memory)
    start = run("amortised", problem, memory, groups)
    expected = run("descent", problem._replace(routing=start), memory, groups)
    assert_near(run("amortised_descent", problem, memory, groups), expected, tolerances.LAW["float32"], "routing")


@each_group
@in_float64
def test_a_trust_region_draws_back_to_its_edge_and_leaves_what_lies_inside(groups):
    rng = np.random.default_rng(0)
    start, far = (jnp.asarray(simplex(rng, groups, 50)) for _ in range(2))
    limit = 0.6
    found = draw_back(far, start, limit, groups)
    inside = np.asarray(divergence(start, far) <= limit)
    assert 5 < inside.sum() < 45
    np.testing.assert_array_equal(found[inside], far[inside])
    distance = np.asarray(divergence(start, found))
    assert (distance <= limit).all()
    np.testing.assert_allclose(distance[~inside], limit, rtol=1e-4)
    assert_on_simplex(found, groups)
    way = jnp.log(far) - jnp.log(start)
    along = on_simplex(jnp.log(start) + 0.5 * way, groups)
    np.testing.assert_allclose(draw_back(along, start, 1e-3, groups), draw_back(far, start, 1e-3, groups), atol=1e-5)


def test_what_is_no_number_is_not_drawn_back_into_one():
    start = jnp.full((1, 3), 1 / 3)
    assert np.isnan(draw_back(jnp.full((1, 3), jnp.nan), start, 0.1, (3,))).all()


def test_divergence_is_that_of_kullback_and_leibler():
    start, routing = np.array([[0.5, 0.5, 0.0]]), np.array([[0.25, 0.5, 0.25]])
    assert float(divergence(start, routing)[0]) == pytest.approx(0.5 * np.log(2))


def test_the_surrogate_is_the_weighted_loss_of_the_neighbours():
    problem, _ = made_up((6,))
    expected = loss(problem, problem.routing)
    assert_near(surrogate(problem, problem.routing), expected, tolerances.LAW["float32"], "loss")


# --- settings ---


def test_the_learning_rate_falls_along_a_cosine():
    rates = StrategyConfig(steps=4, learning_rate=2.0, final_learning_rate=1.0).learning_rates()
    np.testing.assert_allclose(rates, [2, 1.5 + 8**-0.5, 1.5, 1.5 - 8**-0.5], rtol=1e-6)
    assert PAPER.learning_rates().sum() == pytest.approx(0.0550, abs=5e-5)  # how far the paper's ten steps can go
    assert StrategyConfig(steps=0).learning_rates().shape == (0,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": -1}, "steps=-1 must not be negative"),
        ({"optimizer": "newton"}, "optimizer='newton'; use 'sgd'"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"mode_bandwidth": np.nan}, "mode_bandwidth=nan must be positive"),
        ({"final_learning_rate": -1.0}, "final_learning_rate=-1.0 must not be negative"),
        ({"prox": np.inf}, "prox=inf must"),
        ({"trust": -1.0}, "trust=-1.0 must"),
        ({"confidence": -1.0}, "confidence=-1.0 must"),
        ({"mode_step": 0.0}, "mode_step=0.0 must be above 0"),
    ],
)
def test_a_bad_config_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        StrategyConfig(**fields)
