"""The model card is the recipe, with nothing that the run did not read."""

import dataclasses

import pytest

from easylm.model_card import model_card
from easylm.trainers.config import DpoConfig, SftConfig
from easylm.trainers.options import (
    CheckpointConfig,
    DataConfig,
    DpoOptions,
    ExportConfig,
    ModelConfig,
    OptimizerConfig,
    ProfileConfig,
)


def card(optimizer=None, data=None, dpo=None, **options):
    options = {"epochs": 2, "batch_examples": 128, **options}
    sections = {
        "model": ModelConfig(),
        "data": DataConfig(sources="tulu.jsonl@1000,flan.jsonl", **data or {}),
        "optimizer": OptimizerConfig(**optimizer or {}),
        "checkpoint": CheckpointConfig(),
        "export": ExportConfig(),
        "profile": ProfileConfig(),
    }
    objective, sections = (
        (SftConfig, sections)
        if dpo is None
        else (DpoConfig, {**sections, "dpo": DpoOptions(**dpo)})
    )
    config = objective(init_from="meta-llama/Llama-2-7b-hf", **sections, **options)
    return model_card("A LLaMA", {"dtype": "bfloat16"}, dataclasses.asdict(config))


def test_the_card_is_the_recipe():
    assert card() == (
        "# A LLaMA\n\n"
        "- dtype: bfloat16\n"
        "- started from: init_from=meta-llama/Llama-2-7b-hf, seed=42\n"
        "- data: sources=tulu.jsonl@1000,flan.jsonl, chat_template=tulu, eos_newline=keep, "
        "special_tokens=text, too_long=truncate, seq_len=2048, packing=True\n"
        "- amounts: epochs=2, batch_examples=128\n"
        "- loss: loss_weighting=token\n"
        "- optimizer: name=adamw, b1=0.9, b2=0.999, eps=1e-08, weight_decay=0, clip_norm=1\n"
        "- learning rate: learning_rate=2e-05, schedule=linear, warmup_ratio=0.03, final_ratio=0\n"
        "- precision: param_dtype=float32, compute_dtype=bfloat16, mu_dtype=float32\n"
    )


@pytest.mark.parametrize(
    ("options", "shown", "left_out"),
    [
        ({"loss_weighting": "microbatch"}, "loss_group=32", "steps"),
        ({"epochs": None, "steps": 70}, "amounts: steps=70, batch_examples=128", "epochs"),
        ({"optimizer": {"warmup_steps": 9}}, "warmup_steps=9", "warmup_ratio"),
        ({"optimizer": {"schedule": "wsd"}}, "decay_ratio=0.1", "warmup_steps"),
        ({"optimizer": {"schedule": "constant"}}, "schedule=constant", "final_ratio"),
        ({"optimizer": {"name": "lion"}}, "name=lion, b1=0.9, b2=0.999, weight", "eps"),
        ({"optimizer": {"name": "adafactor"}}, "name=adafactor, weight_decay", "mu_dtype"),
        ({"optimizer": {"clip_norm": None}}, "weight_decay=0\n", "clip_norm"),
    ],
)
def test_only_what_was_read_is_shown(options, shown, left_out):
    assert shown in card(**options)
    assert f"{left_out}=" not in card(**options)


def test_the_card_of_a_run_on_pairs_has_its_loss_and_reference():
    line = (
        "- preferences: loss=sigmoid, beta=0.1, label_smoothing=0, sft_weight=0.2, "
        "margin_weight=0, reference=policy, scored_turns=last, keep_prompt=end\n"
    )
    assert line in card(dpo={"sft_weight": 0.2})
    assert "preferences" not in card()


@pytest.mark.parametrize(
    ("dpo", "data", "line"),
    [
        (
            {"loss": "simpo", "beta": 2.0},
            None,
            "loss=simpo, beta=2, simpo_gamma=0.5, sft_weight=0, scored_turns=last, keep_prompt=end",
        ),
        (
            {"loss": "ipo", "reference": "gs://b/ref"},
            {"too_long": "drop"},
            "loss=ipo, beta=0.1, sft_weight=0, reference=gs://b/ref, scored_turns=last",
        ),
        ({"loss": "robust", "label_smoothing": 0.1}, None, "beta=0.1, label_smoothing=0.1, sft"),
    ],
)
def test_only_what_the_loss_reads_is_shown(dpo, data, line):
    assert line in card(dpo=dpo, data=data)


def test_stripped_newlines_are_owned_up_to():
    assert "inference sees tokens there that training did not" in card(
        data={"eos_newline": "strip"}
    )
    assert "inference" not in card()


def test_a_config_of_another_version_or_none():
    assert model_card("A LLaMA", {"from": "x"}, None) == "# A LLaMA\n\n- from: x\n"
    other = {"seed": 7, "optimizer": {"name": "adamw", "newer": 1}, "newest": {"a": {"b": 1}}}
    assert model_card("A LLaMA", {}, other) == (
        "# A LLaMA\n\n- started from: seed=7\n- optimizer: name=adamw\n"
    )
