"""The rows: which token is scored where, whatever surrounds it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.curves import scores as curves
from experiments.data import Document

VOCABULARY, BOS = 11, 10


def document(name, tokens):
    tokens = np.array([BOS, *tokens], np.int32)
    return Document(name, tokens, np.array([0, *np.full(len(tokens) - 1, 1)]))


def random_documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [document(f"doc{i:03d}", rng.integers(0, 10, n)) for i, n in enumerate(lengths)]


def logits_of(probabilities):
    """Logits off by a constant, as a model's are."""
    return jnp.log(probabilities) + 3.0


def uniform_model(tokens):
    return jnp.zeros((*tokens.shape, VOCABULARY))


def copying_model(tokens):
    """Gives 0.9 to the token just read, the rest evenly to the others."""
    return logits_of(jnp.where(jax.nn.one_hot(tokens, VOCABULARY) == 1, 0.9, 0.1 / (VOCABULARY - 1)))


def counting_model(tokens):
    """Logits that depend on how many tokens the row holds so far, and on all of them."""
    history = jnp.cumsum(jax.nn.one_hot(tokens, VOCABULARY), axis=1)
    return jnp.sin(history * 1.3) + 0.1 * history


def counting_nll(tokens):
    """The same in numpy float64, one document at a time."""
    history = np.cumsum(np.eye(VOCABULARY)[tokens], axis=0)
    logits = np.sin(history * 1.3) + 0.1 * history
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -log_probabilities[np.arange(len(tokens) - 1), tokens[1:]]


def test_uniform_model_costs_the_log_of_the_vocabulary_at_every_position():
    scores = curves.score(uniform_model, random_documents([5, 9]), length=16)
    np.testing.assert_allclose(scores.nll, np.log(VOCABULARY), rtol=1e-6)
    assert scores.position.tolist() == [*range(5), *range(9)]


def test_copying_model_pays_little_exactly_where_a_token_repeats():
    scores = curves.score(copying_model, [document("a", [3, 3, 4, 4, 4, 5])], length=16)
    cheap, dear = -np.log(0.9), -np.log(0.01)
    np.testing.assert_allclose(scores.nll, [dear, cheap, dear, cheap, cheap, dear], rtol=1e-5)
    assert scores.target.tolist() == [3, 3, 4, 4, 4, 5]


def test_bigram_model_is_scored_as_by_hand():
    table = np.random.default_rng(0).dirichlet(np.ones(VOCABULARY), VOCABULARY)
    scores = curves.score(lambda t: np.log(table)[np.asarray(t)], [document("a", [1, 2, 7])], length=8)
    by_hand = -np.log([table[BOS, 1], table[1, 2], table[2, 7]])
    np.testing.assert_allclose(scores.nll, by_hand, rtol=1e-6)


def test_a_model_that_sees_the_future_is_not_flattered_by_an_off_by_one():
    """Predicting the token just read must be wrong; predicting the next one, known from outside, must be free."""
    tokens = [1, 2, 3, 4, 5]

    def oracle(shift):
        answer = jnp.asarray([BOS, *tokens, 0, 0])[shift : shift + 6]
        return lambda t: 50.0 * jnp.broadcast_to(jax.nn.one_hot(answer, VOCABULARY), (*t.shape, VOCABULARY))

    scores = curves.score(oracle(1), [document("a", tokens)], length=6, batch_size=2)
    np.testing.assert_allclose(scores.nll, 0, atol=1e-6)
    assert curves.score(oracle(0), [document("a", tokens)], length=6, batch_size=2).nll.min() > 40


def test_bos_is_read_but_never_predicted_and_the_last_token_has_no_target():
    scores = curves.score(uniform_model, [document("a", [1, 2, 3])], length=64)
    assert scores.position.tolist() == [0, 1, 2] and BOS not in scores.target


