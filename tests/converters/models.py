"""The same tiny LLaMA in every format that weights come in."""

import json
import pathlib
import shutil

import torch

from easylm.tokenizer import train_tokenizer
from tests import tiny
from tests.converters import easylm_encoder

TEXTS = ["The quick brown fox jumps over the lazy dog 1234567 times.", "Straße, 你好!"] * 3
# Tokenizer of 320 ids or fewer, and a few rows to spare, as published models have.
VOCAB_SIZE = 324


def hf_model(**overrides):
    """A transformers model as large as the tokenizer of `write_all`."""
    return tiny.hf_llama(vocab_size=VOCAB_SIZE, **overrides)


def write_all(folder: pathlib.Path) -> None:
    """Writes hf, hf_bfloat16, hf_bin and streaming_params, the first three with a tokenizer."""
    model = hf_model()
    train_tokenizer(TEXTS, 320, folder / "tokenizer")
    # A key that this project does not write, to see whether files are kept as they are.
    config = folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"padding_side": "left"}))
    model.save_pretrained(folder / "hf", max_shard_size="60KB")
    (folder / "hf" / "README.md").write_text("# The original\n")
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tree = easylm_encoder.from_hf(weights, heads=8, kv_heads=2)
    (folder / "streaming_params").write_bytes(easylm_encoder.stream(tree, lexicographic=True))
    (folder / "hf_bin").mkdir()
    torch.save(model.state_dict(), folder / "hf_bin" / "pytorch_model.bin")
    shutil.copy(folder / "hf" / "config.json", folder / "hf_bin")
    model.to(torch.bfloat16).save_pretrained(folder / "hf_bfloat16")
    for name in ("hf", "hf_bin", "hf_bfloat16"):
        for file in (folder / "tokenizer").glob("*.json"):
            shutil.copy(file, folder / name)
