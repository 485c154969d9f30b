"""The layers of mesanet_jax as other people's code computes them, in PyTorch.

The recurrences are those that flash-linear-attention and transformers publish for processors without Triton: token by
token, what results are compared with, or by chunks, what speed is. Hawk's block and both kinds of attention are
transformers' whole layers; what is around a recurrence is PyTorch's own. Nothing is compiled.
"""

import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import Tensor  # pyright: ignore[reportMissingImports]
from transformers import MistralConfig, RecurrentGemmaConfig  # pyright: ignore[reportMissingImports]
from transformers.models.mistral import modeling_mistral  # pyright: ignore[reportMissingImports]
from transformers.models.qwen3_next import modeling_qwen3_next  # pyright: ignore[reportMissingImports]
from transformers.models.recurrent_gemma import modeling_recurrent_gemma  # pyright: ignore[reportMissingImports]
from transformers.models.xlstm import modeling_xlstm  # pyright: ignore[reportMissingImports]

from mesanet_jax import MesaNetConfig

GATE_CAP = 15.0  # of xLSTM-7B
Params = dict[str, Tensor]  # by the path of ours, "query/kernel"


def compute(
    mixer: str, config: MesaNetConfig, params: Params, x: Tensor, state: Any = None, *, chunk: int | None = None
) -> tuple[Tensor, Any]:
    """Returns (y [b, t, d], state) of a mixer at x [b, t, d]; what follows on a state is a single token.

    Args:
      mixer: one of `mesanet_jax.mixers.MIXERS`.
      config: its sizes.
      params: its parameters.
      x: what it reads.
      state: that of the tokens before.
      chunk: tokens that are read at once; None reads one after another.
    """
    return LAYERS[mixer](config, chunk, params, x, state)


def chunks(mixer: str) -> tuple[int, ...]:
    """Returns how many tokens its public code may well read at once; one number where it makes no difference."""
    return (64, 128, 256) if mixer in RECURRENCES else (256,)


@cache
def naive(name: str) -> ModuleType:
    """Returns a module of flash-linear-attention by its file: the package itself wants a GPU."""
    (file,) = (f for f in importlib.metadata.files("fla-core") or () if str(f) == f"fla/ops/{name}/naive.py")
    spec = importlib.util.spec_from_file_location(name, file.locate())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Memory(NamedTuple):
    """State of a layer around a recurrence."""

    queries: Tensor  # [b, w-1, h, k]
    keys: Tensor  # [b, w-1, h, k]
    held: Any


def _with_memory(recurrence: Callable, unit: bool = True) -> Callable:
    """Returns the layer around a recurrence."""

    def layer(c: MesaNetConfig, chunk: int | None, p: Params, x: Tensor, state: _Memory | None):
        queries, keys, held = state or (None, None, None)
        q, queries = _convolved(c, p, "query", _project(p, "query", x), queries)
        k, keys = _convolved(c, p, "key", _project(p, "key", x), keys)
        if unit:
            q, k = (F.normalize(F.silu(y), dim=-1) for y in (q, k))
        chunk = None if x.shape[1] == 1 else chunk
        out, held = recurrence(c, chunk, p, x, q, k, _project(p, "value", x), held)
        out = F.rms_norm(out, out.shape[-1:], eps=c.norm_eps) * p["out_norm/scale"]
        return torch.einsum("bthv,hvd->btd", out, p["out/kernel"]), _Memory(queries, keys, held)

    return layer


def _project(p: Params, name: str, x: Tensor) -> Tensor:
    """[b, t, d] -> [b, t, h, k]."""
    return torch.einsum("btd,dhk->bthk", x, p[f"{name}/kernel"])