def test_a_long_document_is_scored_up_to_length_with_a_target_at_its_last_position():
    scores = curves.score(counting_model, random_documents([40]), length=16)
    assert scores.position.tolist() == list(range(16))
    np.testing.assert_allclose(scores.nll, counting_nll(random_documents([40])[0].tokens)[:16], rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_documents_in_a_batch_are_scored_as_each_alone(batch_size):
    """No packing, no state carried over: a document's numbers do not know what else is in the batch."""
    documents = random_documents([3, 12, 1, 7, 12, 12, 5])
    scores = curves.score(counting_model, documents, length=12, batch_size=batch_size)
    for i, one in enumerate(documents):
        np.testing.assert_allclose(scores.nll[scores.document == i], counting_nll(one.tokens), rtol=1e-5)


def test_the_model_is_always_called_with_one_shape():
    shapes = set()

    def model(tokens):
        shapes.add(tokens.shape)
        return uniform_model(tokens)

    curves.score(model, random_documents([3, 30, 9]), length=12, batch_size=2)
    assert shapes == {(2, 12)}


def test_padding_poisoned_with_nan_leaves_no_trace():
    documents = random_documents([3, 12])
    padded = np.arange(12) >= np.array([[3], [12]])

    def model(tokens):
        return jnp.where(padded[..., None], jnp.nan, counting_model(tokens))

    clean = curves.score(counting_model, documents, length=12, batch_size=2)
    np.testing.assert_array_equal(curves.score(model, documents, length=12, batch_size=2).nll, clean.nll)


def test_bf16_logits_are_summed_in_float32():
    documents = random_documents([200])

    def rounded(tokens):
        return counting_model(tokens).astype(jnp.bfloat16)

    scores = curves.score(rounded, documents, length=200)
    exact = np.asarray(rounded(documents[0].tokens[None, :-1]).astype(jnp.float32), np.float64)[0]
    exact = np.log(np.exp(exact).sum(-1)) - exact[np.arange(200), documents[0].tokens[1:]]
    np.testing.assert_allclose(scores.nll, exact, rtol=1e-5)


def test_large_logits_do_not_overflow():
    scores = curves.score(lambda t: 1e4 + uniform_model(t), [document("a", [1])], length=2)
    np.testing.assert_allclose(scores.nll, np.log(VOCABULARY), rtol=1e-6)


def test_a_token_of_probability_zero_costs_infinity_and_is_no_error():
    scores = curves.score(lambda t: jnp.log(jax.nn.one_hot(t, VOCABULARY)), [document("a", [1, 1])], length=2)
    assert scores.nll.tolist() == [np.inf, 0.0]


def test_every_position_is_scored_once_with_a_cut_off_context_whatever_the_stride():
    documents = random_documents([50, 3, 8, 9, 1])
    for stride in (1, 3, 7):
        scores = curves.score(uniform_model, documents, length=40, context=8, stride=stride, batch_size=3)
        counts = np.bincount(scores.document)
        assert counts.tolist() == [40, 3, 8, 9, 1]
        whole = curves.score(uniform_model, documents, length=40)
        np.testing.assert_array_equal(scores.target, whole.target)
        np.testing.assert_array_equal(scores.bytes_before, whole.bytes_before)


def test_cut_off_context_of_stride_one_sees_bos_and_the_last_tokens_only():
    (one,) = random_documents([30])
    scores = curves.score(counting_model, [one], length=30, context=6, stride=1)
    for position in range(6, 30):
        seen = np.concatenate([[BOS], one.tokens[position - 4 : position + 2]])
        np.testing.assert_allclose(scores.nll[position], counting_nll(seen)[-1], rtol=1e-5)


def test_cut_off_context_longer_than_the_document_equals_the_whole_context():
    documents = random_documents([30, 4])
    whole = curves.score(counting_model, documents, length=30)
    cut = curves.score(counting_model, documents, length=30, context=32)
    np.testing.assert_allclose(cut.nll, whole.nll, rtol=1e-6)


def test_a_model_with_short_memory_loses_nothing_by_a_cut_off_context():
    documents = random_documents([50])
    whole = curves.score(copying_model, documents, length=50)
    cut = curves.score(copying_model, documents, length=50, context=8, stride=4)
    np.testing.assert_allclose(cut.nll, whole.nll, rtol=1e-5)


def test_merged_halves_equal_the_whole_whatever_the_order():
    documents = random_documents([9, 3, 14, 6, 6])
    whole = curves.score(counting_model, documents, length=12)
    first = curves.score(counting_model, documents[::2], length=12)
    second = curves.score(counting_model, documents[1::2], length=12, batch_size=1)
    for merged in (curves.merge(first, second), curves.merge(second, first)):
        for ours, theirs in zip(merged, whole, strict=True):
            np.testing.assert_allclose(
                ours, theirs, rtol=1e-6
            ) if ours.dtype == float else np.testing.assert_array_equal(ours, theirs)


def test_a_token_scored_twice_is_refused_by_name():
    part = curves.score(uniform_model, [document("book", [1, 2])], length=4)
    with pytest.raises(ValueError, match="position 0 of document 'book' is scored twice"):
        curves.merge(part, part)


@pytest.mark.parametrize("suffix", ["csv", "npz"])
def test_saved_scores_come_back_bit_for_bit(tmp_path, suffix):
    documents = [document('a, "quoted"\nname', [1, 2]), document("ünï", [3])]
    scores = curves.score(counting_model, documents, length=4)
    curves.save(scores, tmp_path / f"scores.{suffix}")
    for ours, theirs in zip(curves.load(tmp_path / f"scores.{suffix}"), scores, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def test_bytes_are_counted_from_the_text_before_each_token():
    tokens = np.array([BOS, 1, 2, 3], np.int32)
    scores = curves.score(uniform_model, [Document("a", tokens, np.array([0, 4, 1, 2]))], length=8)
    assert scores.num_bytes.tolist() == [4, 1, 2] and scores.bytes_before.tolist() == [0, 4, 5]


BAD_CALLS = {
    "nothing to predict": dict(documents=[document("a", [])]),
    "'a' occurs twice": dict(documents=[document("a", [1]), document("a", [2])]),
    "token 12 but the model's vocabulary has 11": dict(documents=[document("a", [12, 1])]),
    "length must be at least 1": dict(length=0),
    "context must be at least 2": dict(context=1),
    "stride must lie between 1 and context - 1 = 7": dict(context=8, stride=8),
    "must return \\[b, t, y\\]": dict(logits_fn=lambda t: uniform_model(t)[:, 1:]),
    "document 'a' at position 0 is not a number": dict(logits_fn=lambda t: uniform_model(t) * jnp.nan),
    "5 tokens|\\(5,\\) tokens": dict(documents=[Document("a", np.arange(5), np.arange(4))]),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_one_sentence(message):
    arguments = dict(logits_fn=uniform_model, documents=[document("a", [1, 2])], length=4) | BAD_CALLS[message]
    with pytest.raises(ValueError, match=message):
        curves.score(**arguments)
