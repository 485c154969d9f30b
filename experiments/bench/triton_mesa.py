"""flash-linear-attention's Triton kernels of the Mesa layer, with as many steps as they take unless told: 30."""

from collections.abc import Callable

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from fla.ops.mesa_net import chunk_mesa_net, mesa_net_decoding_one_step  # pyright: ignore[reportMissingImports]
from fla.ops.mesa_net.chunk import chunk_fwd_mesa_net_fwd  # pyright: ignore[reportMissingImports]

NAME = "triton"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on which Triton has but its interpreter


class Layer:
    """Forward and backward on operands (q, k, v, log_decay, beta, ridge, dout), in numpy."""

    def __init__(self, operands: list[np.ndarray]):
        self._exact = list(map(_tensor, operands))
        self._operands = [x.to(torch.bfloat16) if x.ndim == 4 else x for x in self._exact]

    def train(self):
        """Outputs and the gradients of the six inputs."""
        found = _forward_backward(self._operands)
        _wait()
        return found

    def solutions(self) -> tuple[np.ndarray, np.ndarray]:
        """Solutions of the forward and of the adjoint systems, [b, t, h, k] each."""
        q, k, v, log_decay, beta, ridge, _ = self._exact
        halves = q.to(torch.float16), k.to(torch.float16)  # as their layer has it
        _, x, *_ = chunk_fwd_mesa_net_fwd(*halves, v, log_decay, beta, ridge, cu_seqlens=None)
        _, (y, *_) = _forward_backward(self._exact)
        return x.float().cpu().numpy(), y.float().cpu().numpy()


def decoder(q, k, v, log_decay, beta, ridge, kk, kv) -> Callable[[], object]:
    """Returns a function that decodes a token [b, h, ...], in numpy, after states that it leaves as they are."""
    q, k, v, log_decay, beta, ridge, kk, kv = map(_tensor, (q, k, v, log_decay, beta, ridge, kk, kv))

    def run():
        found = mesa_net_decoding_one_step(q, k, v, log_decay, ridge, beta, kk, kv)
        _wait()
        return found

    return run


def _forward_backward(operands: list[torch.Tensor]):
    *inputs, dout = operands
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, *_ = chunk_mesa_net(*inputs)
    return out, torch.autograd.grad(out, inputs, dout.to(out.dtype))


def _tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(x, np.float32)).to(DEVICE)


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