def _convolved(c: MesaNetConfig, p: Params, name: str, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """Torch's convolution, which looks ahead and has its taps the other way round; and the last inputs."""
    taps = p[f"{name}_conv/taps"].flatten(1).T.flip(1)[:, None]  # [h k, 1, w]
    if before is None:
        before = x.new_zeros(len(x), c.conv_width - 1, *x.shape[2:])
    padded = torch.cat([before, x], dim=1)
    found = F.conv1d(padded.flatten(2).transpose(1, 2), taps, groups=taps.shape[0])
    return found.transpose(1, 2).reshape(x.shape), padded[:, x.shape[1] :]


def _gate(p: Params, name: str, x: Tensor) -> Tensor:
    """[b, t, h]."""
    return F.linear(x, p[f"{name}_gate/kernel"].T, p[f"{name}_gate/bias"])


def _log_forget(p: Params, x: Tensor) -> Tensor:
    return F.logsigmoid(_gate(p, "forget", x))


def _strength(p: Params, x: Tensor) -> Tensor:
    return torch.sigmoid(_gate(p, "input", x))


def _mesa(c, chunk, p, x, q, k, v, held):
    """Flash-linear-attention's; by chunks and for one token with its 30 steps, which are not those of ours."""
    ridge, ops = c.ridge_floor + F.softplus(p["ridge"]), naive("mesa_net")
    shared = (_log_forget(p, x), ridge, _strength(p, x))
    if chunk is not None:
        out, *held = ops.naive_mesa_net_CG(q, k, v, *shared, chunk_size=chunk)
    elif held is None:
        out, *held = ops.naive_mesa_net_exact(q, k, v, *shared)
    else:
        first = (y[:, 0] for y in (q, k, v, shared[0]))
        out, *held = ops.naive_mesa_net_decoding_one_step(*first, ridge, shared[2][:, 0], *held)
        out = out[:, None]
    return out, held


def _gla(c, chunk, p, x, q, k, v, held):
    return _summed(chunk, q, k, _strength(p, x)[..., None] * v, _log_forget(p, x), held)


def _mamba2(c, chunk, p, x, q, k, v, held):
    return _summed(chunk, q, k, v, _log_forget(p, x), held)


def _summed(chunk, q, k, v, log_decay, held):
    ops, options = naive("simple_gla"), dict(scale=1.0, initial_state=held, output_final_state=True)
    if chunk is None:
        return ops.naive_recurrent_simple_gla(q, k, v, log_decay, **options)
    return ops.naive_chunk_simple_gla(q, k, v, log_decay, **options, chunk_size=chunk)


def _deltanet(c, chunk, p, x, q, k, v, held):
    beta, q = _strength(p, x), q * math.sqrt(q.shape[-1])  # theirs scales by the inverse
    if chunk is not None:
        return _corrected(chunk, q, k, v, torch.zeros_like(beta), beta, held)
    heads_first = (y.transpose(1, 2) for y in (q, k, v, beta))
    out, held = naive("delta_rule").delta_rule_recurrence(*heads_first, initial_state=held)
    return out.transpose(1, 2), held


def _gated_deltanet(c, chunk, p, x, q, k, v, held):
    beta, log_decay = _strength(p, x), _log_forget(p, x)
    if chunk is not None:
        return _corrected(chunk, q * math.sqrt(q.shape[-1]), k, v, log_decay, beta, held)
    rule = naive("gated_delta_rule").naive_recurrent_gated_delta_rule
    return rule(q, k, v, beta, log_decay, scale=1.0, initial_state=held, output_final_state=True)


def _corrected(chunk, q, k, v, log_decay, beta, held):
    """The delta rule of Qwen3-Next, by chunks."""
    rule = modeling_qwen3_next.torch_chunk_gated_delta_rule
    return rule(q, k, v, log_decay, beta, chunk_size=chunk, initial_state=held, output_final_state=True)


def _mlstm(c, chunk, p, x, q, k, v, held):
    gates = (modeling_xlstm.soft_cap(_gate(p, name, x), GATE_CAP).transpose(1, 2) for name in ("input", "forget"))
    c0, n0, m0 = held or (None, None, None)
    options = dict(c_initial=c0, n_initial=n0, m_initial=m0, return_last_states=True, eps=0.0)
    inputs = [*(y.transpose(1, 2) for y in (q, k, v)), *gates]
    if chunk is None:
        out, held = modeling_xlstm.mlstm_recurrent_sequence_native(*inputs, **options)
    else:
        inputs = [y.contiguous() for y in inputs]
        out, held = modeling_xlstm.mlstm_chunkwise_native_autograd(*inputs, **options, chunk_size=chunk)
    return out.transpose(1, 2), held


def _hawk(c: MesaNetConfig, chunk: int | None, p: Params, x: Tensor, state: tuple | None):
    """RecurrentGemma's block, which has no chunks."""
    block = _hawk_block(c)
    weights = {
        "linear_y.weight": p["gate/kernel"].flatten(1).T,
        "linear_y.bias": torch.zeros(c.channels),
        "linear_x.weight": p["input/kernel"].flatten(1).T,
        "linear_x.bias": torch.zeros(c.channels),
        "linear_out.weight": p["out/kernel"].flatten(0, 1).T,
        "linear_out.bias": torch.zeros(c.model_dim),
        "conv_1d.weight": p["conv/taps"].flatten(1).T.flip(1)[:, None],
        "conv_1d.bias": torch.zeros(c.channels),
        "rg_lru.recurrent_param": p["decay"].flatten(),
        "rg_lru.input_gate_weight": p["input_gate/kernel"],
        "rg_lru.input_gate_bias": p["input_gate/bias"],
        "rg_lru.recurrent_gate_weight": p["recurrence_gate/kernel"],
        "rg_lru.recurrent_gate_bias": p["recurrence_gate/bias"],
    }
    # at position 0 theirs lets the input in unscaled; the paper does not
    positions = torch.arange(1, x.shape[1] + 1).expand(x.shape[:2])
    none = (x.new_zeros(len(x), c.channels, c.conv_width - 1), x.new_zeros(len(x), c.channels))
    block.conv1d_state, block.rg_lru.recurrent_states = state or none
    y, _ = torch.func.functional_call(block, weights, (x, positions, None))
    return y, (block.conv1d_state, block.rg_lru.recurrent_states)


@cache
def _hawk_block(c: MesaNetConfig):
    sizes = dict(hidden_size=c.model_dim, lru_width=c.channels, num_attention_heads=c.num_heads)
    config = RecurrentGemmaConfig(**sizes, conv1d_width=c.conv_width)
    return modeling_recurrent_gemma.RecurrentGemmaRecurrentBlock(config, 0)


class _Cache:
    """Keys and values with room for one more token: what transformers' attention writes to and reads from."""

    def __init__(self, span: int):
        self.length, self._span = 0, span
        self._kept: list[Tensor] = []

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Returns keys and values [b, h, s, k] that the new ones may look at; a single one is not counted."""
        if not self._kept:
            self.length, self._kept = k.shape[2], [k, v]
            return k, v
        if self._kept[0].shape[2] == self.length:  # not earlier: training has no use for the room
            self._kept = [F.pad(y, (0, 0, 0, 1)) for y in self._kept]
        for kept, new in zip(self._kept, (k, v), strict=True):
            kept[:, :, self.length :] = new
        k, v = (kept[:, :, max(0, self.length + 1 - self._span) :] for kept in self._kept)
        return k, v


def _attention(c: MesaNetConfig, chunk: int | None, p: Params, x: Tensor, state: _Cache | None, *, window: bool):
    """Mistral's attention, with rotary positions; by chunks it is PyTorch's fused one."""
    span = c.window if window else c.max_context
    block, turn = _attention_block(c, "eager" if chunk is None else "sdpa")
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    weights = {f"{theirs}.weight": p[f"{ours}/kernel"].flatten(1).T for theirs, ours in names.items()}
    weights["o_proj.weight"] = p["out/kernel"].flatten(0, 1).T
    begin, length = (state.length if state else 0), x.shape[1]
    angles = turn(x, torch.arange(begin, begin + length)[None])
    state = state or _Cache(span)
    mask = None if begin or (chunk is not None and span >= length) else _mask(length, span)
    return torch.func.functional_call(block, weights, (x, angles, mask, state))[0], state


@cache
def _attention_block(c: MesaNetConfig, implementation: str):
    sizes = dict(hidden_size=c.model_dim, num_attention_heads=c.num_heads, num_key_value_heads=c.num_heads)
    rope = dict(rope_type="default", rope_theta=c.rope_base)
    config = MistralConfig(**sizes, head_dim=c.key_dim, attn_implementation=implementation, rope_parameters=rope)
    return modeling_mistral.MistralAttention(config, 0), modeling_mistral.MistralRotaryEmbedding(config)


@cache
def _mask(length: int, span: int) -> Tensor:
    """[1, 1, t, t]."""
    places = torch.arange(length)
    lag = places[:, None] - places
    return torch.where((lag >= 0) & (lag < span), 0.0, -torch.inf)[None, None]


RECURRENCES = {
    "mesa": _with_memory(_mesa),
    "gla": _with_memory(_gla),
    "mamba2": _with_memory(_mamba2),
    "mlstm": _with_memory(_mlstm, unit=False),
    "deltanet": _with_memory(_deltanet),
    "gated_deltanet": _with_memory(_gated_deltanet),
}
LAYERS = {
    **RECURRENCES,
    "hawk": _hawk,
    "sliding_window": partial(_attention, window=True),
    "attention": partial(_attention, window=False),
}
