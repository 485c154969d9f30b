"""Rungs 4 and 5 for the roots of many small matrices; chips are compiled for where the operator is."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from tolerances import CHUNKWISE, assert_near

from pallas_kernels.mesa_chunk import positive
from pallas_kernels.mesa_chunk.pallas_tpu_roots import inverse_root

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
