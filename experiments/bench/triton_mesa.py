"""flash-linear-attention's Triton kernels of the Mesa layer, with as many steps as they take unless told: 30."""

import os
from collections.abc import Callable

os.environ["FLA_CACHE_RESULTS"] = "0"  # of their tuning: what suits one length is not to be taken for another

import numpy as np
import torch  # pyright: ignore
from fla.ops.common import chunk_h  # pyright: ignore
from fla.ops.mesa_net import chunk_h_fwd, chunk_mesa_net, mesa_net_decoding_one_step  # pyright: ignore
from fla.ops.mesa_net.chunk_cg_solver_bwd import chunk_mesa_cg_bwd  # pyright: ignore
from fla.ops.mesa_net.chunk_cg_solver_fwd import chunk_mesa_cg_fwd  # pyright: ignore
from fla.ops.utils import chunk_local_cumsum  # pyright: ignore
from fla.ops.utils.constant import RCP_LN2  # pyright: ignore

NAME = "triton"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on which Triton has but its interpreter
CHUNK_LENGTH = 64  # theirs


class Layer:
    """Forward and backward on operands (q, k, v, log_decay, beta, ridge, dout), in numpy."""

    def __init__(self, operands: list[np.ndarray]):
        self._operands = [x.to(torch.bfloat16) if x.ndim == 4 else x for x in map(_tensor, operands)]
        _forget_tuning()

    def train(self):
        """Outputs and the gradients of the six inputs."""
        *inputs, dout = self._operands
        inputs = [x.detach().requires_grad_() for x in inputs]
        out, *_ = chunk_mesa_net(*inputs)
        found = out, *torch.autograd.grad(out, inputs, dout)
        _wait()
        return found

    def results(self) -> list[np.ndarray]:
        """Outputs and the gradients of the six inputs, in float32."""
        return [x.detach().float().cpu().numpy() for x in self.train()]


def solutions(operands: list[np.ndarray], adjoint_rhs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns solutions [b, t, h, k] of the forward systems, and of the adjoint ones for given right-hand sides.

    Both as the steps leave them, in float32. Their layer keeps them in float16, which rounds off more than is left to
    solve, but takes its outputs from these.
    """
    q, k, v, log_decay, beta, ridge, _ = map(_tensor, operands)
    k, v = k.to(torch.float16), v.to(torch.bfloat16)  # as their layer has them
    g = chunk_local_cumsum(log_decay, chunk_size=CHUNK_LENGTH, scale=RCP_LN2)
    kk, kv, *_ = chunk_h_fwd.chunk_mesa_fwd_h(
        k=k, v=v, g=g, beta=beta, h_init=None, h_kv_init=None, output_final_state=False
    )
    systems = {"k": k, "h": kk, "g_local_cumsum": g, "beta": beta, "lamb": ridge}
    x, _ = chunk_mesa_cg_fwd(q=q, v=v, h_kv=kv, **systems)
    y = chunk_mesa_cg_bwd(dq=_tensor(adjoint_rhs), **systems)
    return x.cpu().numpy(), y.cpu().numpy()


def decoder(tokens: list[tuple[np.ndarray, ...]], kk: np.ndarray, kv: np.ndarray) -> Callable[[], object]:
    """Returns a function that decodes tokens (q, k, v, log_decay, beta, ridge), one after the other; it goes on."""
    arguments = [[_tensor(x) for x in (*token[:4], token[5], token[4])] for token in tokens]
    state = [_tensor(kk), _tensor(kv)]

    def run():
        out = None
        for token in arguments:
            out, *state[:] = mesa_net_decoding_one_step(*token, *state)
        _wait()
        return out

    return run


def _forget_tuning() -> None:
    """Has the kernels that carry states tuned anew: their keys know nothing of lengths."""
    for module in (chunk_h, chunk_h_fwd):
        for kernel in vars(module).values():
            while hasattr(kernel, "fn"):
                getattr(kernel, "cache", {}).clear()
                kernel = kernel.fn


def _tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(x, np.float32)).to(DEVICE)


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
