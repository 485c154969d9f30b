"""Truths in numpy float64 that share no code with the libraries: what the paper says, written out and slow."""

from typing import NamedTuple

import numpy as np


class Mesa(NamedTuple):
    """Results of the Mesa layer on [b, t, h, ...] inputs."""

    out: np.ndarray  # [b, t, h, v]
    kk: np.ndarray  # [b, h, k, k]
    kv: np.ndarray  # [b, h, k, v]
    solution: np.ndarray  # [b, t, h, k]
    matrices: np.ndarray  # [b, t, h, k, k], H_t + Lambda
    memories: np.ndarray  # [b, t, h, k, v], G_t


def mesa(q, k, v, log_decay, beta, ridge, kk, kv, segment_ids=None) -> Mesa:
    """Token by token: the recurrences of arXiv 2506.05233, section 2, and one dense solve each."""
    batch, length, heads, key_dim = q.shape
    keep = _gates(log_decay, segment_ids)
    memories = np.empty((batch, length, heads, key_dim, v.shape[-1]))
    matrices = np.empty((batch, length, heads, key_dim, key_dim))
    final_kk, final_kv = np.array(kk, np.float64), np.array(kv, np.float64)
    for b, t, h in np.ndindex(batch, length, heads):
        key, value = k[b, t, h], v[b, t, h]
        final_kk[b, h] = keep[b, t, h] * final_kk[b, h] + beta[b, t, h] * np.outer(key, key)
        final_kv[b, h] = keep[b, t, h] * final_kv[b, h] + beta[b, t, h] * np.outer(key, value)
        matrices[b, t, h] = final_kk[b, h] + np.diag(ridge[h])
        memories[b, t, h] = final_kv[b, h]
    solution = np.linalg.solve(matrices, q[..., None])[..., 0]
    out = np.einsum("bthk,bthkv->bthv", solution, memories)
    return Mesa(out, final_kk, final_kv, solution, matrices, memories)


def mesa_gradients(q, k, v, log_decay, beta, ridge, kk, kv, dout, dkk, dkv, segment_ids=None) -> dict[str, np.ndarray]:
    """Gradients of <dout, out> + <dkk, final kk> + <dkv, final kv> by the paper's sums over all pairs of tokens.

    arXiv 2506.05233, appendix C, with the input strength written out. Nothing is chunked and no autodiff is involved.
    """
    forward = mesa(q, k, v, log_decay, beta, ridge, kk, kv, segment_ids)
    gates = _gates(log_decay, segment_ids)
    adjoint_rhs = np.einsum("bthkv,bthv->bthk", forward.memories, dout)
    y = np.linalg.solve(forward.matrices, adjoint_rhs[..., None])[..., 0]
    grads = {name: np.zeros(x.shape) for name, x in dict(q=q, k=k, v=v, log_decay=log_decay, beta=beta).items()}
    grads |= {"ridge": np.zeros(ridge.shape), "kk": np.zeros(kk.shape), "kv": np.zeros(kv.shape), "q": y}
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        of_head = _head_gradients(
            *(a[b, :, h] for a in (forward.solution, y, dout, k, v, beta, gates)), ridge[h], kk[b, h], kv[b, h],
            dkk[b, h], dkv[b, h],
        )  # fmt: skip
        for name in ("k", "v", "log_decay", "beta"):
            grads[name][b, :, h] = of_head[name]
        grads["ridge"][h] += of_head["ridge"]
        grads["kk"][b, h], grads["kv"][b, h] = of_head["kk"], of_head["kv"]
    return grads


