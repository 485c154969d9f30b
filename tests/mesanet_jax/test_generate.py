"""Sampling: what is drawn, from what, and at what price."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesanet_jax import SIZES, MesaNet, SamplingConfig, SolverConfig, apply_with_report, generate, generate_with_report
from mesanet_jax.generate import draw

SMALL = dataclasses.replace(
    SIZES["tiny"], vocab_size=31, num_layers=2, model_dim=32, num_heads=2, key_dim=16, value_dim=16, window=5
)
GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(scope="module", params=[("mesa",), ("attention",), ("sliding_window", "mesa")], ids="+".join)
def setup(request):
    model = MesaNet(dataclasses.replace(SMALL, pattern=request.param))
    prompt = jax.random.randint(jax.random.key(1), (2, 12), 0, SMALL.vocab_size)
    return model, model.init(jax.random.key(0), prompt), prompt


def test_greedy_generation_takes_the_most_likely_token_of_the_whole_text_each_time(setup):
    model, params, prompt = setup
    text = jnp.concatenate(
        [prompt, generate(model, params, prompt, num_tokens=8, key=jax.random.key(0), sampling=GREEDY)], 1
    )
    logits, _ = model.apply(params, text)
    np.testing.assert_array_equal(jnp.argmax(logits[:, 11:-1], -1), text[:, 12:])


@pytest.mark.parametrize("length", [2, 12])  # shorter than the convolution, too
def test_padding_on_the_left_changes_nothing(setup, length):
    model, params, prompt = setup
    prompt = prompt[:, :length]
    padded = jnp.pad(prompt, ((0, 0), (4, 0)), constant_values=-1)
    plain, shifted = (
        generate(model, params, p, num_tokens=8, key=jax.random.key(0), sampling=GREEDY) for p in (prompt, padded)
    )
    np.testing.assert_array_equal(plain, shifted)


def test_the_same_key_gives_the_same_text_and_another_key_another(setup):
    model, params, prompt = setup
    texts = [generate(model, params, prompt, num_tokens=8, key=jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(texts[0], texts[1])
    assert (texts[0] != texts[2]).any()


def test_after_the_stop_token_nothing_else_comes(setup):
    model, params, prompt = setup
    free = np.asarray(generate(model, params, prompt, num_tokens=8, key=jax.random.key(0)))
    stop = int(free[0, 3])
    stopped = np.asarray(generate(model, params, prompt, num_tokens=8, key=jax.random.key(0), stop_token=stop))
    for row in stopped:
        after = np.flatnonzero(row == stop)
        assert not len(after) or (row[after[0] :] == stop).all()
    assert (stopped[0, 3:] == stop).all()


def test_generation_has_solver_settings_of_its_own():
    model = MesaNet(SMALL)
    prompt = jax.random.randint(jax.random.key(1), (4, 12), 0, SMALL.vocab_size)
    params = model.init(jax.random.key(0), prompt)
    exact = generate(model, params, prompt, num_tokens=16, key=jax.random.key(0))
    none = generate(model, params, prompt, num_tokens=16, key=jax.random.key(0), solver=SolverConfig(max_steps=0))
    tight = generate(model, params, prompt, num_tokens=16, key=jax.random.key(0), solver=SolverConfig(tolerance=1e-6))
    np.testing.assert_array_equal(exact, tight)
    assert (exact != none).any()


def test_memory_does_not_grow_with_the_text_generated():
    model = MesaNet(SMALL)
    prompt = jnp.zeros((2, 12), jnp.int32)
    params = model.init(jax.random.key(0), prompt)

    def working_memory(num_tokens: int) -> int:
        program = jax.jit(lambda p: generate(model, params, p, num_tokens=num_tokens, key=jax.random.key(0)))
        return program.lower(prompt).compile().memory_analysis().temp_size_in_bytes

    few, many = working_memory(16), working_memory(4096)
    per_token = 2 * 4 + 2 * 4  # a token of each row and a PRNG key
    assert many - few < 1.5 * per_token * (4096 - 16)


def frequencies(sampling: SamplingConfig) -> np.ndarray:
    """Share of 4,000 draws that each of four tokens with probabilities .5, .25, .15, .1 gets."""
    logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))
    drawn = draw(jax.random.key(0), jnp.tile(logits, (4000, 1)), sampling)
    return np.bincount(np.asarray(drawn), minlength=4) / 4000


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingConfig(), [0.5, 0.25, 0.15, 0.1]),
        (SamplingConfig(temperature=0.5), [0.725, 0.181, 0.065, 0.029]),  # squares, normalised
        (SamplingConfig(temperature=0), [1, 0, 0, 0]),
        (SamplingConfig(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (SamplingConfig(top_k=9), [0.5, 0.25, 0.15, 0.1]),
        (SamplingConfig(top_p=0.6), [2 / 3, 1 / 3, 0, 0]),  # .5 is not enough, .75 is
        (SamplingConfig(top_p=0.01), [1, 0, 0, 0]),
        (SamplingConfig(temperature=1e-38), [1, 0, 0, 0]),
        (SamplingConfig(top_k=3, top_p=0.8), [2 / 3, 1 / 3, 0, 0]),  # of the three, .556 + .278 = .833
    ],
    ids=str,
)
def test_draws_follow_the_distribution_asked_for(sampling, expected):
    np.testing.assert_allclose(frequencies(sampling), expected, atol=0.03)
    assert (frequencies(sampling)[np.array(expected) == 0] == 0).all()


@pytest.mark.parametrize("sampling", [SamplingConfig(top_k=1), SamplingConfig(top_p=0.1)], ids=str)
def test_equally_likely_tokens_do_not_slip_in_together(sampling):
    drawn = draw(jax.random.key(0), jnp.zeros((100, 5)), sampling)
    assert len(np.unique(drawn)) == 1


def test_attention_generates_with_the_context_it_was_given():
    model = MesaNet(dataclasses.replace(SMALL, pattern=("attention",), max_context=6))
    prompt = jax.random.randint(jax.random.key(1), (2, 12), 0, SMALL.vocab_size)
    params = model.init(jax.random.key(0), prompt)
    text = jnp.concatenate(
        [prompt, generate(model, params, prompt, num_tokens=8, key=jax.random.key(0), sampling=GREEDY)], 1
    )
    np.testing.assert_array_equal(jnp.argmax(model.apply(params, text)[0][:, 11:-1], -1), text[:, 12:])


def generate_badly(prompt=((0, 0),), **choices):
    choices = dict(num_tokens=1, key=jax.random.key(0)) | choices
    return generate(MesaNet(SMALL), {}, jnp.asarray(prompt, jnp.int32), **choices)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SamplingConfig(temperature=-1), "temperature=-1 must be finite and at least 0"),
        (lambda: SamplingConfig(temperature=float("nan")), "temperature=nan must be finite and at least 0"),
        (lambda: SamplingConfig(top_k=-1), "top_k=-1 must be a whole number"),
        (lambda: SamplingConfig(top_k=2.5), "top_k=2.5 must be a whole number"),
        (lambda: SamplingConfig(top_k=math.inf), "top_k=inf must be a whole number"),
        (lambda: SamplingConfig(top_p=0), "top_p=0 must lie in"),
        (lambda: generate_badly(num_tokens=0), "num_tokens=0 must be a whole number of at least 1"),
        (lambda: generate_badly(num_tokens=2.0), "num_tokens=2.0 must be a whole number of at least 1"),
        (lambda: generate_badly([[]]), "prompt has shape"),
        (lambda: generate_badly([[0, 99]]), "the prompt holds token 99; the model knows 0 to"),
        (lambda: generate_badly([[-1, 0], [0, -1]]), "row 1 of the prompt ends with padding; pad on the left"),
        (lambda: generate_badly(stop_token=99), "stop_token=99 is no token of a model that knows"),
    ],
)
def test_bad_input_ends_in_a_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_generation_says_what_each_token_took_and_keeps_to_its_budget():
    model = MesaNet(SMALL)
    prompt = jax.random.randint(jax.random.key(1), (2, 12), 0, SMALL.vocab_size)
    params = model.init(jax.random.key(0), prompt)
    arguments = dict(num_tokens=8, key=jax.random.key(0))
    tokens, report = generate_with_report(model, params, prompt, **arguments)
    np.testing.assert_array_equal(tokens, generate(model, params, prompt, **arguments))
    assert report.num_steps.shape == report.residual.shape == (2, 2, 8, 2)
    # the same solves, read in one go: token 12 was predicted from the solves at place 11
    whole = apply_with_report(model, params, jnp.concatenate([prompt, tokens], 1))[2]
    assert (report.residual <= 1.001 * SMALL.solver.tolerance).all()
    np.testing.assert_array_equal(report.num_steps[:, :, 0], whole.num_steps[:, :, 11])
    # single tokens are preconditioned otherwise, so their steps differ, but both grow and shrink with the same tokens
    assert (report.num_steps[:, :, 1:] > 0).all()
    one_by_one, states = [], apply_with_report(model, params, prompt)[1]
    for place in range(7):
        _, states, step = apply_with_report(model, params, tokens[:, place : place + 1], states)
        one_by_one.append(step.num_steps[:, :, 0])
    np.testing.assert_array_equal(report.num_steps[:, :, 1:], jnp.stack(one_by_one, axis=2))
    budget = SolverConfig(max_steps=2, tolerance=0.0)
    _, kept = generate_with_report(model, params, prompt, **arguments, solver=budget)
    assert (kept.num_steps <= 2).all() and (kept.residual.max() > report.residual.max())


def test_a_model_that_solves_nothing_reports_nothing():
    model = MesaNet(dataclasses.replace(SMALL, pattern=("gla",)))
    prompt = jnp.zeros((1, 3), jnp.int32)
    params = model.init(jax.random.key(0), prompt)
    assert generate_with_report(model, params, prompt, num_tokens=2, key=jax.random.key(0))[1] is None


def test_state_belongs_to_a_sequence_and_weights_to_nobody(setup):
    model, params, prompt = setup
    before = jax.tree.map(lambda x: np.array(x).tobytes(), params)
    texts = generate(model, params, prompt, num_tokens=8, key=jax.random.key(0), sampling=GREEDY)
    alone = [generate(model, params, row[None], num_tokens=8, key=jax.random.key(0), sampling=GREEDY) for row in prompt]
    np.testing.assert_array_equal(texts, jnp.concatenate(alone))  # whatever stands in the other rows of a batch
    assert jax.tree.map(lambda x: np.array(x).tobytes(), params) == before
