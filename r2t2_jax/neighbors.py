"""Which references an input resembles, and how much each of them counts (arXiv 2502.20395, section 3.4)."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from r2t2_jax.decision import Neighbors
from r2t2_jax.shapes import Embedding

BLOCK = 128  # references whose best similarity is compared first; see `nearest`


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeighborConfig:
    """Who counts as a neighbour, and how much.

    Distances are Euclidean between unit vectors: 0 to 2, d^2 = 2 - 2 cos.

    Attributes:
      k: the nearest so many, or with `epsilon` the most that a ball may hold.
      epsilon: only neighbours at most this far away; None sets no limit (eq. 9 and 10).
      kernel: a key of KERNELS, the weight of a neighbour before weights are scaled to sum 1.
      bandwidth: length scale of the kernel; None takes the median, over the references, of the distance to their own
        k-th neighbour of another source. The linear and the polynomial kernel have none.
      perplexity: where positive, a length scale of each input's own at which the effective number of neighbours,
        1 / sum_j w_j^2, is this share of those it has. Takes the place of `bandwidth`.

    Raises:
      ValueError: a field is out of range, or two do not go together.
    """

    k: int = 5
    epsilon: float | None = None
    kernel: str = "gaussian"
    bandwidth: float | None = None
    perplexity: float = 0.0

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"NeighborConfig: k={self.k} must be at least 1.")
        if self.epsilon is not None and not 0 < self.epsilon <= 2:
            raise ValueError(f"NeighborConfig: epsilon={self.epsilon} must be above 0 and at most 2, or None.")
        if self.kernel not in KERNELS:
            raise ValueError(f"NeighborConfig: kernel={self.kernel!r} is unknown; use one of {tuple(KERNELS)}.")
        if self.bandwidth is not None and not (self.bandwidth > 0 and math.isfinite(self.bandwidth)):
            raise ValueError(f"NeighborConfig: bandwidth={self.bandwidth} must be positive, or None.")
        if not 0 <= self.perplexity < 1:
            raise ValueError(f"NeighborConfig: perplexity={self.perplexity} must be at least 0 and below 1.")
        if (self.perplexity or self.bandwidth) and self.kernel in SCALE_FREE:
            raise ValueError(
                f"NeighborConfig: the {self.kernel} kernel has no length scale; set perplexity to 0, bandwidth to None."
            )
        if self.perplexity and self.bandwidth:
            raise ValueError(
                "NeighborConfig: perplexity and bandwidth both set the length scale; leave one of them out."
            )


# --- logarithms of kernels: functions of the distance in units of the bandwidth, or of the cosine ---


def _gaussian(distance, cosine):
    return -(distance**2) / 2


def _matern_1_2(distance, cosine):
    return -distance


def _matern_3_2(distance, cosine):
    scaled = math.sqrt(3) * distance
    return jnp.log1p(scaled) - scaled


def _matern_5_2(distance, cosine):
    scaled = math.sqrt(5) * distance
    return jnp.log1p(scaled + scaled**2 / 3) - scaled


def _linear(distance, cosine):
    return jnp.log(jnp.maximum(cosine, 0))


def _polynomial(distance, cosine):
    return 3 * jnp.log((1 + cosine) / 2)


KERNELS = {
    "gaussian": _gaussian,
    "matern_1_2": _matern_1_2,
    "matern_3_2": _matern_3_2,
    "matern_5_2": _matern_5_2,
    "linear": _linear,
    "polynomial": _polynomial,
}
SCALE_FREE = ("linear", "polynomial")


# --- search ---


def nearest(
    queries: Embedding, references: Float[Array, "r p"], k: int, *, excluded: Bool[Array, "b r"] | None = None
) -> tuple[Int[Array, "b m"], Float[Array, "b m"]]:
    """Returns the k references of largest cosine, best first, and the cosines: exact, m = min(k, r).

    The k best lie in the k blocks with the best maxima, so only those are sorted: one product, one pass, and a sort
    of k blocks instead of all r. Of equal cosines the reference that comes first wins.

    Args:
      queries, references: unit vectors, [b, p] and [r, p].
      k: how many.
      excluded: [b, r], pairs that do not count; their cosine is -inf.
    """
    cosine = jnp.matmul(queries, references.T, precision=jax.lax.Precision.HIGHEST)
    if excluded is not None:
        cosine = jnp.where(excluded, -jnp.inf, cosine)
    k = min(k, cosine.shape[-1])
    if cosine.shape[-1] <= 2 * k * BLOCK:
        best, indices = jax.lax.top_k(cosine, k)
        return indices, best
    padded = jnp.pad(cosine, ((0, 0), (0, -cosine.shape[-1] % BLOCK)), constant_values=-jnp.inf)
    blocks = padded.reshape(len(queries), -1, BLOCK)
    chosen = jnp.sort(jax.lax.top_k(blocks.max(-1), k)[1], axis=-1)
    candidates = jnp.take_along_axis(blocks, chosen[..., None], axis=1).reshape(len(queries), -1)
    best, place = jax.lax.top_k(candidates, k)
    return jnp.take_along_axis(chosen, place // BLOCK, axis=1) * BLOCK + place % BLOCK, best


def nearest_over_mesh(
    queries: Embedding, references: Float[Array, "r p"], k: int, *, mesh: jax.sharding.Mesh, axis: str
) -> tuple[Int[Array, "b m"], Float[Array, "b m"]]:
    """The same where the references are sharded over a mesh axis: each device keeps its k best, the best of them win.

    Args:
      queries: [b, p] unit vectors, on every device.
      references: [r, p] unit vectors.
      k: how many.
      mesh, axis: whose devices share the references, in their order.

    Raises:
      ValueError: the axis does not divide the references.
    """
    if references.shape[0] % mesh.shape[axis]:
        raise ValueError(
            f"nearest_over_mesh: {references.shape[0]} references do not divide over {mesh.shape[axis]} devices of "
            f"axis {axis!r}; leave {references.shape[0] % mesh.shape[axis]} of them out."
        )
    part = jax.sharding.PartitionSpec

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(part(), part(axis)), out_specs=(part(), part()), check_vma=False
    )
    def search(queries, shard):
        indices, cosine = nearest(queries, shard, k)
        indices = indices + jax.lax.axis_index(axis) * shard.shape[0]
        indices, cosine = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (indices, cosine))
        best, place = jax.lax.top_k(cosine, min(k, cosine.shape[1]))
        return jnp.take_along_axis(indices, place, axis=1), best

    return search(queries, references)


# --- weights ---


def weigh(
    indices: Int[Array, "b m"], cosine: Float[Array, "b m"], config: NeighborConfig, bandwidth: Float[Array, ""]
) -> Neighbors:
    """Returns neighbours with the weights of the kernel; those outside of the ball, or that do not exist, get 0.

    Args:
      indices, cosine: [b, m] from `nearest`, best first; a cosine of -inf or NaN is nobody.
      config: kernel and ball.
      bandwidth: [] length scale of the kernel, unless config.perplexity finds one for each input.
    """
    counts = cosine > -jnp.inf
    cosine = jnp.clip(cosine, -1, 1)
    distance = jnp.sqrt(2 - 2 * cosine)
    if config.epsilon is not None:
        counts &= distance <= config.epsilon
    kernel = KERNELS[config.kernel]

    def weights(bandwidth):
        return _shares(jnp.where(counts, kernel(distance / bandwidth, cosine), -jnp.inf))

    if config.perplexity:
        bandwidth = _bandwidth_of_each(weights, jnp.maximum(config.perplexity * counts.sum(-1), 1))
    return Neighbors(
        indices=jnp.where(counts, indices, 0),
        distance=jnp.where(counts, distance, jnp.inf),
        weights=weights(bandwidth),
    )


def _shares(logarithms: Float[Array, "b m"]) -> Float[Array, "b m"]:
    """Returns weights of sum 1, however small all of them are before, or 0 where nobody counts."""
    largest = logarithms.max(-1, keepdims=True)
    below = jnp.minimum(logarithms - jnp.where(largest > -jnp.inf, largest, 0), 0)
    # what is computed twice may be rounded in two ways, and far from 0 roundings are large: the first is 0 by name
    is_first = jnp.arange(logarithms.shape[-1]) == jnp.argmax(logarithms, axis=-1, keepdims=True)
    weights = jnp.exp(jnp.where(is_first & (largest > -jnp.inf), 0, below))
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1)


def _bandwidth_of_each(weights: Callable, target: Float[Array, "b"]) -> Float[Array, "b 1"]:
    """Bisects log bandwidths until the effective number of neighbours, which grows with them, is the target."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        narrow = target * (weights(jnp.exp(middle)[:, None]) ** 2).sum(-1) > 1
        return jnp.where(narrow, middle, low), jnp.where(narrow, high, middle)

    start = jnp.full_like(target, math.log(1e-4)), jnp.full_like(target, math.log(1e2))
    low, high = jax.lax.fori_loop(0, 30, halve, start)
    return jnp.exp((low + high) / 2)[:, None]


