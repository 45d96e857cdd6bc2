"""Every config that comes with easylm loads and is valid, from any folder."""

import subprocess
import sys

import jax
import pytest

from easylm.config import CONFIGS, from_config_dict, load
from easylm.models.llama.model import abstract_params
from easylm.trainers.config import SftConfig

SFT = sorted(path.stem for path in (CONFIGS / "sft").glob("*.py") if path.stem != "__init__")


def test_there_are_configs():
    assert "quickstart" in SFT


@pytest.mark.parametrize("name", SFT)
def test_sft_configs_load_and_validate(name):
    file = load(f"sft/{name}")
    from_config_dict(SftConfig, file.config)
    assert f"--config=sft/{name}" in file.docstring, "the docstring says how to run it"


def test_a_name_works_from_any_folder(tmp_path):
    code = "from easylm.config import load; print(load('sft/quickstart').config.init_from)"
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(CONFIGS.parent)!r}); {code}",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "random\n", result.stderr


def test_the_quickstart_is_small_and_reads_what_is_installed():
    config = from_config_dict(SftConfig, load("sft/quickstart").config)
    model = config.model.llama_config(vocab_size=config.data.tokenizer_vocab_size)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))
    assert 2e6 < parameters < 5e6
    assert config.data.seq_len <= 512
    with open(config.data.sources) as file:
        assert len(file.readlines()) > 250
