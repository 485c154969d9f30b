"""Reads and writes MesaNet checkpoints of flash-linear-attention (FLA), in the Hugging Face layout.

A folder holds config.json and model.safetensors, or several files of tensors and an index. Logits agree: FLA does not
scale embeddings by the root of their size and shares one norm among heads, which is folded into the parameters, and has
neither a bound on the forget gate nor a cap on logits, which the config then turns off.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax

from mesanet_jax.config import MesaNetConfig
from mesanet_jax.model import MesaNet
from pallas_kernels import SolverConfig

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# What FLA takes for a field that config.json does not name, and the values that our model can do.
ABSENT: dict[str, Any] = {
    "hidden_size": 2048,
    "num_heads": 16,
    "head_dim": 128,
    "conv_size": 4,
    "lambda_lower_bound": 0.25,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "num_hidden_layers": 24,
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "max_cg_step_training": 30,
    "max_position_embeddings": 2048,
}
REQUIRED: dict[str, tuple] = {
    "model_type": ("mesa_net",),
    "use_output_gate": (False, None),
    "hidden_act": ("swish", "silu", None),
    "attn": (None,),
    "attnres_block_size": (None,),
}


class _Row(NamedTuple):
    """One of our parameters and FLA's tensor; axes are ours, without that of the layers."""

    ours: str
    theirs: str
    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]

    @property
    def by_layer(self) -> bool:
        """True if the parameter holds this tensor of every layer."""
        return "{}" in self.theirs


def read_fla(folder: Path) -> tuple[MesaNetConfig, dict]:
    """Returns config and parameters, float32, of the `MesaNet` that has the logits of FLA's model in a folder.

    Its systems are solved by as many steps of plain conjugate gradient as FLA's; any other solver may take their place.

    Raises:
      ValueError: the folder holds no such model, one that ours cannot be, or tensors are missing, unknown or of another
      shape; the message names them.
    """
    config = _read_config(folder)
    tensors, shapes, params = _read_tensors(folder), _shapes(config), {}
    for row in _rows(config):
        ours = shapes[row.ours][1:] if row.by_layer else shapes[row.ours]
        theirs = row.save(np.zeros(ours)).shape
        names = [row.theirs.format(layer) for layer in range(config.num_layers)] if row.by_layer else [row.theirs]
        found = [row.load(_take(tensors, name, theirs, folder)) for name in names]
        params[row.ours] = jnp.asarray(np.stack(found) if row.by_layer else found[0])
    if config.tied_embedding:
        tensors.pop("lm_head.weight", None)  # some writers repeat it
    if tensors:
        raise ValueError(f"{folder}: tensor {min(tensors)} is unknown to this architecture; is it another model's?")
    return config, flax.traverse_util.unflatten_dict(params, sep="/")


def write_fla(folder: Path, config: MesaNetConfig, params: Mapping) -> None:
    """Writes a folder that FLA's MesaNetForCausalLM opens, with the same logits where its solves are as good as ours.

    It takes solver.max_steps steps of plain conjugate gradient, whatever our solver is.

    Args:
      folder: a new one, or an empty one.
      config: the model; of mesa layers alone, without what FLA's cannot do.
      params: its parameters, unboxed.

    Raises:
      ValueError: the folder holds something, or the model does what FLA's cannot; the message names the field.
    """
    _check_writable_as_fla(config)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder.")
    flat = flax.traverse_util.flatten_dict(dict(params), sep="/")
    tensors = {}
    for row in _rows(config):
        values = np.asarray(flat[row.ours], np.float32)
        for layer, value in enumerate(values if row.by_layer else values[None]):
            tensors[row.theirs.format(layer)] = jnp.asarray(row.save(value))
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.flax.save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_fla_config(config), indent=2) + "\n")


