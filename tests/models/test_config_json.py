"""transformers 4 and 5 read the config.json that is written, to the same values."""

import dataclasses
import json

import pytest
import transformers

from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.presets import PRESETS

READ = """
import json, sys
import transformers
assert transformers.__version__.startswith("4.46")
configs = [transformers.AutoConfig.from_pretrained(folder) for folder in sys.argv[1:]]
print(json.dumps([config.to_dict() for config in configs]))
"""


@pytest.mark.slow
def test_both_versions_read_the_same(tmp_path, transformers_446):
    odd = dataclasses.replace(
        PRESETS["llama3_2_3b"],
        head_dim=96,
        rms_norm_eps=3e-6,
        attention_bias=True,
        mlp_bias=True,
        initializer_range=0.03,
        eos_token_id=(128001, 128009),
        pad_token_id=7,
    )
    configs = {**PRESETS, "odd": odd}
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config.to_hf("bfloat16")))
    folders = [tmp_path / name for name in configs]
    for folder, old in zip(folders, json.loads(transformers_446(READ, *folders)), strict=True):
        new = transformers.AutoConfig.from_pretrained(folder).to_dict()
        # Each keeps what it does not understand; only its own spelling says what it computes with.
        del old["rope_parameters"]
        assert new.pop("rope_theta", None) is new.pop("rope_scaling", None) is None
        assert LlamaConfig.from_hf(old, "transformers 4.46") == configs[folder.name]
        assert LlamaConfig.from_hf(new, "transformers 5") == configs[folder.name]
        assert old["torch_dtype"] == new["dtype"] == "bfloat16"
