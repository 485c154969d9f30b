"""How far two computations of the same thing may lie apart, relative to the largest entry of what is expected.

The one place for such numbers, the same on the desk and in CI. Each is about four times the worst error seen on jax
0.10.2 and 0.12.0 when it was written, unless its line says otherwise; a failing test never edits this file.
"""

import numpy as np

ORACLE = {
    "float64": 6e-14,  # dense solves on both sides
}
CHUNKWISE = {  # an implementation against the float64 reference, on inputs of that dtype
    "float64": 2e-14,
    "float32": 5e-6,
    "bfloat16": 4e-3,  # results in bfloat16 have 8 significant bits: one rounding, 2^-8, and no more
}
# Inputs that cost digits whatever one does; they replace the numbers above.
SCREAMING = {  # 500 repeated tokens: condition 1600, so that many digits less
    "float64": 6e-13,
    "float32": 1.5e-4,
    "bfloat16": 4e-3,
}
FADED_GATE = {  # gradient of log gates of 0.01: about 0.01 in size, a difference of terms of size 1
    "float64": 1.2e-13,
    "float32": 6e-5,
    "bfloat16": 4e-3,
}
LAW = {  # the same numbers added up in another order
    "float64": 5e-15,
    "float32": 2e-6,
}
MODEL = {  # a whole small model, two layers and solves of 16 steps, computed in another order
    "float32": 1.5e-5,  # 3.7e-6 seen: a document packed in the middle of a chunk against the same document alone
    "gradient": 2.4e-4,  # 5.7e-5 seen, of the second moments, whose relative error is twice that of the gradients
    "bfloat16": 3e-2,  # bfloat16 activations against float32: a handful of roundings of 2^-8 add up
}
CONDITION = 2e-6  # condition numbers up to 100: eigenvalues in float32
PARITY = 4.5e-5  # layers in float32 against other people's, token by token in float32; 1.1e-5 seen
RECURRENCE = {  # chunks against the definition in float64
    "float64": 4.2e-14,
    "float32": 1e-5,
    "bfloat16": 3.2e-2,
}
HUGE_RIDGE = 1e-8  # the next term of a series, |H| / ridge
DENSE_RESIDUAL = 4e-7  # a relative residual is measured in float32 from float32 solutions, whatever it ought to be
NESTED = {
    "floor": 32.0,  # of a residual, or of an error about it, in roundings of float32 of the products it is a sum of
    "factor": 5e-14,  # inverses of frozen systems of condition 100, float64 on both sides
    "one step": {"float64": 4e-14, "float32": 4e-5},  # residual of one step on a factor that is exact
}
# r2t2_jax and router_descent
OTHER_BATCH = 5e-7  # a model's outputs in batches of another size: one rounding or two of float32
STANDARDISED = 1.3e-6  # spread of standardised features: float32 sums of 400 terms
MARTINGALE = 1.2e-15  # a weighted mean of two float64 sums of 12 terms
EDGE_OF_INTERVAL = 3e-14  # bisection to 2^-50 and log-gamma functions, in float64
DESCENT_ORACLE = 1.1e-13  # steps of router descent in float64 on both sides
DESCENT_LAW = 6e-14  # the same steps added up in another order, in float64
FINITE_DIFFERENCE = 1.5e-8  # central differences with steps of 1e-6
DESCENT = {  # routing and loss of an implementation against the float64 reference, on inputs of that dtype
    "float64": 3.7e-15,
    "float32": 2e-6,
}
DESCENT_GRADIENT = {  # the same of gradients, by the dtype of what they are gradients of
    "float64": 9e-14,
    "float32": 5.6e-5,
    "bfloat16": 4e-3,  # rounded to 8 significant bits: 2^-8, and no more
}
CONFIDENT = {  # replaces both for float32 and logits of size 50: rounding one costs its exponential 4e-6
    "value": 6.6e-5,
    "gradient": 5.3e-4,
}
PERPLEXITY = 1e-7  # an effective number of neighbours after 30 bisections of a factor of a million
FITTED_ROUTING = 1.4e-5  # 200 steps of descent on a mean that is summed in another order; 3.4e-6 seen


def relative_error(actual, expected) -> float:
    """Returns the largest difference over the largest entry of `expected`; 0 where both are 0."""
    actual, expected = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, f"shapes {actual.shape} and {expected.shape} differ"
    assert np.isfinite(actual).all(), "not finite"
    if not actual.size:
        return 0.0
    error, size = np.max(np.abs(actual - expected)), np.max(np.abs(expected))
    return float(error / size) if size else float(np.where(error, np.inf, 0.0))


def assert_near(actual, expected, tolerance: float, what: str = "result") -> None:
    """Fails, naming `what`, if the relative error is larger than the tolerance."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e} is above {tolerance:.0e}"
