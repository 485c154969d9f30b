"""The yardstick: 30 plain steps of conjugate gradient, chunkwise, in PyTorch (arXiv 2506.05233, appendix C).

Written to be fast: batched products over all chunks and heads, in-place vector updates, one `baddbmm` where two
products add up, denormals flushed. The backward pass is the implicit one, by the same formulas as ours.
"""

from typing import NamedTuple

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

torch.set_flush_denormal(True)


class Tiles(NamedTuple):
    """All chunks of all heads: [h * n, c, ...]."""

    k: "torch.Tensor"
    v: "torch.Tensor"
    beta: "torch.Tensor"
    within: "torch.Tensor"  # [h * n, c, c]
    into: "torch.Tensor"  # [h * n, c, 1]
    kk: "torch.Tensor"
    kv: "torch.Tensor"
    ridge: "torch.Tensor"  # [h * n, 1, k]


def tensors(arrays) -> list["torch.Tensor"]:
    """Copies numpy or JAX arrays into float32 tensors."""
    return [torch.from_numpy(np.array(x, np.float32)) for x in arrays]


def forward(q, k, v, log_decay, beta, ridge, *, chunk_length: int, steps: int = 30):
    """Returns outputs and solutions as chunks, for inputs [1, t, h, ...] from an empty state."""
    tiles = _tiles(k, v, log_decay, beta, ridge, chunk_length)
    scores = tiles.within * tiles.beta[:, None, :]
    x = _conjugate_gradient(_chunks(q, chunk_length), tiles, scores, steps)
    weights = torch.bmm(x, tiles.k.mT).mul_(scores)
    return torch.baddbmm(tiles.into * torch.bmm(x, tiles.kv), weights, tiles.v), x


def forward_backward(q, k, v, log_decay, beta, ridge, dout, *, chunk_length: int, steps: int = 30):
    """Returns the output and the gradients of all inputs, as chunks."""
    out, x = forward(q, k, v, log_decay, beta, ridge, chunk_length=chunk_length, steps=steps)
    tiles = _tiles(k, v, log_decay, beta, ridge, chunk_length)
    heads, scores = k.shape[2], tiles.within * tiles.beta[:, None, :]
    dout = _chunks(dout, chunk_length)
    out_v = torch.bmm(dout, tiles.v.mT)
    rhs = torch.baddbmm(tiles.into * torch.bmm(dout, tiles.kv.mT), out_v * scores, tiles.k)
    y = _conjugate_gradient(rhs, tiles, scores, steps)
    faded = x * tiles.into
    added = torch.cat([-torch.bmm(y.mT, faded), torch.bmm(faded.mT, dout)], -1)
    dkk, dkv = _carry(added, tiles.into, heads, k.shape[-1], reverse=True)
    x_k = (torch.bmm(x, tiles.k.mT) * tiles.within).mT
    surprise = ((out_v - torch.bmm(y, tiles.k.mT)) * tiles.within).mT
    to_end, strength = tiles.within[:, -1, :, None], tiles.beta[..., None]
    left = torch.bmm(surprise, x) + to_end * (torch.bmm(tiles.v, dkv.mT) + torch.bmm(tiles.k, dkk.mT))
    right = to_end * torch.bmm(tiles.k, dkk) - torch.bmm(x_k, y)
    dv = strength * (torch.bmm(x_k, dout) + to_end * torch.bmm(tiles.k, dkv))
    dbeta = (left * tiles.k).sum(-1)
    dtotal = ((tiles.ridge * x * y).sum(-1) - tiles.beta * dbeta).reshape(heads, -1)
    dlog_decay = dtotal.flip(-1).cumsum(-1).flip(-1)
    dridge = -(x * y).reshape(heads, -1, x.shape[-1]).sum(1)
    return out, (y, strength * (left + right), dv, dlog_decay, dbeta, dridge)


def sequence(chunks, heads: int) -> np.ndarray:
    """[h * n, c, ...] -> [t, h, ...] in numpy."""
    return np.moveaxis(chunks.reshape(heads, -1, *chunks.shape[2:]).numpy(), 0, 1)


def matmul(x, y):
    """One product, for the measured peak."""
    return torch.mm(x, y)


def _tiles(k, v, log_decay, beta, ridge, chunk_length: int) -> Tiles:
    num_chunks, heads = k.shape[1] // chunk_length, k.shape[2]
    k, v, beta, log_decay = (_chunks(x, chunk_length) for x in (k, v, beta, log_decay))
    total = log_decay.cumsum(-1)
    later = torch.ones(chunk_length, chunk_length, dtype=torch.bool).triu(1)
    within = torch.exp((total[:, :, None] - total[:, None, :]).masked_fill(later, float("-inf")))
    into = torch.exp(total)[..., None]
    weighted = (k * (within[:, -1] * beta)[..., None]).mT
    added = torch.cat([weighted @ k, weighted @ v], -1)
    kk, kv = _carry(added, into, heads, k.shape[-1])
    return Tiles(k, v, beta, within, into, kk, kv, ridge.repeat_interleave(num_chunks, 0)[:, None, :])


def _carry(added, into, heads: int, key_dim: int, reverse: bool = False):
    """Runs state <- through * state + added over the chunks of each head; returns what every chunk starts from."""
    added = added.reshape(heads, -1, *added.shape[1:])
    through = into[:, -1].reshape(heads, -1, 1, 1)
    before, state = torch.empty_like(added), torch.zeros_like(added[:, 0])
    order = range(added.shape[1])
    for n in reversed(order) if reverse else order:
        before[:, n] = state
        state = torch.addcmul(added[:, n], through[:, n], state)
    before = before.flatten(0, 1)
    return before[..., :key_dim].contiguous(), before[..., key_dim:].contiguous()


def _conjugate_gradient(rhs, tiles: Tiles, scores, steps: int):
    keys = tiles.k.mT
    x, residual, direction = torch.zeros_like(rhs), rhs.clone(), rhs.clone()
    energy = (residual * residual).sum(-1, keepdim=True)
    for _ in range(steps):
        image = torch.baddbmm(direction * tiles.ridge, torch.bmm(direction, keys).mul_(scores), tiles.k)
        image.addcmul_(torch.bmm(direction, tiles.kk), tiles.into)
        step_size = energy / (direction * image).sum(-1, keepdim=True).clamp_min(1e-30)
        x.addcmul_(step_size, direction)
        residual.addcmul_(step_size, image, value=-1)
        before, energy = energy, (residual * residual).sum(-1, keepdim=True)
        direction = torch.addcmul(residual, energy / before.clamp_min(1e-30), direction)
    return x


def _chunks(x, chunk_length: int):
    """[1, t, h, ...] -> [h * n, c, ...]."""
    return x[0].movedim(1, 0).reshape(-1, chunk_length, *x.shape[3:])