def _head_gradients(x, y, e, k, v, beta, gates, ridge, kk, kv, dkk, dkv) -> dict[str, np.ndarray]:
    """One head: x, y, k [t, k], e, v [t, v], beta, gates [t]; zeta[t, s] multiplies the gates after s up to t."""
    length = len(k)
    zeta = np.zeros((length, length))
    for s in range(length):
        zeta[s:, s] = np.cumprod(np.concatenate([[1.0], gates[s + 1 :]]))
    to_end = zeta[-1]
    left = np.einsum("ts,tk,ts->sk", zeta, x, e @ v.T - y @ k.T) + to_end[:, None] * (v @ dkv.T + k @ dkk.T)
    right = -np.einsum("ts,tk,ts->sk", zeta, y, x @ k.T) + to_end[:, None] * (k @ dkk)
    # cotangents of the states right after token s, through the outputs of all later tokens
    dkk_at = to_end[:, None, None] * dkk - np.einsum("ts,ti,tj->sij", zeta, y, x)
    dkv_at = to_end[:, None, None] * dkv + np.einsum("ts,ti,tj->sij", zeta, x, e)
    dgates, state_kk, state_kv = np.zeros(length), kk, kv
    for s in range(length):
        dgates[s] = np.sum(dkk_at[s] * state_kk) + np.sum(dkv_at[s] * state_kv)
        state_kk = gates[s] * state_kk + beta[s] * np.outer(k[s], k[s])
        state_kv = gates[s] * state_kv + beta[s] * np.outer(k[s], v[s])
    return {
        "k": beta[:, None] * (left + right),
        "v": beta[:, None] * (np.einsum("ts,ts,tv->sv", zeta, x @ k.T, e) + to_end[:, None] * (k @ dkv)),
        "beta": np.sum(left * k, axis=1),
        "log_decay": gates * dgates,
        "ridge": -np.sum(x * y, axis=0),
        "kk": gates[0] * dkk_at[0],
        "kv": gates[0] * dkv_at[0],
    }


def _gates(log_decay, segment_ids) -> np.ndarray:
    """Forget gates [b, t, h]; 0 at the first token of every document but the first."""
    gates = np.exp(np.asarray(log_decay, np.float64))
    if segment_ids is None:
        return gates
    first = np.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    return np.where(first[..., None], 0.0, gates)


def router_descent(
    log_routing, readout, offset, labels, weights, learning_rates, *, groups, optimizer="sgd", prox=0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Routing [b, e] and surrogate loss [b], input by input (arXiv 2502.20395, eq. 1 and 3)."""
    rows = [
        _descend(*row, learning_rates, groups, optimizer, prox)
        for row in zip(log_routing, readout, offset, labels, weights, strict=True)
    ]
    return np.stack([routing for routing, _ in rows]), np.array([loss for _, loss in rows])


def _descend(log_routing, readout, offset, labels, weights, learning_rates, groups, optimizer, prox):
    """One input: readout [m, e, y], offset [m, y], labels, weights [m]. Neighbours of weight 0 are not looked at."""
    neighbors = [(readout[m], offset[m], labels[m], weights[m]) for m in np.flatnonzero(weights)]
    logits, start = np.array(log_routing), _group_softmax(log_routing, groups)
    first, second = np.zeros_like(logits), np.zeros_like(logits)
    for count, learning_rate in enumerate(learning_rates, start=1):
        routing = _group_softmax(logits, groups)
        jacobian = np.diag(routing)
        for one in _slices(groups):
            jacobian[one, one] -= np.outer(routing[one], routing[one])
        slope = sum((w * r @ (_softmax(routing @ r + o) - np.eye(len(o))[y]) for r, o, y, w in neighbors), 0 * routing)
        pull_back = prox * (routing - start)
        if optimizer == "exponentiated":  # the multiplicative form: routing times exp, normalised by the softmax
            with np.errstate(divide="ignore"):
                logits = np.log(routing * np.exp(-learning_rate * (slope + pull_back)))
            continue
        direction = jacobian @ slope + pull_back
        if optimizer == "adam":
            first, second = 0.9 * first + 0.1 * direction, 0.999 * second + 0.001 * direction**2
            direction = first / (1 - 0.9**count) / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
        logits = logits - learning_rate * direction
    routing = _group_softmax(logits, groups)
    with np.errstate(divide="ignore"):
        return routing, -sum(w * np.log(_softmax(routing @ r + o)[y]) for r, o, y, w in neighbors)


def _slices(groups) -> list[slice]:
    return [slice(end - size, end) for size, end in zip(groups, np.cumsum(groups), strict=True)]


def _group_softmax(logits: np.ndarray, groups) -> np.ndarray:
    return np.concatenate([_softmax(logits[one]) for one in _slices(groups)])


def _softmax(x: np.ndarray) -> np.ndarray:
    shares = np.exp(x - x.max())
    return shares / shares.sum()
