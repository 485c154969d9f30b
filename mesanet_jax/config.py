"""A model is its config; a new size is a row of SIZES."""

import dataclasses
from typing import Literal

from pallas_kernels import SolverConfig

MixerName = Literal[
    "mesa", "gla", "mamba2", "mlstm", "deltanet", "gated_deltanet", "hawk", "sliding_window", "attention"
]
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["nothing", "all_but_solutions", "everything"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MesaNetConfig:
    """Architecture of a MesaNet or of a model it is compared with (arXiv 2506.05233, appendices E and G).

    Attributes:
      vocab_size: tokens the model knows.
      num_layers: residual blocks, each a token mixer and a feed-forward layer.
      model_dim: width of the residual stream.
      num_heads: heads of every mixer.
      key_dim: size of queries and keys per head.
      value_dim: size of values per head.
      mlp_dim: width of the SwiGLU; 0 means three times model_dim, as in the paper.
      pattern: mixers from the bottom up, repeated until num_layers are filled; a hybrid is a longer tuple.
      recurrent_dim: channels of a hawk mixer, a multiple of num_heads; 0 means 1.25 times model_dim, as in the paper.
      conv_width: taps of the causal convolution, on queries and keys of mixers with a memory, on channels of hawk.
      gate_bound: mesa's largest forget gate at full input strength; keeps H bounded if a token repeats (appendix G.5).
      forget_bias: initial bias of the forget gate's logit, shared by all heads; the paper does not state its own. Mlstm
        and hawk begin as their papers say.
      ridge_floor: smallest regularisation; the learned part is added to it.
      ridge_init: regularisation at initialisation.
      window: tokens a sliding_window mixer attends to, the current one included.
      max_context: tokens an attention mixer attends to, and the length of its cache.
      rope_base: base of the rotary position encoding of attention mixers.
      tied_embedding: the read-out uses the embedding's table, and none of its own.
      logit_cap: logits are squashed into (-cap, cap) by cap * tanh(logits / cap); 0 leaves them as they are.
      norm_eps: epsilon of the RMS norms.
      dtype: type of activations and of what attention and convolutions remember of them; parameters, the matrices of
        mesa layers and the solver are float32.
      remat: what the backward pass recomputes: "nothing", "all_but_solutions" (keeps what the solver found, so that
        no system is solved twice forward), or "everything".
      solver: when the solve of a token ends.
    """

    vocab_size: int = 50257
    num_layers: int = 14
    model_dim: int = 768
    num_heads: int = 6
    key_dim: int = 128
    value_dim: int = 128
    mlp_dim: int = 0
    pattern: tuple[MixerName, ...] = ("mesa",)
    recurrent_dim: int = 0
    conv_width: int = 4
    gate_bound: float = 0.9975
    forget_bias: float = 4.0
    ridge_floor: float = 0.25
    ridge_init: float = 1.0
    window: int = 1024
    max_context: int = 2048
    rope_base: float = 10000.0
    tied_embedding: bool = True
    logit_cap: float = 30.0
    norm_eps: float = 1e-6
    dtype: Dtype = "float32"
    remat: Remat = "nothing"
    solver: SolverConfig = SolverConfig()

    def __post_init__(self):
        positive = (
            "vocab_size",
            "num_layers",
            "model_dim",
            "num_heads",
            "key_dim",
            "value_dim",
            "conv_width",
            "window",
        )
        for field in (*positive, "max_context"):
            if getattr(self, field) < 1:
                raise ValueError(f"MesaNetConfig: {field}={getattr(self, field)} must be at least 1.")
        for field, values in (("dtype", Dtype.__args__), ("remat", Remat.__args__)):
            if getattr(self, field) not in values:
                raise ValueError(f"MesaNetConfig: {field}={getattr(self, field)!r} must be one of {values}.")
        if self.mlp_dim < 0:
            raise ValueError(f"MesaNetConfig: mlp_dim={self.mlp_dim} is negative; use 0 for three times model_dim.")
        known = MixerName.__args__
        unknown = [name for name in self.pattern if name not in known]
        if unknown or not self.pattern:
            raise ValueError(f"MesaNetConfig: pattern={self.pattern} must be a tuple of one or more of {known}.")
        if self.num_layers % len(self.pattern):
            raise ValueError(
                f"MesaNetConfig: num_layers={self.num_layers} is no multiple of the length of pattern={self.pattern}."
            )
        if {"attention", "sliding_window"} & {*self.pattern} and (self.key_dim % 2 or self.key_dim != self.value_dim):
            raise ValueError(
                f"MesaNetConfig: attention needs an even key_dim and as large a value_dim, "
                f"not {self.key_dim} and {self.value_dim}."
            )
        if "hawk" in self.pattern and (self.channels < 1 or self.channels % self.num_heads):
            raise ValueError(
                f"MesaNetConfig: recurrent_dim={self.channels} must be a positive multiple of "
                f"num_heads={self.num_heads}."
            )
        if self.logit_cap < 0 or min(self.norm_eps, self.rope_base) <= 0:
            raise ValueError("MesaNetConfig: logit_cap must not be negative, norm_eps and rope_base must be positive.")
        if not 0 < self.gate_bound <= 1:
            raise ValueError(f"MesaNetConfig: gate_bound={self.gate_bound} must lie in (0, 1]; the paper uses 0.9975.")
        if not 0 <= self.ridge_floor < self.ridge_init:
            raise ValueError(
                f"MesaNetConfig: ridge_init={self.ridge_init} must exceed ridge_floor={self.ridge_floor} >= 0."
            )

    @property
    def feed_forward_dim(self) -> int:
        """Width of the SwiGLU."""
        return self.mlp_dim or 3 * self.model_dim

    @property
    def channels(self) -> int:
        """Channels of a hawk mixer."""
        return self.recurrent_dim or self.model_dim * 5 // 4


# "tiny" is for laptops and bytes; the others are Table G.4 of the paper with the GPT-2 vocabulary.
SIZES = {
    "tiny": MesaNetConfig(vocab_size=257, num_layers=2, model_dim=128, num_heads=4, key_dim=32, value_dim=32),
    "145m": MesaNetConfig(num_layers=14, model_dim=768, num_heads=6, dtype="bfloat16", remat="all_but_solutions"),
    "400m": MesaNetConfig(num_layers=28, model_dim=1024, num_heads=8, dtype="bfloat16", remat="all_but_solutions"),
    "1b": MesaNetConfig(num_layers=28, model_dim=1536, num_heads=12, dtype="bfloat16", remat="all_but_solutions"),
}
