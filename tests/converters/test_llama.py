"""The list of tensors, against transformers' own state dict and a mapping written apart."""

import jax
import numpy as np
import pytest

from easylm.converters.llama import check_tensors, expected_tensors, rules
from easylm.converters.tensors import TensorInfo
from easylm.errors import InputError
from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.model import abstract_params
from tests import tiny

VARIANTS = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 6},
}


@pytest.fixture(params=VARIANTS)
def model(request):
    return tiny.hf_llama(**VARIANTS[request.param])


def state_dict(model) -> dict[str, np.ndarray]:
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def infos_of(weights: dict[str, np.ndarray]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(value.shape, value.dtype, "model.safetensors")
        for name, value in weights.items()
    }


def test_names_and_shapes_are_those_of_transformers(model):
    config = LlamaConfig.from_hf(model.config.to_dict(), "test")
    expected = expected_tensors(config)
    assert expected == {name: value.shape for name, value in state_dict(model).items()}
    assert check_tensors(config, infos_of(state_dict(model)), "test") == []


def test_values_are_those_of_the_other_mapping_and_come_back(model):
    config, params = tiny.native(model)
    weights = state_dict(model)
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_params(config))
    for rule in rules(config):
        leaf, shape = params, shapes
        for key in rule.path:
            leaf, shape = leaf[key], shape[key]
        stacked = leaf if rule.num_layers else leaf[None]
        assert shape == (*((rule.num_layers,) if rule.num_layers else ()), *rule.native_shape)
        for native, name in zip(stacked, rule.hf_names(), strict=True):
            np.testing.assert_array_equal(rule.to_native(weights[name]), native)
            np.testing.assert_array_equal(rule.to_hf(native), weights[name])
    assert len(rules(config)) == len(jax.tree.leaves(params))


def test_lists_every_problem_at_once():
    config, _ = tiny.native(tiny.hf_llama())
    infos = infos_of(state_dict(tiny.hf_llama()))
    del infos["model.layers.1.mlp.up_proj.weight"]
    infos["model.layers.2.mlp.up_proj.weight"] = infos["model.norm.weight"]
    infos["model.norm.weight"] = TensorInfo((33,), np.dtype(np.float32), "a.safetensors")
    infos["lm_head.weight"] = TensorInfo((67, 32), np.dtype(np.int8), "b.safetensors")
    with pytest.raises(InputError) as error:
        check_tensors(config, infos, "folder")
    lines = str(error.value).splitlines()
    assert lines[0] == "folder: 4 problems:"
    assert sorted(line.strip() for line in lines[1:]) == [
        "a.safetensors: tensor model.norm.weight: found shape [33]; config.json says [32]",
        "b.safetensors: tensor lm_head.weight: found dtype int8; wanted a float",
        "model.safetensors: tensor model.layers.2.mlp.up_proj.weight is unknown; a LLaMA has none",
        "no tensor model.layers.1.mlp.up_proj.weight; wanted one of shape [48, 32]",
    ]


def test_buffers_of_older_files_are_ignored_by_name():
    config, _ = tiny.native(tiny.hf_llama())
    infos = infos_of(state_dict(tiny.hf_llama()))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    infos[name] = TensorInfo((2,), np.dtype(np.float32), "model.safetensors")
    assert check_tensors(config, infos, "folder") == [name]


def test_a_tied_model_may_bring_a_head_of_the_right_shape():
    model = tiny.hf_llama(tie_word_embeddings=True)
    config, _ = tiny.native(model)
    infos = infos_of(state_dict(model))
    infos["lm_head.weight"] = TensorInfo((67, 32), np.dtype(np.float32), "model.safetensors")
    assert check_tensors(config, infos, "folder") == []
    infos["lm_head.weight"] = TensorInfo((66, 32), np.dtype(np.float32), "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.weight: found shape \[66, 32\]"):
        check_tensors(config, infos, "folder")