def _rows(config: MesaNetConfig) -> list[_Row]:
    """The table of names; "{}" stands for the number of the layer."""
    heads, root = (config.num_heads, config.key_dim), math.sqrt(config.model_dim)
    mixer, attention = "params/layers/mesa_0/mixer", "model.layers.{}.attn"
    block, layer = "params/layers/mesa_0", "model.layers.{}"
    rows = [
        _scaled("params/embedding/embedding", "model.embeddings.weight", 1 / root),
        _projection(f"{mixer}/query/kernel", f"{attention}.q_proj.weight", heads),
        _projection(f"{mixer}/key/kernel", f"{attention}.k_proj.weight", heads),
        _projection(f"{mixer}/value/kernel", f"{attention}.v_proj.weight", heads),
        _taps(f"{mixer}/query_conv/taps", f"{attention}.q_conv1d.weight", heads),
        _taps(f"{mixer}/key_conv/taps", f"{attention}.k_conv1d.weight", heads),
        _matrix(f"{mixer}/forget_gate/kernel", f"{attention}.a_proj.weight"),
        _vector(f"{mixer}/forget_gate/bias", f"{attention}.a_proj.bias"),
        _matrix(f"{mixer}/input_gate/kernel", f"{attention}.b_proj.weight"),
        _vector(f"{mixer}/input_gate/bias", f"{attention}.b_proj.bias"),
        _Row(f"{mixer}/ridge", f"{attention}.lambda_params", lambda x: x.reshape(heads), np.ravel),
        _Row(
            f"{mixer}/out_norm/scale",
            f"{attention}.o_norm.weight",
            lambda x: np.broadcast_to(x, heads),
            _shared_by_heads,
        ),
        _Row(
            f"{mixer}/out/kernel",
            f"{attention}.o_proj.weight",
            lambda x: x.T.reshape(*heads, -1),
            lambda x: x.reshape(-1, x.shape[-1]).T,
        ),
        _vector(f"{block}/mixer_norm/scale", f"{layer}.attn_norm.weight"),
        _vector(f"{block}/mlp_norm/scale", f"{layer}.mlp_norm.weight"),
        _matrix(f"{block}/mlp/gate/kernel", f"{layer}.mlp.gate_proj.weight"),
        _matrix(f"{block}/mlp/up/kernel", f"{layer}.mlp.up_proj.weight"),
        _matrix(f"{block}/mlp/out/kernel", f"{layer}.mlp.down_proj.weight"),
        # a tied table is smaller than FLA's, so what it reads is made larger
        _scaled("params/out_norm/scale", "model.norm.weight", root if config.tied_embedding else 1),
    ]
    return rows if config.tied_embedding else [*rows, _vector("params/read_out/kernel", "lm_head.weight")]


def _vector(ours: str, theirs: str) -> _Row:
    return _scaled(ours, theirs, 1)


def _scaled(ours: str, theirs: str, factor: float) -> _Row:
    return _Row(ours, theirs, lambda x: x * np.float32(factor), lambda x: x / np.float32(factor))


def _matrix(ours: str, theirs: str) -> _Row:
    return _Row(ours, theirs, np.transpose, np.transpose)


def _projection(ours: str, theirs: str, heads: tuple[int, int]) -> _Row:
    return _Row(ours, theirs, lambda x: x.T.reshape(-1, *heads), lambda x: x.reshape(x.shape[0], -1).T)


def _taps(ours: str, theirs: str, heads: tuple[int, int]) -> _Row:
    """FLA's taps end with the current token's."""

    def load(x: np.ndarray) -> np.ndarray:
        return x[:, 0, ::-1].T.reshape(-1, *heads)

    return _Row(ours, theirs, load, lambda x: x.reshape(x.shape[0], -1).T[:, None, ::-1])


def _shared_by_heads(scale: np.ndarray) -> np.ndarray:
    if not (scale == scale[0]).all():
        raise ValueError("out_norm: heads have norms of their own, which FLA's model shares; it cannot be written.")
    return scale[0]


