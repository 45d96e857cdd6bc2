"""The options of a training run refuse what cannot work, before anything heavy is loaded."""

import dataclasses

import pytest

from easylm.config import from_config_dict, from_dict, to_config_dict
from easylm.errors import InputError
from easylm.models.llama.config import RopeScaling
from easylm.models.llama.presets import LLAMA2_7B, LLAMA3_2_1B
from easylm.trainers.config import SftConfig
from easylm.trainers.options import ModelConfig

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def values(**changes):
    """The fields of a run from scratch that works, with changes by dotted path."""
    config = to_config_dict(SftConfig)
    config.update(init_from="random", steps=10, batch_rows=8)
    config.model.update(SIZES)
    config.data.update(sources="train.jsonl", tokenizer="tokenizer", seq_len=256)
    config.update_from_flattened_dict(changes)
    return config


def refusal(**changes):
    with pytest.raises(InputError) as error:
        from_config_dict(SftConfig, values(**changes))
    return str(error.value)


def test_a_run_from_scratch_and_one_from_a_checkpoint():
    config = from_config_dict(SftConfig, values())
    assert from_dict(SftConfig, dataclasses.asdict(config)) == config
    pretrained = {"init_from": "some/model"} | {f"model.{name}": None for name in SIZES}
    assert from_config_dict(SftConfig, values(**pretrained)).init_from == "some/model"


def test_the_defaults_alone_name_what_is_missing():
    with pytest.raises(InputError, match=r"config.data.sources: found ''; wanted files"):
        from_config_dict(SftConfig, to_config_dict(SftConfig))


@pytest.mark.parametrize(
    "path, value, expected",
    [
        ("init_from", "", "config.init_from: found ''; wanted weights to start from"),
        ("seed", -1, "config.seed: found -1; wanted at least 0"),
        ("mesh", "2,x,1", "config.mesh: found '2,x,1'; wanted data,fsdp,tensor"),
        ("steps", None, "config.steps: found steps=None and epochs=None; wanted exactly one"),
        ("epochs", 2, "config.steps: found steps=10 and epochs=2; wanted exactly one"),
        ("steps", 0, "config.steps: found 0; wanted at least 1"),
        ("batch_examples", 9, "batch_examples: found batch_examples=9 and batch_rows=8; wanted"),
        ("batch_rows", None, "found batch_examples=None and batch_rows=None; wanted exactly one"),
        ("micro_batches", 3, "config.micro_batches: found 3; wanted a divisor of batch_rows (8)"),
        ("micro_batches", 0, "config.micro_batches: found 0; wanted at least 1"),
        ("log_every", 0, "config.log_every: found 0; wanted at least 1"),
        ("loss_chunk", 0, "config.loss_chunk: found 0; wanted at least 1"),
        ("remat", "all", "config.remat: found 'all'; wanted one of none, dots, block"),
        ("attention", "fast", "config.attention: found 'fast'; wanted one of auto, reference"),
        ("compute_dtype", "float16", "found 'float16'; wanted one of float32, bfloat16"),
        ("model.preset", "llama9", "config.model.preset: found 'llama9'; wanted one of llama_7b"),
        ("model.hidden_size", 0, "config.model.hidden_size: found 0; wanted at least 1"),
        ("model.hidden_size", None, "model.hidden_size: found None; wanted a number, or a preset"),
        ("model.num_attention_heads", 5, "heads: found 5; wanted a divisor of hidden_size (64)"),
        ("model.num_key_value_heads", 3, "num_attention_heads: found 4; wanted a multiple of"),
        ("model.hf_config", "x", "config.model.hf_config: found 'x'; wanted none of it with init"),
        ("model.resize_vocab", True, "config.model.resize_vocab: found True; wanted none of it"),
        ("model.rope_theta", 0.0, "config.model.rope_theta: found 0.0; wanted a number above 0"),
        ("data.sources", " ", "config.data.sources: found ' '; wanted files"),
        ("data.seq_len", 1, "config.data.seq_len: found 1; wanted at least 2"),
        ("data.seq_len", 513, "config.data.seq_len: found 513; wanted at most 512"),
        ("data.tokenizer", "", "config.data.tokenizer: found ''; wanted a tokenizer"),
        ("data.tokenizer_vocab_size", 900, "tokenizer_vocab_size: found 900; wanted none"),
        ("data.too_long", "cut", "config.data.too_long: found 'cut'; wanted one of truncate"),
        ("data.on_bad_row", "ignore", "config.data.on_bad_row: found 'ignore'; wanted one of"),
        ("cpu_devices", 0, "config.cpu_devices: found 0; wanted at least 1"),
        ("optimizer.warmup_steps", 11, "config.optimizer.warmup_steps: found 11; wanted at most"),
        ("optimizer.final_ratio", 1.0, "config.optimizer.final_ratio: found 1.0; wanted a number"),
        ("data.processes", 0, "config.data.processes: found 0; wanted at least 1"),
        ("optimizer.learning_rate", 0.0, "optimizer.learning_rate: found 0.0; wanted a number abo"),
        ("optimizer.b2", 1.0, "config.optimizer.b2: found 1.0; wanted a number from 0 to below 1"),
        ("optimizer.warmup_ratio", -0.1, "config.optimizer.warmup_ratio: found -0.1; wanted"),
        ("optimizer.eps", 0.0, "config.optimizer.eps: found 0.0; wanted a number above 0"),
        ("optimizer.weight_decay", -0.1, "config.optimizer.weight_decay: found -0.1; wanted 0"),
        ("optimizer.clip_norm", 0.0, "config.optimizer.clip_norm: found 0.0; wanted a number"),
        ("checkpoint.every", 0, "config.checkpoint.every: found 0; wanted at least 1"),
        ("checkpoint.keep", 0, "config.checkpoint.keep: found 0; wanted at least 1"),
        ("profile.steps", "10", "config.profile.steps: found '10'; wanted FIRST:LAST, two steps"),
        ("profile.steps", "13:10", "config.profile.steps: found '13:10'; wanted FIRST:LAST"),
        ("profile.steps", "0:3", "config.profile.steps: found '0:3'; wanted FIRST:LAST"),
        ("profile.steps", "-1:3", "config.profile.steps: found '-1:3'; wanted FIRST:LAST"),
        ("profile.steps", "2:3:4", "config.profile.steps: found '2:3:4'; wanted FIRST:LAST"),
        ("export.dtype", "int8", "config.export.dtype: found 'int8'; wanted one of float32"),
    ],
)
def test_what_cannot_work_is_refused_by_path(path, value, expected):
    assert expected in refusal(**{path: value})


