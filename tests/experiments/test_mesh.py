"""What the compiler is told for a host changes no result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.mesh import compiler_options
from tests import tolerances

MADE_OF = {
    "constant": lambda y: jnp.full_like(y, 0.5),
    "column": lambda y: jnp.broadcast_to(y[..., :1], y.shape),
    "row": lambda y: jnp.broadcast_to(y[..., :1, :], y.shape),
    "itself": lambda y: y,
}


@pytest.mark.parametrize("made_of", MADE_OF)
def test_products_are_right_whatever_their_factors_are_made_of(made_of):
    x, y = jax.random.normal(jax.random.key(0), (2, 128, 32, 32))
    y = y[..., :17]

    def products(x, y):
        return jnp.einsum("bij,bjk->bik", x, MADE_OF[made_of](y)) * x[..., :1]

    expected = np.einsum("bij,bjk->bik", x, MADE_OF[made_of](y)) * x[..., :1]
    found = jax.jit(products, compiler_options=compiler_options())(x, y)
    tolerances.assert_near(found, expected, tolerances.LAW["float32"], made_of)