def _read_config(folder: Path) -> MesaNetConfig:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no config.json; give the folder of a Hugging Face model.") from None
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is no JSON ({error}); download it again.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{folder / 'config.json'} holds no fields; download it again.")
    for field, possible in REQUIRED.items():
        if values.get(field) not in possible:
            raise ValueError(
                f"{folder / 'config.json'}: {field}={values.get(field)!r} is not what this can read; it must be "
                f"{possible[0]!r}."
            )
    x = ABSENT | {field: value for field, value in values.items() if field in ABSENT}
    floor = x["lambda_lower_bound"]
    return MesaNetConfig(
        vocab_size=x["vocab_size"],
        num_layers=x["num_hidden_layers"],
        model_dim=x["hidden_size"],
        num_heads=x["num_heads"],
        key_dim=x["head_dim"],
        value_dim=x["head_dim"],
        mlp_dim=x["intermediate_size"] or _usual_width(x["hidden_size"], x["hidden_ratio"] or 4),
        conv_width=x["conv_size"],
        max_context=x["max_position_embeddings"],
        gate_bound=1.0,
        ridge_floor=floor,
        ridge_init=floor + 0.75,
        tied_embedding=bool(x["tie_word_embeddings"]),
        logit_cap=0.0,
        norm_eps=x["norm_eps"],
        solver=SolverConfig(max_steps=x["max_cg_step_training"], tolerance=0.0, preconditioner="none"),
    )


def _fla_config(config: MesaNetConfig) -> dict[str, Any]:
    c = config
    return {
        "architectures": ["MesaNetForCausalLM"],
        "model_type": "mesa_net",
        "attn": None,
        "attn_mode": "chunk",
        "conv_size": c.conv_width,
        "head_dim": c.key_dim,
        "hidden_act": "swish",
        "hidden_ratio": None,
        "hidden_size": c.model_dim,
        "intermediate_size": c.feed_forward_dim,
        "lambda_lower_bound": c.ridge_floor,
        "max_cg_step_decoding": c.solver.max_steps,
        "max_cg_step_training": c.solver.max_steps,
        "max_position_embeddings": c.max_context,
        "norm_eps": c.norm_eps,
        "num_heads": c.num_heads,
        "num_hidden_layers": c.num_layers,
        "tie_word_embeddings": c.tied_embedding,
        "torch_dtype": "float32",
        "use_output_gate": False,
        "use_short_conv": True,
        "vocab_size": c.vocab_size,
    }


def _usual_width(model_dim: int, ratio: float) -> int:
    """FLA's feed-forward width where none is given: two thirds of ratio times the model's, in steps of 256."""
    return 256 * math.ceil(int(model_dim * ratio * 2 / 3) / 256)


def _check_writable_as_fla(config: MesaNetConfig) -> None:
    only = {"logit_cap": 0.0, "gate_bound": 1.0}
    for field, value in only.items():
        if getattr(config, field) != value:
            raise ValueError(
                f"MesaNetConfig: {field}={getattr(config, field)} is nothing that FLA's model can do, only {value}; "
                f"train one with that value to write it."
            )
    if set(config.pattern) != {"mesa"} or len(config.pattern) > 1:
        raise ValueError(
            f"MesaNetConfig: pattern={config.pattern} is no stack of mesa layers alone, as FLA's model is."
        )
    if config.key_dim != config.value_dim:
        raise ValueError(
            f"MesaNetConfig: value_dim={config.value_dim} must equal key_dim={config.key_dim} in FLA's model."
        )


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    names = [SINGLE]
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{folder / INDEX} is no index of tensors; download it again.") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} has no {missing[0]}; convert other formats to safetensors, or download it again.")
    tensors = {}
    for name in names:
        try:
            loaded = safetensors.flax.load_file(folder / name)
        except (safetensors.SafetensorError, OSError, KeyError) as error:
            raise ValueError(f"{folder / name} cannot be read ({error}); download it again.") from None
        tensors |= {key: np.asarray(value, np.float32) for key, value in loaded.items()}
    return tensors


def _take(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...], folder: Path) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"{folder}: tensor {name} is missing; is it another architecture's, or cut short?")
    found = tensors.pop(name)
    if found.shape != shape:
        raise ValueError(f"{folder}: tensor {name} has shape {found.shape}; by config.json it must be {shape}.")
    return found


def _shapes(config: MesaNetConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of our parameters by name."""
    boxed = jax.eval_shape(MesaNet(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    paths = jax.tree_util.tree_leaves_with_path(nn.unbox(boxed))
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in paths}