def test_sizes_beside_pretrained_weights_are_refused():
    message = refusal(init_from="some/model")
    assert "config.model.hidden_size: found 64; wanted none: some/model has its own" in message
    changes = {f"model.{name}": None for name in SIZES} | {"model.preset": "llama2_7b"}
    assert "config.model.preset: found 'llama2_7b'" in refusal(init_from="some/model", **changes)


def test_the_model_of_given_sizes():
    model = ModelConfig(**SIZES, num_key_value_heads=2).llama_config(vocab_size=300, eos_token_id=7)
    assert (model.head_dim, model.num_key_value_heads, model.vocab_size) == (16, 2, 300)
    assert (model.eos_token_id, model.rope_theta, model.rms_norm_eps) == (7, 10000.0, 1e-5)
    assert ModelConfig(**SIZES).llama_config(vocab_size=300).num_key_value_heads == 4


def test_the_model_of_a_preset_and_changes_to_it():
    model = ModelConfig(preset="llama2_7b").llama_config(vocab_size=32001, pad_token_id=32000)
    assert model == dataclasses.replace(LLAMA2_7B, vocab_size=32001, pad_token_id=32000)
    changed = ModelConfig(preset="llama3_2_1b", num_hidden_layers=2, tie_word_embeddings=False)
    expected = dataclasses.replace(
        LLAMA3_2_1B, num_hidden_layers=2, tie_word_embeddings=False, vocab_size=500
    )
    assert changed.llama_config(vocab_size=500) == expected


def test_a_loaded_model_must_suit_the_rows():
    config = from_config_dict(SftConfig, values())
    config.check_model(dataclasses.replace(LLAMA2_7B, max_position_embeddings=256))
    with pytest.raises(InputError, match=r"data.seq_len: found 256; wanted at most 255"):
        config.check_model(dataclasses.replace(LLAMA2_7B, max_position_embeddings=255))
    config.check_model(LLAMA3_2_1B)
    stretched = dataclasses.replace(LLAMA2_7B, rope_scaling=RopeScaling("dynamic", 2.0))
    with pytest.raises(InputError, match="found 'dynamic'; wanted linear or llama3"):
        config.check_model(stretched)


def test_adafactor_has_no_mean_to_keep_in_another_dtype():
    changes = {"optimizer.name": "adafactor", "optimizer.mu_dtype": "bfloat16"}
    assert "config.optimizer.mu_dtype: found 'bfloat16'; wanted float32" in refusal(**changes)
