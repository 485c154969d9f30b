"""Products of matrices taken apart: what is kept of the digits."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mesa_chunk import products

rng = np.random.default_rng(0)
SCALES = 2.0 ** rng.integers(-30, 30, size=(24, 16))  # of entries, so that large and small ones meet
BITS = {"bfloat16": 8, "bfloat16_3x": 16, products.SIX_PASSES: 24}


@pytest.mark.parametrize("precision", BITS)
def test_the_parts_of_a_matrix_add_up_to_the_digits_they_keep(precision):
    x = np.float32(rng.normal(size=SCALES.shape) * SCALES)
    parts = products.split(jnp.asarray(x), precision)
    assert len(parts) == BITS[precision] // 8 and all(part.dtype == jnp.bfloat16 for part in parts)
    assert (np.abs(sum(np.float64(part) for part in parts) - x) <= 2.0 ** -BITS[precision] * np.abs(x)).all()


@pytest.mark.parametrize("precision", BITS)
def test_a_product_loses_no_more_than_the_digits_its_parts_drop_and_float32_sums_round(precision):
    x, y = np.float32(rng.normal(size=SCALES.shape) * SCALES), np.float32(rng.normal(size=(16, 5)))
    found = products.times_parts(products.split(jnp.asarray(x), precision), jnp.asarray(y))
    error = np.abs(found - np.float64(x) @ y)
    dropped, rounding = (
        3 * 2.0 ** -BITS[precision],
        16 * 2.0**-24,
    )  # both operands are rounded, and their low parts meet
    assert (error <= (dropped + rounding) * (np.abs(x) @ np.abs(y))).all()
    coarse = 0.01 * 2.0 ** -BITS[precision] * (np.abs(x) @ np.abs(y))
    assert precision == products.SIX_PASSES or (error > coarse).any(), "more digits than were asked for"


@pytest.mark.parametrize("precision", [*BITS, "float32"])
def test_a_product_with_marks_drops_what_the_parts_of_one_operand_drop(precision):
    x, marks = np.float32(rng.normal(size=SCALES.shape) * SCALES), rng.integers(2, size=(16, 5)) > 0
    found = products.times_marks(jnp.asarray(x), jnp.asarray(marks), precision)
    error = np.abs(found - np.float64(x) @ marks)
    allowed = 2.0 ** -BITS.get(precision, 24) + 16 * 2.0**-24
    assert (error <= allowed * (np.abs(x) @ marks)).all() and found.dtype == jnp.float32
