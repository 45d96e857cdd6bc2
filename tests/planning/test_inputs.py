"""What plan knows of a run's model and data, against what training does with the same config."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from easylm import dpo, sft
from easylm.command_line import parse_config
from easylm.config import from_config_dict, load
from easylm.data.pair_batches import pairs_per_row
from easylm.data.pair_rows import PAIRS
from easylm.errors import InputError
from easylm.models.llama.presets import PUBLISHED
from easylm.planning.estimate import typical_flops
from easylm.planning.inputs import read_inputs
from easylm.planning.program import build_program
from easylm.start import (
    batch_rows,
    model_config,
    open_data,
    open_tokenizer,
    prepare_data,
    prepare_preferences,
)
from easylm.tokenizer import train_tokenizer
from easylm.trainers.config import DpoConfig, SftConfig
from tests.converters.test_sources import running_hub
from tests.runs import PAIRS_OPTIONS, RANDOM, ROWS, arguments, make_folder, make_pairs_folder

AN_EPOCH = {"batch_rows": "none", "batch_examples": 8, "steps": "none", "epochs": 2}
EXPECTED = {"data.expected_examples": 2000, "data.expected_mean_tokens": 30.0}
ROW_GROUPS = 8


def config_of(config_class, folder, options):
    """The config of a tiny run."""
    argv = [one for one in arguments(folder, "", {**RANDOM, **options}) if "workdir" not in one]
    return parse_config(argv, config_class, "", "", usage="", own={})[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def pairs_folder(tmp_path_factory):
    return make_pairs_folder(tmp_path_factory.mktemp("dpo"))


def same_batches(planned, trained):
    """Whether two streams have the same steps, of rows with segments of the same lengths."""
    assert (len(planned), planned.batch_rows) == (len(trained), trained.batch_rows)
    np.testing.assert_array_equal(planned.seen_lengths, trained.seen_lengths)
    for step in range(len(trained)):
        rows = [ids.tolist() for ids in planned.plan_rows(step)]
        assert rows == [ids.tolist() for ids in trained.plan_rows(step)][: len(rows)]
    np.testing.assert_array_equal(planned.segment_lengths, trained.segment_lengths)


@pytest.mark.parametrize("options", [AN_EPOCH, {}, {**AN_EPOCH, "data.packing": False}])
def test_batches_are_those_of_sft(folder, tmp_path, options):
    config = config_of(SftConfig, folder, options)
    rows = open_data(config)
    tokenizer = open_tokenizer(config, str(tmp_path), rows["data"], None, going_on=False)
    model = model_config(config, None, tokenizer)
    data = {"data": prepare_data(config, rows["data"], tokenizer, model)}
    trained, _ = sft.open_streams(config, data, ROW_GROUPS)
    inputs = read_inputs(config)
    same_batches(inputs.stream, trained)
    assert (inputs.model, inputs.noun, inputs.origin) == (model, "example", "counted")
    assert inputs.pairs_per_row == 0
    tokens = [segment for row in inputs.segments_of(0) for segment in row]
    assert sum(tokens) == np.count_nonzero(trained[0]["segment_ids"])


@pytest.mark.parametrize("packing", [True, False])
def test_batches_are_those_of_dpo(pairs_folder, tmp_path, packing):
    options = {**PAIRS_OPTIONS, **AN_EPOCH, "data.packing": packing, "dpo.loss": "sigmoid"}
    config = config_of(DpoConfig, pairs_folder, options)
    rows = open_data(config, PAIRS)
    tokenizer = open_tokenizer(config, str(tmp_path), rows["data"], None, going_on=False)
    model = model_config(config, None, tokenizer)
    pairs = prepare_preferences(config, rows["data"], tokenizer, model).pairs
    count = batch_rows(config, pairs.lengths, "pair")
    trained, _ = dpo.open_streams(config, {"data": pairs}, None, count, ROW_GROUPS)
    inputs = read_inputs(config)
    same_batches(inputs.stream, trained)
    assert inputs.noun == "pair"
    assert inputs.pairs_per_row == pairs_per_row(pairs, config.data.seq_len, packing)


def test_what_is_expected_is_taken_and_nothing_read(tmp_path):
    options = {**EXPECTED, **AN_EPOCH}  # there are no rows in this folder
    folder = make_folder(tmp_path)
    (folder / "rows.jsonl").unlink()
    inputs = read_inputs(config_of(SftConfig, folder, options))
    lengths = inputs.stream.segment_lengths
    assert lengths.shape == (2000, 1) and inputs.origin == "expected by the config"
    # Clipped to 32 and to the row.
    assert lengths.min() == 32 and lengths.max() == 80
    assert inputs.model.vocab_size == RANDOM["data.tokenizer_vocab_size"]
    pairs = {**EXPECTED, **AN_EPOCH, **PAIRS_OPTIONS, "data.expected_mean_tokens": 110.0}
    make_pairs_folder(tmp_path)
    inputs = read_inputs(config_of(DpoConfig, folder, pairs))
    lengths = inputs.stream.segment_lengths
    assert lengths.shape == (2000, 2) and inputs.pairs_per_row > 1
    np.testing.assert_array_equal(lengths[:, 0], lengths[:, 1])
    assert lengths.sum(axis=1).mean() == pytest.approx(110, rel=0.1)


def test_expected_lengths_have_the_mean_that_is_expected(folder):
    options = {**EXPECTED, "data.expected_mean_tokens": 400.0, "data.seq_len": 4096}
    options["model.max_position_embeddings"] = 4096
    inputs = read_inputs(config_of(SftConfig, folder, options))
    assert inputs.stream.segment_lengths.mean() == pytest.approx(400, rel=0.02)


def test_published_sizes_are_known_here(folder, capsys):
    random = dict.fromkeys([name for name in RANDOM if name.startswith("model.")], "none")
    options = {**random, "init_from": "meta-llama/Llama-2-13b-hf", **EXPECTED}
    options |= {"data.tokenizer_vocab_size": "none", "model.max_position_embeddings": 8192}
    inputs = read_inputs(config_of(SftConfig, folder, options))
    assert inputs.model.hidden_size == 5120 and inputs.model.max_position_embeddings == 8192
    assert "sizes as published, known here" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"data.seq_len: found 80; wanted at most 64"):
        read_inputs(config_of(SftConfig, folder, {**options, "model.max_position_embeddings": 64}))


IN_A_PROCESS = """
import json, sys
from easylm.command_line import parse_config
from easylm.config import from_config_dict, load
from easylm.planning.estimate import typical_flops
from easylm.planning.inputs import read_inputs
from easylm.planning.program import build_program
from easylm.trainers.config import SftConfig
inputs = read_inputs(parse_config(sys.argv[1:], SftConfig, "", "", usage="", own={})[0])
print(json.dumps([inputs.model.hidden_size, len(inputs.stream), inputs.origin]))
"""


def read_from_hub(folder, endpoint, home, options):
    """What a fresh process prints: huggingface_hub reads the environment when imported."""
    argv = [one for one in arguments(folder, "", options) if "workdir" not in one]
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, *argv],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )


def test_the_weights_of_a_hubs_model_stay_there(folder, tmp_path):
    repository = tmp_path / "hub" / "org" / "model"
    texts = [f"<|user|> <|assistant|> {row}" for row in ROWS]
    train_tokenizer(texts, 400, repository)
    config = {**PUBLISHED["meta-llama/Llama-2-7b-hf"].to_hf("float32"), "hidden_size": 64}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    (repository / "config.json").write_text(json.dumps(config))
    (repository / "model.safetensors").write_bytes(b"no weights: damaged if they are opened")
    options = {"init_from": "org/model", **AN_EPOCH}
    with running_hub(tmp_path / "hub") as (endpoint, asked):
        expected = read_from_hub(folder, endpoint, tmp_path / "a", {**options, **EXPECTED})
        of_sizes = {place.rpartition("/")[2] for place in asked if place.startswith("GET org/")}
        asked.clear()
        counted = read_from_hub(folder, endpoint, tmp_path / "b", options)
        missing = {"init_from": "org/none", **AN_EPOCH, **EXPECTED}
        none = read_from_hub(folder, endpoint, tmp_path / "c", missing)
    assert expected.returncode == 0, expected.stderr
    assert json.loads(expected.stdout)[::2] == [64, "expected by the config"]
    assert "org/model: sizes by its config.json" in expected.stderr
    assert of_sizes == {"config.json"}
    assert counted.returncode == 0, counted.stderr
    assert json.loads(counted.stdout)[::2] == [64, "counted"]
    assert "weights not downloaded" in counted.stderr
    downloaded = {place.rpartition("/")[2] for place in asked if place.startswith("GET org/")}
    assert downloaded >= {"config.json", "tokenizer.json"}
    assert "model.safetensors" not in downloaded
    assert "InputError: org/none: no such folder here, and the Hugging Face hub" in none.stderr


def test_the_flops_of_a_step_are_those_of_the_run_even_if_its_last_step_is_nearly_empty():
    config = from_config_dict(SftConfig, load("sft/tulu2_7b").config)
    data = dataclasses.replace(config.data, expected_examples=1100)
    config = dataclasses.replace(
        config, data=data, epochs=1, mesh="1,1,1", batch_examples=512, micro_batches=1
    )
    inputs = read_inputs(config)
    filled = sum(len(ids) > 0 for ids in inputs.stream.plan_rows(len(inputs.stream) - 1))
    assert 0 < filled < inputs.stream.batch_rows / 4
    program = build_program(config, inputs, jax.devices()[:1])
    flops = typical_flops(config, inputs, program, "blockwise", "tpu")
    lengths = inputs.stream.seen_lengths.astype(float)
    tokens, pairs = lengths.sum(), (lengths * (lengths + 1) / 2).sum()
    asked = 6 * 6738415616 * tokens + 12 * 32 * 4096 * pairs
    assert flops.model * len(inputs.stream) == pytest.approx(asked, rel=1e-12)
    rows, seq_len = program.batch["tokens"].shape
    kernels = 6738415616 - 2 * 32000 * 4096
    # All rows of a full step, forward and backward, with little attention beside them.
    least = 6 * rows * seq_len * (kernels + 32000 * 4096)
    assert 1.05 * least < flops.hardware < 1.4 * least
