"""The public operator: checks, absent neighbours, the choice of an implementation; then the differentiable core."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, manual
from pallas_kernels.router_descent import pallas_tpu, vjp
from pallas_kernels.router_descent.contract import Inputs, check_inputs, make_rule, prepare
from pallas_kernels.router_descent.reference import router_descent_reference


def router_descent(
    log_routing: Float[Array, "b e"],
    readout: Float[Array, "b m e y"],
    offset: Float[Array, "b m y"],
    labels: Int[Array, "b m"],
    weights: Float[Array, "b m"],
    learning_rates: Float[Array, "s"],
    *,
    groups: tuple[int, ...] | None = None,
    optimizer: str = "sgd",
    prox: float = 0.0,
    implementation: str | None = None,
) -> tuple[Float[Array, "b e"], Float[Array, "b"]]:
    """Descends from each input's routing r towards one under which its neighbours are answered correctly.

    Neighborhood gradient descent of R2-T2 (arXiv 2502.20395, eq. 1 and 3) on models whose logits are affine in the
    routing. Per input, from theta = log_routing, at each of s steps:

        r = softmax of theta, group by group             z_m = sum_e r_e readout_m[e] + offset_m
        L(r) = sum_m weights_m CE(z_m, labels_m)         theta <- theta - learning_rate * update(dL/dtheta)

    The arithmetic is float32 (float64 if an input is), memory grows as the read-outs do, and everything floating-point
    has a gradient (in reverse mode). A row of the batch is computed from that row alone; on CPUs "xla" gives it the
    same bits in any batch.

    Args:
      log_routing: logarithm of where to start, up to a constant per group; -inf keeps an expert off for good.
      readout, offset: each neighbour's logits as an affine function of the routing. An offset of -inf masks an answer
        (the read-out there must still be finite); a neighbour whose label is masked has loss inf and a finite gradient.
      labels: the neighbours' answers, 0 to y - 1.
      weights: of the neighbours, >= 0, used as they are. A neighbour of weight 0 is ignored whatever it holds, and
        nothing of it gets a gradient.
      learning_rates: one per step.
      groups: sizes of the groups of experts whose weights sum to 1; None is one group of all.
      optimizer: "sgd"; "adam" (decays 0.9 and 0.999, bias-corrected); or "exponentiated", which takes dL/dr for
        dL/dtheta: mirror descent, routing times exp(-learning_rate * dL/dr), normalised.
      prox: adds prox * KL(routing at the start || r) to L in every step, for any optimizer as its gradient in theta.
      implementation: "reference" (the loss as written, jax.grad at every step), "xla", "pallas_tpu", or None: the
        kernel where the mesh in use, or else this process, is of TPUs and it fits; "xla" elsewhere.

    Returns:
      (routing after the last step, L there without the proximal term).

    Raises:
      TypeError, ValueError: an argument's kind, shape, value or choice does not fit; the message names it.
      NotImplementedError: the named implementation cannot run this here.
    """
    inputs = Inputs(log_routing, readout, offset, labels, weights, learning_rates)
    check_inputs(inputs)
    rule = make_rule(groups, optimizer, prox, readout.shape[2])
    inputs = manual.vary_alike(prepare(inputs))
    chosen = dispatch.resolve("router_descent", implementation, {"pallas_tpu": pallas_tpu.why_not(inputs)})
    if chosen == "reference":
        return router_descent_reference(inputs, rule)
    return vjp.router_descent(inputs, rule, chosen)
