"""Inverses and roots of positive matrices by blocks, against dense decompositions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import NESTED, assert_near

from pallas_kernels.mesa_chunk import positive

rng = np.random.default_rng(0)


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
