"""The factors that kernels for TPUs make, and the roots of many small matrices; chips are compiled for elsewhere."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from tolerances import CHUNKWISE, assert_near

from pallas_kernels import MesaState
from pallas_kernels.mesa_chunk import algebra, nested, pallas_tpu, pallas_tpu_factor, positive
from pallas_kernels.mesa_chunk.cases import HARD, sample
from pallas_kernels.mesa_chunk.chunks import scan_states, to_chunks, to_rows
from pallas_kernels.mesa_chunk.pallas_tpu_kernel import TileArrays
from pallas_kernels.mesa_chunk.pallas_tpu_roots import inverse_root
from pallas_kernels.mesa_chunk.pallas_tpu_tiles import TpuConfig

rng = np.random.default_rng(0)


def positive_matrices(num: int, n: int) -> np.ndarray:
    roots = rng.normal(size=(num, n, n))
    return np.float32(roots @ roots.swapaxes(-1, -2) / n + np.eye(n) / 4)


def dense(a: np.ndarray) -> np.ndarray:
    return np.linalg.inv(np.linalg.cholesky(np.float64(a)))


@pytest.mark.parametrize(("num", "n"), [(3, 128), (130, 16), (128, 8)])
def test_roots_are_those_of_dense_decompositions_also_where_a_block_is_not_full(num, n):
    a = positive_matrices(num, n)
    found = inverse_root(jnp.asarray(a), interpret=True)
    assert_near(found, dense(a), CHUNKWISE["float32"])
    assert not np.triu(found, 1).any()


def test_a_matrix_that_is_not_positive_spoils_no_other_and_none_of_its_own_rows_before():
    a = positive_matrices(5, 16)
    spoiled = a.copy()
    spoiled[2, 11, 11] = -1
    found, whole = (inverse_root(jnp.asarray(x), interpret=True) for x in (spoiled, a))
    others = [0, 1, 3, 4]
    np.testing.assert_array_equal(found[jnp.array(others)], whole[jnp.array(others)])
    np.testing.assert_array_equal(found[2, :11], whole[2, :11])
    assert np.isnan(found[2, 11:]).any(axis=-1).all()


def test_blocks_in_which_no_matrix_is_wanted_are_passed_over():
    a = positive_matrices(130, 8)
    wanted = jnp.arange(130) == 129
    found = inverse_root(jnp.asarray(a), wanted=wanted, interpret=True)
    assert not found[:128].any(), "none of these"
    assert_near(found[128:], dense(a[128:]), CHUNKWISE["float32"])


def test_squares_that_rounding_brought_below_the_smallest_eigenvalue_are_raised_to_it():
    a = np.float32([np.diag([2.0] + [1 - 1e-6] * 7)])
    expected = positive.inverse_root(jnp.asarray(a), least=1.0)
    np.testing.assert_array_equal(inverse_root(jnp.asarray(a), 1.0, interpret=True), expected)
    assert expected[0, 1, 1] == 1


def test_the_kernel_neither_races_nor_reads_what_was_not_written():
    simulator = pltpu.InterpretParams(detect_races=True, random_seed=5)
    a = positive_matrices(130, 16)
    assert_near(inverse_root(jnp.asarray(a), interpret=simulator), dense(a), CHUNKWISE["float32"])
    assert not interpret_pallas_call.races.races_found


def test_matrices_that_are_no_multiple_of_8_are_refused():
    with pytest.raises(ValueError, match="12 rows, the kernel takes multiples of 8"):
        inverse_root(jnp.ones((1, 12, 12)), interpret=True)


def tiles_of(inputs, c: int) -> TileArrays:
    """Chunks [n, b, h, ...] that each begin with the states of the case; a document starts in the second."""
    k, v = (to_chunks(jnp.float32(x), c) for x in (inputs.k, inputs.v))
    beta, log_decay = (to_rows(jnp.float32(x), c) for x in (inputs.beta, inputs.log_decay))
    starts = jnp.zeros(beta.shape, jnp.int32).at[1, ..., 40].set(1)
    kk, kv = (jnp.broadcast_to(jnp.float32(x), (k.shape[0], *x.shape)) for x in (inputs.kk, inputs.kv))
    ridge = jnp.broadcast_to(jnp.float32(inputs.ridge)[:, None, :], (*k.shape[:3], 1, k.shape[-1]))
    return TileArrays(k, v, beta, log_decay, starts, kk, kv, ridge)


def test_states_and_what_factors_begin_with_are_carried_from_chunk_to_chunk():
    heads = 6  # two programs of three, after one another for each of four chunks
    inputs = sample(dataclasses.replace(HARD, length=512, num_heads=heads, key_dim=32, value_dim=8, decay=(0.97, 1.0)))
    tiles = tiles_of(inputs, 128)
    tile = tiles.tile()
    initial = MesaState(jnp.float32(inputs.kk), jnp.float32(inputs.kv))
    found, final = pallas_tpu.state_and_system_tiles(*tiles[:5], tiles.ridge, initial, interpret=True)
    added = MesaState(*algebra.added_states(tile.k, tile.v, tile.beta, tile.decays))
    before, after = scan_states(added, tile.decays.through, initial)
    expected = nested.expected_decays(tile.decays)
    assert len(np.unique(expected)) > 4, "chunks and heads differ"
    for a, b in ((found.kk, before.kk), (found.kv, before.kv), (final.kk, after.kk), (final.kv, after.kv)):
        assert_near(a, b, CHUNKWISE["float32"])
    assert_near(found.expected, expected, CHUNKWISE["float32"])
    system = nested.state_system(before.kk, tile.ridge, tile.decays, expected)
    assert_near(found.system, system, CHUNKWISE["float32"])


@pytest.mark.parametrize("spoil", [False, True])
def test_factors_are_those_that_are_made_without_kernels_token_by_token(spoil):
    inputs = sample(dataclasses.replace(HARD, length=256, num_heads=2, key_dim=32, value_dim=8, decay=(0.97, 1.0)))
    tiles = tiles_of(inputs, 128)
    if spoil:
        tiles = tiles._replace(k=tiles.k.at[1, 0, 1, 60, 3].set(jnp.nan))
    make = functools.partial(pallas_tpu_factor.factors, config=TpuConfig(root_size=32), interpret=True)
    tile = tiles.tile()
    expected = nested.expected_decays(tile.decays)
    factors = jax.jit(make)(nested.state_system(tile.kk, tile.ridge, tile.decays, expected), expected, tiles)
    truth = jax.jit(nested.make_factor)(tile, expected)
    np.testing.assert_array_equal(factors.usable > 0, truth.usable)
    assert 0.3 < np.mean(truth.usable) < 1, "some tokens are served and some are not"
    assert_near(factors.inverse, truth.inverse, CHUNKWISE["float32"])
    assert_near(factors.rows, truth.rows, CHUNKWISE["float32"])
    np.testing.assert_array_equal(factors.log_anchor, truth.log_anchor)