def leave_one_out(
    references: Float[np.ndarray, "r p"], sources: Shaped[np.ndarray, "r"], k: int, batch_size: int = 500
) -> tuple[Int[np.ndarray, "r m"], Float[np.ndarray, "r m"]]:
    """Returns indices and cosines of each reference's neighbours among those of other sources, m = min(k, r).

    Args:
      references: [r, p] unit vectors.
      sources: [r] whatever says that two references come from the same thing.
      k: how many; where there are fewer, the cosine is -inf.
      batch_size: references looked up at a time.
    """
    num, batch_size = len(references), min(batch_size, len(references))
    vectors, source = jnp.asarray(references), jnp.asarray(np.unique(sources, return_inverse=True)[1])

    rows = [np.minimum(np.arange(start, start + batch_size), num - 1) for start in range(0, num, batch_size)]
    found = [jax.device_get(_others(vectors, source, batch, k)) for batch in rows]
    indices, cosine = (np.concatenate(parts)[:num] for parts in zip(*found, strict=True))
    return indices, cosine


@functools.partial(jax.jit, static_argnames="k")
def _others(vectors, source, rows, k: int):
    return nearest(vectors[rows], vectors, k, excluded=source[rows][:, None] == source)


def median_bandwidth(cosine: Float[np.ndarray, "r m"]) -> float:
    """Returns the median distance to the last of k neighbours, from leave_one_out; 1 where nobody has that many."""
    last = cosine[:, -1]
    last = last[np.isfinite(last)]
    return float(max(np.median(np.sqrt(np.maximum(2 - 2 * last, 0))), 1e-3)) if last.size else 1.0
