"""config.json in both spellings, and what is refused in it."""

import pytest

from easylm.errors import InputError
from easylm.models.llama.config import LlamaConfig, RopeScaling

HF = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_what_is_left_out_means_what_hugging_face_means_by_it():
    config = LlamaConfig.from_hf(HF, "config.json")
    assert config.num_key_value_heads == 8
    assert config.head_dim == 8
    assert config.rms_norm_eps == 1e-6
    assert config.rope_theta == 10000.0
    assert config.max_position_embeddings == 2048
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
    assert config.rope_scaling is None
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 5e5, "factor": 8}},
        {"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_scaling": None, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    ],
    ids=["4", "5", "both names of the type", "4 and 5", "theta alone in 5", "null in 4"],
)
def test_rope_in_both_spellings(spelling):
    config = LlamaConfig.from_hf({**HF, **spelling}, "config.json")
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


def test_null_for_a_switch_and_a_whole_rotary_factor_are_as_if_left_out():
    said = {"attention_bias": None, "mlp_bias": None, "partial_rotary_factor": 1.0}
    assert LlamaConfig.from_hf({**HF, **said}, "c") == LlamaConfig.from_hf(HF, "c")


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 2.0), RopeScaling("dynamic", 4.0)])
def test_what_is_written_is_read_back(scaling):
    config = LlamaConfig(
        100, 64, 128, 2, 8, 2, 16, 512, 1e-5, 2e4, scaling, True, True, True, 0.1, 3, (4, 5), 6
    )
    assert LlamaConfig.from_hf(config.to_hf("bfloat16"), "config.json") == config


BAD = {
    "another architecture": ({"model_type": "mistral"}, r"model_type: found 'mistral'.*'llama'"),
    "no architecture": ({"model_type": None}, r"model_type: found None"),
    "another activation": ({"hidden_act": "gelu"}, r"hidden_act: found 'gelu'; wanted 'silu'"),
    "a missing size": ({"hidden_size": None}, r"hidden_size: found None; wanted a positive int"),
    "a size in words": ({"vocab_size": "100"}, r"vocab_size: found '100'"),
    "a broken size": ({"num_hidden_layers": 2.5}, r"num_hidden_layers: found 2.5"),
    "a size below one": ({"num_hidden_layers": 0}, r"num_hidden_layers: found 0"),
    "an endless size": ({"hidden_size": float("inf")}, r"hidden_size: found inf; wanted a pos"),
    "no number": ({"vocab_size": float("nan")}, r"vocab_size: found nan; wanted a positive int"),
    "an endless epsilon": ({"rms_norm_eps": float("inf")}, r"rms_norm_eps: found inf; wanted a"),
    "too many digits": ({"rope_theta": 10**400}, r"rope_theta: found 10+; wanted a positive flo"),
    "true for a number": ({"num_hidden_layers": True}, r"num_hidden_layers: found True"),
    "KV heads": ({"num_key_value_heads": 3}, r"num_attention_heads: found 8; wanted a multiple"),
    "an odd head": ({"head_dim": 7}, r"head_dim: found 7; wanted an even number"),
    "a rope type": ({"rope_scaling": {"type": "yarn"}}, r"rope_scaling.rope_type: found 'yarn'"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, r"rope_scaling: factor: found None"),
    "a factor of what": ({"rope_scaling": {"factor": 2}}, r"rope_scaling.rope_type: found None"),
    "rope in words": ({"rope_scaling": "linear"}, r"rope_scaling: found 'linear'; wanted an obj"),
    "rope parameters": ({"rope_parameters": 3}, r"rope_parameters: found 3; wanted an object"),
    "two thetas": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
        r"rope_theta: found \[10000.0, 1000000.0\].*wanted one value",
    ),
    "two scalings": (
        {
            "rope_scaling": {"type": "linear", "factor": 2},
            "rope_parameters": {"rope_type": "default"},
        },
        r"rope_scaling: found .*linear.*rope_parameters: found default; wanted both the same",
    ),
    "two factors": (
        {"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "factor": 32.0}},
        r"rope_scaling: found .*factor=8.0.*rope_parameters: found .*factor=32.0.*; wanted both",
    ),
    "two types": (
        {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2}},
        r"rope_scaling: found type 'linear' and rope_type 'dynamic'; wanted one",
    ),
    "half rotary": ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor: found 0.5; wanted 1"),
    "half rotary in 5": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        r"rope_parameters: partial_rotary_factor: found 0.5; wanted 1",
    ),
    "a tie in words": ({"tie_word_embeddings": "false"}, r"tie_word_embeddings: found 'false'; w"),
    "a bias as a number": ({"attention_bias": 1}, r"attention_bias: found 1; wanted true, false"),
    "a bias in words": ({"mlp_bias": "no"}, r"mlp_bias: found 'no'; wanted true, false or null"),
    "a token in words": ({"eos_token_id": "</s>"}, r"eos_token_id: found '</s>'; wanted an id"),
    "no token in a list": ({"eos_token_id": []}, r"eos_token_id: found \[\]; wanted an id, a list"),
    "null in a list": ({"eos_token_id": [2, None]}, r"eos_token_id: found \[2, None\]; wanted an"),
    "a dtype as a number": ({"torch_dtype": 7}, r"torch_dtype: found 7; wanted text or null"),
    "a dtype in a list": (
        {"dtype": ["float32"]},
        r"dtype: found \['float32'\]; wanted text or nul",
    ),
    "a size beyond 31 bits": (
        {"vocab_size": 1 << 31},
        r"vocab_size: found 2147483648; wanted a positive int of 31 bits",
    ),
    "a list with a word": ({"eos_token_id": [1, "a"]}, r"eos_token_id: found \[1, 'a'\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(case):
    change, message = BAD[case]
    with pytest.raises(InputError, match=rf"^some/config.json: {message}"):
        LlamaConfig.from_hf({**HF, **change}, "some/config.json")
