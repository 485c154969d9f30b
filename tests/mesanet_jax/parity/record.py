"""Writes down what other people's code computes for the layers of cases.py: values and gradients, in float32.

  pip install -e .[bench] && python -m tests.mesanet_jax.parity.record

Whose code that is says experiments/bench/public_mixers.py.
"""

import flax
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from experiments.bench.public_mixers import LAYERS, compute, naive
from tests.mesanet_jax.parity.cases import CONFIG, EXPECTED, MODEL, TOKENS, draw


def record(mixer: str) -> dict[str, np.ndarray]:
    """Returns y, and the gradients of x and of every parameter by its path."""
    case = draw(mixer)
    flat = flax.traverse_util.flatten_dict(case.params, sep="/")
    params = {name: torch.tensor(value, requires_grad=True) for name, value in flat.items()}
    x = torch.tensor(case.x, requires_grad=True)
    y, _ = compute(mixer, CONFIG, params, x)
    y.backward(torch.tensor(case.dy))
    grads = {f"d {name}": value.grad.numpy() for name, value in params.items()}
    return {"y": y.detach().numpy(), "dx": x.grad.numpy(), **grads}


def record_model() -> None:
    """Writes a small checkpoint as flash-linear-attention would, and the logits of its layers one after another."""
    rng, d, h, k, f, y = np.random.default_rng(0), 12, 2, 8, 20, 31
    block = {
        "attn_norm.weight": (d,),
        **{f"attn.{name}_proj.weight": (h * k, d) for name in "qkv"},
        **{f"attn.{name}_proj.{part}": shape for name in "ab" for part, shape in (("weight", (h, d)), ("bias", (h,)))},
        **{f"attn.{name}_conv1d.weight": (h * k, 1, 4) for name in "qk"},
        "attn.lambda_params": (h * k,),
        "attn.o_norm.weight": (k,),
        "attn.o_proj.weight": (d, h * k),
        "mlp_norm.weight": (d,),
        "mlp.gate_proj.weight": (f, d),
        "mlp.up_proj.weight": (f, d),
        "mlp.down_proj.weight": (d, f),
    }
    shapes = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    shapes |= {"model.embeddings.weight": (y, d), "model.norm.weight": (d,), "lm_head.weight": (y, d)}
    w = {n: torch.tensor(rng.normal(size=s), dtype=torch.float32) * 0.3 + ("norm" in n) for n, s in shapes.items()}
    save_file(w, MODEL / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.tensor(TOKENS)
    x = w["model.embeddings.weight"][tokens]
    for i in range(2):
        own = {name: w[f"model.layers.{i}.{name}"] for name in block}
        x = x + theirs(own, F.rms_norm(x, (d,), own["attn_norm.weight"], 1e-6), h)
        y = F.rms_norm(x, (d,), own["mlp_norm.weight"], 1e-6)
        hidden = F.silu(y @ own["mlp.gate_proj.weight"].T) * (y @ own["mlp.up_proj.weight"].T)
        x = x + hidden @ own["mlp.down_proj.weight"].T
    x = F.rms_norm(x, (d,), w["model.norm.weight"], 1e-6)
    logits = {"untied": x @ w["lm_head.weight"].T, "tied": x @ w["model.embeddings.weight"].T}
    np.savez_compressed(MODEL / "logits.npz", **{name: value.numpy() for name, value in logits.items()})


def theirs(w: dict[str, Tensor], x: Tensor, heads: int) -> Tensor:
    """The layer of flash-linear-attention, its recurrence by the naive path."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1))

    def short(name: str) -> Tensor:
        taps = w[f"attn.{name}_conv1d.weight"]
        padded = F.pad((x @ w[f"attn.{name}_proj.weight"].T).transpose(1, 2), (taps.shape[-1] - 1, 0))
        return F.normalize(split(F.silu(F.conv1d(padded, taps, groups=len(taps)).transpose(1, 2))), dim=-1)

    a, b = (F.linear(x, w[f"attn.{name}_proj.weight"], w[f"attn.{name}_proj.bias"]) for name in "ab")
    ridge = split(F.softplus(w["attn.lambda_params"]) + 0.25)
    value = split(x @ w["attn.v_proj.weight"].T)
    exact = naive("mesa_net").naive_mesa_net_exact
    out, *_ = exact(short("q"), short("k"), value, F.logsigmoid(a), ridge, torch.sigmoid(b))
    out = F.rms_norm(out, out.shape[-1:], w["attn.o_norm.weight"], 1e-6)
    return out.flatten(-2) @ w["attn.o_proj.weight"].T


if __name__ == "__main__":
    EXPECTED.mkdir(exist_ok=True)
    record_model()
    for mixer in LAYERS:
        np.savez_compressed(EXPECTED / f"{mixer}.npz", **record(mixer))
        print(mixer)
