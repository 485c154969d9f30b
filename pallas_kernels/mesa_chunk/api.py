"""The public operator: checks, casts, documents; then the differentiable core."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, manual
from pallas_kernels.mesa_chunk import pallas_gpu, pallas_tpu, vjp
from pallas_kernels.mesa_chunk.contract import (
    LOWEST_LOG_DECAY,
    MesaState,
    SolveReport,
    check_inputs,
    check_segment_ids,
    solver_dtype,
    zero_state,
)
from pallas_kernels.mesa_chunk.reference import mesa_chunk_reference
from pallas_kernels.mesa_chunk.solver import SolverConfig, check_solver

KERNELS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}


def mesa_chunk(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    log_decay: Float[Array, "b t h"],
    beta: Float[Array, "b t h"],
    ridge: Float[Array, "h k"],
    state: MesaState | None = None,
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    solver: SolverConfig = SolverConfig(),
    with_report: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h v"], MesaState, *tuple[SolveReport, ...]]:
    """Reads each query out of the linear map that fits the context so far best (arXiv 2506.05233, eq. 8).

    With gamma_t = exp(log_decay_t), per batch entry and head:

        H_t = gamma_t H_{t-1} + beta_t k_t k_t^T        G_t = gamma_t G_{t-1} + beta_t k_t v_t^T
        x_t = (H_t + diag(ridge))^{-1} q_t              o_t = G_t^T x_t

    x_t comes from conjugate gradient, its gradient from the implicit function theorem: a second solve with the same
    matrices, no unrolling. States and solver are float32 whatever the inputs are; memory grows linearly with t. Under
    `jax.checkpoint`, the policy save_only_these_names("mesa_solution") spares the backward pass the forward solve.
    Differentiable once, in reverse mode; implementation="reference" is so as often as one likes, in either.

    A number in a real token that is not finite spoils its head from its chunk on, earlier tokens of the chunk and other
    documents among it: what keeps tokens apart is a factor of 0, and 0 times NaN is NaN.

    Args:
      q, k: queries and keys, usually of unit length.
      v: values; V may differ from K.
      log_decay: log of the forget gate, <= 0; below -80 counts as forgetting everything.
      beta: input strength, >= 0.
      ridge: diagonal regularisation Lambda, > 0, which is checked where its values are known: outside jit.
      state: what came before; None starts empty.
      segment_ids: number of the document each token belongs to; documents do not see each other, and `state` belongs
        to the first one. Ids must not decrease along t. Negative ids mark padding, wherever it stands: it is ignored
        whatever it holds, its outputs are 0, and the state passes through it.
      solver: when a token's solve ends.
      with_report: also return how well each token was solved.
      implementation: "reference" (dense solves token by token, differentiated by JAX; exact whatever the budget),
        "xla", "pallas_tpu" and "pallas_gpu" (kernels, on these platforms alone), or None: the kernel where the mesh in
        use, or else this process, is of TPUs and it can run this; "xla" elsewhere, on GPUs until kernels are timed.

    Returns:
      (out [b, t, h, v] in the dtype of v, state after the last token), and a SolveReport if asked for.

    Raises:
      TypeError, ValueError: an argument's dtype, rank, size or value does not fit; the message names it.
      NotImplementedError: the named implementation cannot run this.
    """
    check_solver("mesa_chunk", solver)
    check_inputs("mesa_chunk", q, k, v, log_decay, beta, ridge, state, time_axis=True)
    out_dtype, dtype = v.dtype, solver_dtype(q, k, v, log_decay, beta, ridge)
    kernels = {name: kernel.why_not(dtype, q.shape[-1], v.shape[-1]) for name, kernel in KERNELS.items()}
    chosen = dispatch.resolve("mesa_chunk", implementation, kernels)
    state = zero_state(q, v) if state is None else state
    if segment_ids is None:
        starts = jnp.zeros(q.shape[:2], jnp.int32)
    else:
        check_segment_ids("mesa_chunk", segment_ids, q.shape[:2])
        starts = document_starts(segment_ids)
        q, k, v, log_decay, beta = _mask_padding(segment_ids, q, k, v, log_decay, beta)
    # the gate of a document's first token acts on nothing; a constant in its place has no rounding for a gradient
    log_decay = jnp.where(starts[..., None] == 1, 0, jnp.maximum(log_decay, LOWEST_LOG_DECAY))
    q, k, v, log_decay, beta, ridge = (x.astype(dtype) for x in (q, k, v, log_decay, beta, ridge))
    inputs = manual.vary_alike((q, k, v, log_decay, beta, ridge, state.astype(dtype), starts))
    if chosen == "reference":
        out, final, report = mesa_chunk_reference(*inputs)
    else:
        out, final, report = vjp.mesa_chunk(inputs, solver, chosen)
    # kept by the same remat policy as the solutions: what uses the output would otherwise solve again to have it back
    out = checkpoint_name(out.astype(out_dtype), "mesa_solution")
    return (out, final, report) if with_report else (out, final)


def document_starts(segment_ids: jax.Array) -> jax.Array:
    """Returns [b, t] int32, 1 where a token's document is not that of the last real token before it."""
    documents = jax.lax.cummax(segment_ids, axis=1)
    before = jnp.concatenate([documents[:, :1], documents[:, :-1]], axis=1)
    return ((before >= 0) & (documents != before)).astype(jnp.int32)


def _mask_padding(segment_ids, *sequences):
    """Sets [b, t, ...] to 0 where the id is negative: gate 1, strength 0, and no NaN of the padding survives."""
    real = segment_ids >= 0
    return tuple(jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0) for x in sequences)
