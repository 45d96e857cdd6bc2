"""Every config that comes with easylm loads and is valid, from any folder."""

import re
import subprocess
import sys

import jax
import pytest

from easylm.config import CONFIGS, from_config_dict, load
from easylm.models.llama.model import abstract_params
from easylm.trainers.config import DpoConfig, SftConfig

OBJECTIVES = {"sft": SftConfig, "dpo": DpoConfig}
NAMES = sorted(
    f"{folder}/{path.stem}"
    for folder in OBJECTIVES
    for path in (CONFIGS / folder).glob("*.py")
    if path.stem != "__init__"
)


def test_there_are_configs():
    assert {"sft/quickstart", "dpo/quickstart"} < set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_configs_load_and_validate(name):
    file, folder = load(name), name.partition("/")[0]
    from_config_dict(OBJECTIVES[folder], file.config)
    command = f"python -m easylm.{folder} --config={name}"
    assert command in file.docstring, "the docstring says how to run it"


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


def test_the_preference_quickstart_starts_from_what_the_first_one_leaves():
    first, second = load("sft/quickstart"), load("dpo/quickstart")
    config = from_config_dict(DpoConfig, second.config)
    (workdir,) = re.findall(r"--config=sft/quickstart --workdir=(\S+)", first.docstring)
    assert config.init_from == f"{workdir}/hf"
    assert f"--config=sft/quickstart --workdir={workdir}" in second.docstring
    assert config.compute_dtype == "float32" and config.cpu_devices == 8
    for source in (config.data.sources, config.data.eval_sources):
        with open(source) as file:
            assert len(file.readlines()) > 40
