"""Writes down what other people's code computes for the layers of cases.py: values and gradients, in float32.

  pip install -e .[parity] && python -m tests.mesanet_jax.parity.record

The recurrences are the naive ones of flash-linear-attention and the native one of transformers' xLSTM; Hawk's block and
both kinds of attention are transformers' whole layers; what is around a recurrence is PyTorch's.
"""

import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from types import ModuleType

import flax
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import MistralConfig, RecurrentGemmaConfig
from transformers.models.mistral import modeling_mistral
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock
from transformers.models.xlstm import modeling_xlstm

from tests.mesanet_jax.parity.cases import CONFIG, EXPECTED, LENGTH, MODEL, TOKENS, draw

C = CONFIG
GATE_CAP = 15.0  # of xLSTM-7B


def naive(name: str) -> ModuleType:
    """Returns a module of flash-linear-attention by its file: the package itself wants a GPU."""
    (file,) = (f for f in importlib.metadata.files("fla-core") if str(f) == f"fla/ops/{name}/naive.py")
    spec = importlib.util.spec_from_file_location(name, file.locate())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def project(p: dict, name: str, x: Tensor) -> Tensor:
    """[b, t, d] -> [b, t, h, k]."""
    return torch.einsum("btd,dhk->bthk", x, p[f"{name}/kernel"])


def convolved(p: dict, name: str, x: Tensor) -> Tensor:
    """torch's convolution, which looks ahead and has its taps the other way round."""
    taps = p[f"{name}/taps"].flatten(1).T.flip(1)[:, None]  # [h k, 1, w]
    padded = F.pad(x.flatten(2).transpose(1, 2), (taps.shape[-1] - 1, 0))
    return F.conv1d(padded, taps, groups=taps.shape[0]).transpose(1, 2).reshape(x.shape)


def gate(p: dict, name: str, x: Tensor) -> Tensor:
    """[b, t, h]."""
    return F.linear(x, p[f"{name}/kernel"].T, p[f"{name}/bias"])


def with_memory(recurrence: Callable, unit: bool = True) -> Callable:
    """Returns the layer around a recurrence of (p, x, q, k, v)."""

    def layer(p: dict, x: Tensor) -> Tensor:
        q, k = (convolved(p, f"{name}_conv", project(p, name, x)) for name in ("query", "key"))
        if unit:
            q, k = (F.normalize(F.silu(y), dim=-1) for y in (q, k))
        out = recurrence(p, x, q, k, project(p, "value", x))
        out = F.rms_norm(out, out.shape[-1:], eps=C.norm_eps) * p["out_norm/scale"]
        return torch.einsum("bthv,hvd->btd", out, p["out/kernel"])

    return layer


def mesa(p, x, q, k, v):
    ridge = C.ridge_floor + F.softplus(p["ridge"])
    beta = torch.sigmoid(gate(p, "input_gate", x))
    return naive("mesa_net").naive_mesa_net_exact(q, k, v, log_forget(p, x), ridge, beta)[0]


def log_forget(p: dict, x: Tensor) -> Tensor:
    return F.logsigmoid(gate(p, "forget_gate", x))


def gla(p, x, q, k, v):
    strength = torch.sigmoid(gate(p, "input_gate", x))[..., None]
    return naive("simple_gla").naive_recurrent_simple_gla(q, k, strength * v, log_forget(p, x), scale=1.0)[0]


def mamba2(p, x, q, k, v):
    return naive("simple_gla").naive_recurrent_simple_gla(q, k, v, log_forget(p, x), scale=1.0)[0]


def deltanet(p, x, q, k, v):
    beta = torch.sigmoid(gate(p, "input_gate", x))
    q = q * math.sqrt(q.shape[-1])  # theirs scales by the inverse
    heads_first = (y.transpose(1, 2) for y in (q, k, v, beta))
    return naive("delta_rule").delta_rule_recurrence(*heads_first)[0].transpose(1, 2)


