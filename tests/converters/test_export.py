"""Exported folders: the same bits as before, read by transformers, and nothing left of failures."""

import functools
import json
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from easylm.converters.export import export_hf, export_leaves
from easylm.converters.load import load_params
from easylm.converters.safetensors_io import SafetensorsSource
from easylm.errors import InputError
from easylm.models.llama.sharding import param_shardings
from easylm.sharding import make_mesh
from tests import tiny

VARIANTS = {
    "gqa": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "tied": {"tie_word_embeddings": True, "head_dim": 6},
    "biases": {"attention_bias": True, "mlp_bias": True, "eos_token_id": [2, 5], "pad_token_id": 0},
}


def export(params, config, target, dtype="float32", **options):
    texts = {"tokenizer_files": {"tokenizer.json": b"{}"}, "model_card": "# A model\n"}
    export_hf(params, config, str(target), dtype=dtype, progress=False, **texts, **options)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_gives_the_same_bits(tmp_path, variant, dtype):
    model = tiny.hf_llama(**VARIANTS[variant]).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "hf")
    config, _ = tiny.native(model.float())
    source = SafetensorsSource(str(tmp_path / "hf"), None, "config.json")
    shardings = param_shardings(config, make_mesh("1,2,2", jax.devices()[:4]))
    params = load_params(source, config, shardings, jnp.dtype(dtype), progress=False)
    export(params, config, tmp_path / "back", dtype)
    before = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype == jnp.dtype(dtype)
        assert array.tobytes() == after[name].tobytes(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_reads_the_same_model(tmp_path, variant):
    model = tiny.hf_llama(**VARIANTS[variant])
    config, params = tiny.native(model)
    export(params, config, tmp_path / "out")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()), info
    assert loaded.dtype == torch.float32
    tokens = torch.randint(3, 67, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(tokens, **options), model.generate(tokens, **options))
    assert loaded.generation_config.eos_token_id == model.config.eos_token_id
    assert loaded.generation_config.bos_token_id == model.config.bos_token_id
    assert loaded.config.rope_parameters == model.config.rope_parameters


def test_the_folder_is_whole(tmp_path):
    config, params = tiny.native(tiny.hf_llama())
    export(params, config, tmp_path / "out", "bfloat16")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "COMPLETE",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (tmp_path / "out" / "README.md").read_text() == "# A model\n"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf["dtype"] == hf["torch_dtype"] == "bfloat16"
    assert hf["rope_theta"] == hf["rope_parameters"]["rope_theta"]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2 and "pad_token_id" not in generation


def test_bad_values_are_all_listed_and_nothing_stays(tmp_path):
    config, params = tiny.native(tiny.hf_llama())
    params["norm"]["scale"] = params["norm"]["scale"] * np.inf
    params["layers"]["mlp"]["up_proj"]["kernel"][1, 3, 4] = np.nan
    on_device = jax.tree.map(jnp.asarray, params)
    for version in (params, on_device):
        with pytest.raises(InputError) as error:
            export(version, config, tmp_path / "out")
        assert "2 problems" in str(error.value)
        assert "model.layers.1.mlp.up_proj.weight holds" in str(error.value)
        assert "model.norm.weight holds" in str(error.value)
        assert list(tmp_path.iterdir()) == []


def test_a_leaf_that_cannot_be_had_leaves_nothing(tmp_path):
    config, params = tiny.native(tiny.hf_llama())
    asked = []

    def get_leaf(path):
        asked.append(path)
        if path == ("norm", "scale"):
            raise KeyError(path)
        return functools.reduce(operator.getitem, path, params)

    with pytest.raises(KeyError):
        export_leaves(
            get_leaf,
            config,
            str(tmp_path / "out"),
            dtype="float32",
            tokenizer_files={},
            model_card="",
            progress=False,
        )
    assert len(asked) == len(set(asked)) == 11
    assert list(tmp_path.iterdir()) == []
