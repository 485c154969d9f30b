"""One contract for every pattern of mixers: causal, cut anywhere, packed."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesanet_jax import SIZES, MesaNet, MesaNetConfig, SolverConfig, apply_with_report
from mesanet_jax.mixers import MIXERS
from mesanet_jax.model import by_layer, num_parameters
from pallas_kernels import SolveReport
from tests import tolerances

SMALL = MesaNetConfig(
    vocab_size=61,
    num_layers=2,
    model_dim=32,
    num_heads=2,
    key_dim=16,
    value_dim=16,
    window=7,
    max_context=64,
    norm_eps=1e-3,  # with 1e-6, where a head says almost nothing, 2e-3 of gla's gradient would be rounding, not 2e-5
    solver=SolverConfig(max_steps=16, tolerance=0.0),
)
PATTERNS = {name: (name,) for name in MIXERS} | {"hawk and mesa": ("hawk", "mesa")}


def make(pattern: str, **changes):
    """Returns model, parameters and tokens [2, 40]."""
    model = MesaNet(dataclasses.replace(SMALL, pattern=PATTERNS[pattern], **changes))
    tokens = jax.random.randint(jax.random.key(1), (2, 40), 0, SMALL.vocab_size)
    return model, jax.jit(model.init)(jax.random.key(0), tokens), tokens


@pytest.fixture(params=PATTERNS, scope="module")
def setup(request):
    model, params, tokens = make(request.param)
    return model, params, tokens, jax.jit(model.apply)


def compute(model, *arguments):
    return jax.jit(model.apply)(*arguments)


def close(actual, expected, kind="float32"):
    tolerances.assert_near(actual, expected, tolerances.MODEL[kind])


@pytest.mark.parametrize("cuts", [(1,) * 40, (1, 2, 1, 36), (17, 23)], ids=str)
def test_logits_are_the_same_however_a_sequence_is_cut(setup, cuts):
    _, params, tokens, apply = setup
    whole, _ = apply(params, tokens)
    state, pieces = None, []
    for piece in np.split(tokens, np.cumsum(cuts)[:-1], axis=1):
        logits, state = apply(params, piece, state)
        pieces.append(logits)
    close(jnp.concatenate(pieces, axis=1), whole)


def test_state_does_not_grow_with_length(setup):
    _, params, tokens, apply = setup
    sizes = [[x.shape for x in jax.tree.leaves(apply(params, tokens[:, :length])[1])] for length in (3, 40)]
    assert sizes[0] == sizes[1]


def test_a_prediction_depends_on_its_past_and_not_on_its_future(setup):
    # Every token has an embedding row of its own here, so the gradient of what enters the read-out at one place shows
    # which tokens it used: a mask that leaks makes a later row non-zero, one that hides the past an earlier row zero.
    model, params, _, _ = setup
    params = nn.unbox(params)
    tokens, place = jnp.arange(40)[None], 20

    @jax.jit
    @jax.grad
    def used_by_read_out(table):
        inner = params["params"] | {"embedding": {"embedding": table}}
        _, watched = model.apply({"params": inner}, tokens, capture_intermediates=lambda m, _: m.name == "out_norm")
        return watched["intermediates"]["out_norm"]["__call__"][0][0, place].sum()

    used = jnp.abs(used_by_read_out(params["params"]["embedding"]["embedding"])).sum(-1)
    assert (used[place + 1 :] == 0).all()
    assert (used[place - 5 : place + 1] > 0).all()


def test_packed_documents_equal_separate_documents_in_value_and_gradient(setup):
    model, params, tokens, _ = setup
    cut = ((11, 29), (29, 11))
    ids = jnp.stack([jnp.repeat(jnp.arange(2), jnp.array(row), total_repeat_length=40) for row in cut])
    weights = jax.random.normal(jax.random.key(3), (2, 40, SMALL.vocab_size))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def weigh(params, tokens, ids, weights):
        logits, _ = model.apply(params, tokens, None, ids)
        return jnp.sum(logits * weights), logits

    (_, packed), gradient = weigh(nn.unbox(params), tokens, ids, weights)
    rows, gradients = [], []
    for row, (first, _) in enumerate(cut):
        for part in (slice(0, first), slice(first, 40)):
            one = (slice(row, row + 1), part)
            (_, logits), alone = weigh(nn.unbox(params), tokens[one], None, weights[one])
            rows.append(logits)
            gradients.append(alone)
    close(packed, jnp.concatenate([jnp.concatenate(rows[:2], 1), jnp.concatenate(rows[2:], 1)]))
    jax.tree.map(lambda a, *parts: close(a, sum(parts), "gradient"), gradient, *gradients)


@pytest.mark.parametrize("last", [1, 2, 15])  # shorter than the convolution, too
def test_continuing_after_packed_documents_continues_the_last_one(setup, last):
    _, params, tokens, apply = setup
    ids = jnp.where(jnp.arange(30) < 30 - last, 0, 1)[None].repeat(2, 0)
    _, packed = apply(params, tokens[:, :30], None, ids)
    _, alone = apply(params, tokens[:, 30 - last : 30])
    close(apply(params, tokens[:, 30:], packed)[0], apply(params, tokens[:, 30:], alone)[0])


def test_what_stands_in_padding_does_not_matter(setup):
    _, params, tokens, apply = setup
    ids = jnp.where(jnp.arange(40) < 6, -1, 0)[None].repeat(2, 0)
    other = tokens.at[:, :6].set(5)
    plain, _ = apply(params, tokens[:, 6:])
    close(apply(params, tokens, None, ids)[0][:, 6:], plain)
    np.testing.assert_array_equal(apply(params, tokens, None, ids)[0][:, 6:], apply(params, other, None, ids)[0][:, 6:])


@functools.cache
def gradient_with(remat: str):
    model, params, tokens = make("mesa", remat=remat)
    return jax.jit(jax.grad(lambda p: model.apply(p, tokens)[0].var()))(nn.unbox(params))


@pytest.mark.parametrize("remat", ["all_but_solutions", "everything"])
def test_recomputing_activations_changes_no_gradient(remat):
    jax.tree.map(lambda a, b: close(a, b, "gradient"), gradient_with(remat), gradient_with("nothing"))


def test_bfloat16_activations_stay_near_float32_with_state_in_float32():
    model, params, tokens = make("mesa")
    expected, _ = compute(model, params, tokens)
    logits, state = compute(MesaNet(dataclasses.replace(model.config, dtype="bfloat16")), params, tokens)
    assert logits.dtype == jnp.float32
    assert state[0].memory.kk.dtype == state[0].memory.kv.dtype == jnp.float32
    close(logits, expected, "bfloat16")


def test_parameters_are_counted_as_in_the_paper():
    # tied embedding, vocabulary of 50,257
    millions = {"145m": 146.2, "400m": 433.9, "1b": 937.5}
    for size, expected in millions.items():
        shapes = jax.eval_shape(MesaNet(SIZES[size]).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
        assert abs(num_parameters(shapes) / 1e6 - expected) < 0.06, size


def test_mixers_have_nearly_the_same_number_of_parameters():
    # hawk is as wide as the paper has it, 1.25 times the model, and a group of channels gates itself: 1.4 % more
    counts = {}
    for name in MIXERS:
        config = dataclasses.replace(SIZES["145m"], pattern=(name,))
        shapes = jax.eval_shape(MesaNet(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
        counts[name] = num_parameters(shapes)
    hawk = counts.pop("hawk")
    assert max(counts.values()) / min(counts.values()) < 1.003
    assert 1 < hawk / counts["mesa"] < 1.015


def test_initialisation_follows_the_recipe():
    config = dataclasses.replace(
        SMALL, model_dim=256, num_heads=4, key_dim=64, value_dim=64, num_layers=8, vocab_size=999
    )
    params = nn.unbox(jax.jit(MesaNet(config).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"]
    block = params["layers"]["mesa_0"]

    def deviation(x):
        return float(jnp.std(x))

    assert deviation(params["embedding"]["embedding"]) == pytest.approx(256**-0.5, rel=0.02)
    assert deviation(block["mixer"]["query"]["kernel"]) == pytest.approx(256**-0.5, rel=0.02)
    assert deviation(block["mlp"]["gate"]["kernel"]) == pytest.approx(256**-0.5, rel=0.02)
    # back into the residual stream: variance 2 / N of fan-in
    assert deviation(block["mixer"]["out"]["kernel"]) == pytest.approx((2 / 8 / 256) ** 0.5, rel=0.02)
    assert deviation(block["mlp"]["out"]["kernel"]) == pytest.approx((2 / 8 / 768) ** 0.5, rel=0.02)
    ridge = 0.25 + jax.nn.softplus(block["mixer"]["ridge"])
    np.testing.assert_allclose(ridge, 1.0, rtol=1e-6)


def test_a_read_out_of_its_own_begins_like_a_tied_one_and_is_used():
    config = dataclasses.replace(SMALL, vocab_size=4096, tied_embedding=False, logit_cap=0.0)
    model, tokens = MesaNet(config), jnp.zeros((1, 8), jnp.int32)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens))
    table = params["params"]["read_out"]["kernel"]
    assert float(jnp.std(table)) == pytest.approx(32**-0.5, rel=0.02)
    logits, _ = compute(model, params, tokens)
    params["params"]["read_out"]["kernel"] = 100 * table
    tolerances.assert_near(compute(model, params, tokens)[0], 100 * logits, 1e-5)


def test_layers_are_reported_from_the_bottom_up_however_many_a_pattern_has():
    places = {"layers": {f"mesa_{n}": SolveReport(jnp.full((1, 1), n), jnp.zeros((1, 1))) for n in range(1, 12)}}
    assert by_layer({"intermediates": places}, SolveReport).num_steps[:, 0].tolist() == list(range(1, 12))


def test_full_input_strength_bounds_the_forget_gate():
    model, params, _ = make("mesa", forget_bias=30.0)
    params = nn.unbox(params)
    gates = params["params"]["layers"]["mesa_0"]["mixer"]
    gates["input_gate"]["bias"] = jnp.full_like(gates["input_gate"]["bias"], 30.0)
    # with both gates open a repeated key is summed to at most 1 / (1 - 0.9975) = 400
    _, state = compute(model, params, jnp.zeros((1, 2000), jnp.int32))
    largest = jnp.linalg.eigvalsh(state[0].memory.kk).max()
    assert 350 < largest < 400.5


def test_logits_are_capped():
    model, params, tokens = make("mesa")
    params = jax.tree.map(lambda x: 100 * x, params)
    logits, _ = compute(model, params, tokens)
    assert jnp.abs(logits).max() <= SMALL.logit_cap
    assert jnp.abs(logits).max() > 0.9 * SMALL.logit_cap


def test_the_report_has_a_row_per_mesa_layer_and_is_true():
    model, params, tokens = make("hawk and mesa", num_layers=4)
    logits, _, report = apply_with_report(model, params, tokens)
    assert report.num_steps.shape == report.residual.shape == (2, 2, 40, 2)
    np.testing.assert_array_equal(logits, model.apply(params, tokens)[0])
    loose = MesaNet(dataclasses.replace(model.config, solver=SolverConfig(max_steps=16, tolerance=1e-2)))
    _, _, rough = apply_with_report(loose, params, tokens)
    assert (rough.residual <= 1.001e-2).all()
    assert rough.num_steps.mean() < report.num_steps.mean()


def test_a_model_without_mesa_layers_has_no_report():
    model, params, tokens = make("attention")
    assert apply_with_report(model, params, tokens)[2] is None


def test_no_solver_steps_leave_gated_linear_attention():
    model, params, tokens = make("mesa", solver=SolverConfig(max_steps=0))
    logits, _ = compute(model, params, tokens)
    exact = MesaNet(dataclasses.replace(model.config, solver=SolverConfig(max_steps=16, tolerance=0.0)))
    assert jnp.isfinite(logits).all()
    assert not np.allclose(logits, compute(exact, params, tokens)[0], atol=1e-3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m, p: m.apply(p, [[0, 1]]), TypeError, "tokens is a list; pass an array"),
        (lambda m, p: m.apply(p, jnp.zeros((2, 3))), TypeError, "tokens have dtype float32; pass integers"),
        (lambda m, p: m.apply(p, jnp.zeros((3,), jnp.int32)), ValueError, r"tokens have shape \(3,\)"),
        (lambda m, p: m.apply(p, jnp.zeros((3, 0), jnp.int32)), ValueError, "at least one token"),
        (
            lambda m, p: m.apply(p, jnp.zeros((2, 3), jnp.int32), None, jnp.zeros((2, 4), jnp.int32)),
            ValueError,
            r"segment_ids have shape \(2, 4\); they must be \[b, t\] = \(2, 3\)",
        ),
        (
            lambda m, p: m.apply(p, jnp.zeros((1, 3), jnp.int32), None, jnp.array([[1, 0, 0]])),
            ValueError,
            "segment_ids of row 0 decrease",
        ),
        (
            lambda m, p: m.apply(p, jnp.zeros((3, 1), jnp.int32), m.apply(p, jnp.zeros((2, 1), jnp.int32))[1]),
            ValueError,
            r"state: it is of 1 mixers and \[2\] rows; .* of 1, returned for 3",
        ),
        (
            lambda m, p: m.apply(p, jnp.zeros((2, 1), jnp.int32), 2 * m.apply(p, jnp.zeros((2, 1), jnp.int32))[1]),
            ValueError,
            r"state: it is of 2 mixers and \[2\] rows; .* of 1, returned for 2",
        ),
    ],
)
def test_bad_calls_end_in_a_sentence(call, error, words):
    model, params, _ = make("mesa")
    with pytest.raises(error, match=words):
        call(model, params)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"pattern": ("mesa", "mamba")}, "must be a tuple of one or more of"),
        ({"pattern": ()}, "must be a tuple of one or more of"),
        ({"pattern": ("mesa", "attention"), "num_layers": 3}, "num_layers=3 is no multiple"),
        ({"pattern": ("attention",), "key_dim": 15, "value_dim": 15}, "attention needs an even key_dim"),
        ({"pattern": ("attention",), "value_dim": 8}, "attention needs an even key_dim"),
        ({"gate_bound": 1.5}, "gate_bound=1.5 must lie in"),
        ({"remat": "foo"}, "remat='foo' must be one of"),
        ({"dtype": "float16"}, "dtype='float16' must be one of"),
        ({"ridge_init": 0.1}, "ridge_init=0.1 must exceed ridge_floor=0.25"),
        ({"mlp_dim": -1}, "mlp_dim=-1 is negative"),
        ({"pattern": ("hawk",), "recurrent_dim": 33}, "recurrent_dim=33 must be a positive multiple of num_heads=2"),
    ],
)
def test_bad_configs_end_in_a_sentence(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, **changes)