def gated_deltanet(p, x, q, k, v):
    beta = torch.sigmoid(gate(p, "input_gate", x))
    rule = naive("gated_delta_rule").naive_recurrent_gated_delta_rule
    return rule(q, k, v, beta, log_forget(p, x), scale=1.0)[0]


def mlstm(p, x, q, k, v):
    igate, fgate = (
        modeling_xlstm.soft_cap(gate(p, f"{name}_gate", x), GATE_CAP).transpose(1, 2) for name in ("input", "forget")
    )
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    found = modeling_xlstm.mlstm_recurrent_sequence_native(q, k, v, igate, fgate, eps=0.0)
    return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)


def hawk(p: dict, x: Tensor) -> Tensor:
    width = C.channels
    config = RecurrentGemmaConfig(
        hidden_size=C.model_dim, lru_width=width, num_attention_heads=C.num_heads, conv1d_width=C.conv_width
    )
    block = RecurrentGemmaRecurrentBlock(config, 0)
    linear_out = p["out/kernel"].flatten(0, 1).T
    weights = {
        "linear_y.weight": p["gate/kernel"].flatten(1).T,
        "linear_y.bias": torch.zeros(width),
        "linear_x.weight": p["input/kernel"].flatten(1).T,
        "linear_x.bias": torch.zeros(width),
        "linear_out.weight": linear_out,
        "linear_out.bias": torch.zeros(C.model_dim),
        "conv_1d.weight": p["conv/taps"].flatten(1).T.flip(1)[:, None],
        "conv_1d.bias": torch.zeros(width),
        "rg_lru.recurrent_param": p["decay"].flatten(),
        "rg_lru.input_gate_weight": p["input_gate/kernel"],
        "rg_lru.input_gate_bias": p["input_gate/bias"],
        "rg_lru.recurrent_gate_weight": p["recurrence_gate/kernel"],
        "rg_lru.recurrent_gate_bias": p["recurrence_gate/bias"],
    }
    positions = torch.arange(1, LENGTH + 1)[None]  # at position 0 theirs lets the input in unscaled; the paper does not
    return torch.func.functional_call(block, weights, (x, positions, None), {"use_cache": False})[0]


def attention(window: int | None) -> Callable:
    """Mistral's attention, with rotary positions."""

    def layer(p: dict, x: Tensor) -> Tensor:
        config = MistralConfig(
            hidden_size=C.model_dim,
            num_attention_heads=C.num_heads,
            num_key_value_heads=C.num_heads,
            head_dim=C.key_dim,
            sliding_window=window,
            attn_implementation="eager",
        )
        block = modeling_mistral.MistralAttention(config, 0)
        names = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
        weights = {f"{theirs}.weight": p[f"{ours}/kernel"].flatten(1).T for theirs, ours in names.items()}
        weights["o_proj.weight"] = p["out/kernel"].flatten(0, 1).T
        places = torch.arange(LENGTH)
        angles = modeling_mistral.MistralRotaryEmbedding(config)(x, places[None])
        lag = places[:, None] - places
        seen = (lag >= 0) & (lag < (window or LENGTH))
        mask = torch.where(seen, 0.0, -torch.inf)[None, None]
        return torch.func.functional_call(block, weights, (x, angles, mask))[0]

    return layer


LAYERS = {
    "mesa": with_memory(mesa),
    "gla": with_memory(gla),
    "mamba2": with_memory(mamba2),
    "mlstm": with_memory(mlstm, unit=False),
    "deltanet": with_memory(deltanet),
    "gated_deltanet": with_memory(gated_deltanet),
    "hawk": hawk,
    "sliding_window": attention(C.window),
    "attention": attention(None),
}


def record(mixer: str) -> dict[str, np.ndarray]:
    """Returns y, and the gradients of x and of every parameter by its path."""
    case = draw(mixer)
    flat = flax.traverse_util.flatten_dict(case.params, sep="/")
    params = {name: torch.tensor(value, requires_grad=True) for name, value in flat.items()}
    x = torch.tensor(case.x, requires_grad=True)
    y = LAYERS[mixer](params, x)
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
