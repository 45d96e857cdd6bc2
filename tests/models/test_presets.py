"""The presets have the parameter counts of the published models."""

import math

import jax
import pytest

from easylm.models.llama.model import abstract_params
from easylm.models.llama.presets import PRESETS

# As the safetensors metadata of the repositories named in presets.py gives them. Code Llama 70B is
# LLaMA 2 70B with 16 more rows of 8,192 in the embedding table and in the head.
PUBLISHED = {
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama_30b": 32_528_943_616,
    "llama_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "codellama_7b": 6_738_546_688,
    "codellama_13b": 13_016_028_160,
    "codellama_34b": 33_743_970_304,
    "codellama_70b": 68_976_648_192 + 2 * 16 * 8192,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
}


def test_every_preset_has_a_published_count():
    assert PRESETS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name):
    params = abstract_params(PRESETS[name])
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_heads_fill_the_width(name):
    config = PRESETS[name]
    assert config.num_attention_heads * config.head_dim == config.hidden_size


@pytest.mark.parametrize(
    "name, eps, theta, positions, factor",
    [
        ("llama_7b", 1e-6, 1e4, 2048, None),
        ("llama_30b", 1e-6, 1e4, 2048, None),
        ("llama_65b", 1e-5, 1e4, 2048, None),
        ("llama2_13b", 1e-5, 1e4, 4096, None),
        ("llama2_70b", 1e-5, 1e4, 4096, None),
        ("codellama_34b", 1e-5, 1e6, 16384, None),
        ("codellama_70b", 1e-5, 1e6, 16384, None),
        ("llama3_1_8b", 1e-5, 5e5, 131072, 8.0),
        ("llama3_2_1b", 1e-5, 5e5, 131072, 32.0),
    ],
)
def test_constants_that_no_shape_shows(name, eps, theta, positions, factor):
    config = PRESETS[name]
    scaling = config.rope_scaling
    found = config.rms_norm_eps, config.rope_theta, config.max_position_embeddings
    assert found == (eps, theta, positions)
    assert (scaling and scaling.factor) == factor
