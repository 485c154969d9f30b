"""A model of another library is the same model here, and the other way round."""

import dataclasses
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mesanet_jax import MesaNet
from mesanet_jax.convert import read_fla, write_fla
from tests import tolerances
from tests.mesanet_jax.parity.cases import MODEL, TOKENS


@pytest.fixture
def folder(tmp_path):
    """A copy of the checkpoint, to be changed."""
    copy = tmp_path / "model"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MODEL / name, copy)
    return copy


def edit(folder, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(folder, change) -> None:
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


def logits(config, params):
    return MesaNet(config).apply(params, jnp.asarray(TOKENS))[0]


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_a_model_of_fla_has_the_same_logits_here_and_back_again(kind, folder, tmp_path):
    expected = np.load(MODEL / "logits.npz")[kind]
    if kind == "tied":
        edit(folder, tie_word_embeddings=True)
    config, params = read_fla(folder)
    assert (config.num_layers, config.tied_embedding, config.mlp_dim) == (2, kind == "tied", 20)
    tolerances.assert_near(logits(config, params), expected, tolerances.PARITY)
    write_fla(tmp_path / "again", config, params)
    theirs, ours = (safetensors.numpy.load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert ours.keys() == theirs.keys() - ({"lm_head.weight"} if kind == "tied" else set())
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[name], rtol=2e-7)  # two roundings: by the root of 12, and back
    again, params_again = read_fla(tmp_path / "again")
    assert again == config
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-7), params_again, params)


def test_a_model_of_ours_is_written_and_read(tmp_path):
    config, params = read_fla(MODEL)
    config = dataclasses.replace(config, num_layers=1, mlp_dim=0)
    params = MesaNet(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    params = nn.unbox(params)
    write_fla(tmp_path / "model", config, params)
    found, read = read_fla(tmp_path / "model")
    tolerances.assert_near(logits(found, read), logits(config, params), tolerances.MODEL["float32"])


def test_several_files_with_an_index_are_one_model(folder):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    names = sorted(tensors)
    where = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        safetensors.numpy.save_file({n: tensors[n] for n in names if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "model.safetensors").unlink()
    for x, y in zip(*(jax.tree.leaves(read_fla(f)[1]) for f in (folder, MODEL)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_width_that_is_not_named_is_the_usual_one(folder):
    def widen(tensors):
        for layer in range(2):
            for name, shape in (("gate", (256, 12)), ("up", (256, 12)), ("down", (12, 256))):
                tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"] = np.zeros(shape, np.float32)

    edit(folder, intermediate_size=None)
    edit_tensors(folder, widen)
    assert read_fla(folder)[0].mlp_dim == 256


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json; give the folder of a Hugging Face model"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json holds no fields"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index.json is no index of tensors"),
        (lambda f: edit(f, model_type="gla"), "model_type='gla' is not what this can read; it must be 'mesa_net'"),
        (lambda f: edit(f, use_output_gate=True), "use_output_gate=True is not what this can read"),
        (lambda f: edit(f, attn={"layers": [1]}), "attn={'layers'.*} is not what this can read"),
        (lambda f: edit(f, hidden_act="powlu"), "hidden_act='powlu' is not what this can read"),
        (lambda f: edit(f, num_heads=4, head_dim=4), r"a_proj.weight has shape \(2, 12\); .* must be \(4, 12\)"),
        (
            lambda f: edit(f, hidden_size=16),
            r"tensor model.embeddings.weight has shape \(31, 12\); .* must be \(31, 16\)",
        ),
        (lambda f: edit(f, num_hidden_layers=1), "tensor model.layers.1.attn.a_proj.bias is unknown"),
        (lambda f: edit(f, num_hidden_layers=3), r"tensor model.layers.2.attn.q_proj.weight is missing"),
        (lambda f: edit_tensors(f, lambda t: t.pop("lm_head.weight")), "tensor lm_head.weight is missing"),
        (lambda f: edit_tensors(f, lambda t: t.update(more=t["lm_head.weight"])), "tensor more is unknown"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors; convert other formats"),
        (lambda f: (f / "model.safetensors").write_bytes(b"cut short"), "model.safetensors cannot be read"),
    ],
)
def test_what_is_no_such_model_ends_in_a_sentence(change, words, folder):
    change(folder)
    with pytest.raises(ValueError, match=words):
        read_fla(folder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"logit_cap": 30.0}, "logit_cap=30.0 is nothing that FLA's model can do, only 0.0"),
        ({"gate_bound": 0.9975}, "gate_bound=0.9975 is nothing"),
        ({"pattern": ("mesa", "attention")}, "is no stack of mesa layers alone"),
        ({"value_dim": 16}, "value_dim=16 must equal key_dim=8"),
    ],
)
def test_a_model_that_fla_cannot_be_is_not_written(fields, words, tmp_path):
    config, params = read_fla(MODEL)
    with pytest.raises(ValueError, match=words):
        write_fla(tmp_path / "new", dataclasses.replace(config, **fields), params)
    assert not (tmp_path / "new").exists()


def test_heads_with_norms_of_their_own_are_not_written(tmp_path):
    config, params = read_fla(MODEL)
    scale = params["params"]["layers"]["mesa_0"]["mixer"]["out_norm"]
    scale["scale"] = scale["scale"].at[0, 1, 2].add(1)
    with pytest.raises(ValueError, match="out_norm: heads have norms of their own"):
        write_fla(tmp_path / "new", config, params)
    assert not (tmp_path / "new").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; give a new folder"):
        write_fla(tmp_path, *read_fla(MODEL))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
