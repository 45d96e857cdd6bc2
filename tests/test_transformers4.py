"""What is exported here is the same model to transformers 4.46, in an environment of its own."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

from easylm import convert
from easylm.tokenizer import train_tokenizer
from tests import tiny

pytestmark = pytest.mark.slow

TEXTS = ["The quick brown fox jumps over the lazy dog 1234567 times.", "Straße, 你好! 😀"] * 3
VOCAB_SIZE = 352
MODELS = {
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "linear": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        "tie_word_embeddings": True,
        "head_dim": 6,
        "attention_bias": True,
    },
}
CONVERSATIONS = [
    [{"role": "user", "content": "The quick brown fox"}],
    [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "jumps\n\nover <s> 42"},
        {"role": "assistant", "content": "the lazy dog </s>"},
        {"role": "user", "content": "Straße 😀"},
        {"role": "assistant", "content": "你好"},
    ],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": "  two  spaces"}],
]
# Runs under both versions: FOLDER PROMPTS.npy CONVERSATIONS.json OUTPUT
READER = """
import json, sys
import numpy, torch, transformers

folder, prompts, conversations, output = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
tokens = torch.from_numpy(numpy.load(prompts))
with torch.no_grad():
    logits = model(tokens).logits.numpy()
    greedy = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=24,
        min_new_tokens=24, pad_token_id=0,
    ).numpy()
chats = [
    tokenizer.apply_chat_template(turns, add_generation_prompt=prompt, return_dict=False)
    for turns in json.load(open(conversations)) for prompt in (False, True)
]
numpy.savez(output, logits=logits, greedy=greedy)
json.dump({"version": transformers.__version__, "chats": chats}, open(output + ".json", "w"))
"""


def transformers_5(code, *args):
    """As `transformers_446`, in this environment."""
    command = [sys.executable, "-c", code, *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def read(run, folder, prompts, output):
    """What a transformers makes of an exported folder."""
    conversations = output.with_suffix(".conversations")
    conversations.write_text(json.dumps(CONVERSATIONS))
    run(READER, folder, prompts, conversations, output)
    said = json.loads(output.with_name(output.name + ".json").read_text())
    return said, np.load(output.with_name(output.name + ".npz"))


@pytest.mark.parametrize("name", MODELS)
def test_both_versions_read_the_same_model(transformers_446, tmp_path, name):
    model = tiny.hf_llama(vocab_size=VOCAB_SIZE, **MODELS[name])
    model.save_pretrained(tmp_path / "made")
    train_tokenizer(TEXTS, VOCAB_SIZE - 2, tmp_path / "tokenizer")
    convert.main(
        [
            f"--source={tmp_path / 'made'}",
            f"--target={tmp_path / 'hf'}",
            f"--tokenizer={tmp_path / 'tokenizer'}",
            "--to=hf",
        ]
    )
    prompts = np.random.default_rng(0).integers(3, VOCAB_SIZE, (2, 48))
    np.save(tmp_path / "prompts.npy", prompts)
    hf, prompts_file = tmp_path / "hf", tmp_path / "prompts.npy"
    new, new_arrays = read(transformers_5, hf, prompts_file, tmp_path / "new")
    old, old_arrays = read(transformers_446, hf, prompts_file, tmp_path / "old")
    assert old["version"].startswith("4.46.")
    assert new["version"] == transformers.__version__
    with torch.no_grad():
        original = model(torch.from_numpy(prompts)).logits.numpy()
    for arrays in (new_arrays, old_arrays):
        np.testing.assert_allclose(arrays["logits"], original, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(old_arrays["greedy"], new_arrays["greedy"])
    assert old["chats"] == new["chats"]
    assert len({tuple(chat) for chat in new["chats"]}) == 2 * len(CONVERSATIONS)


def test_a_source_saved_by_transformers_5_is_read_by_4(transformers_446, tmp_path):
    source = tmp_path / "made"
    tiny.hf_llama(vocab_size=VOCAB_SIZE).save_pretrained(source)
    train_tokenizer(TEXTS, VOCAB_SIZE - 2, tmp_path / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer.add_special_tokens({"extra_special_tokens": ["fox", "dog"]})
    tokenizer.save_pretrained(source)
    saved = json.loads((source / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "TokenizersBackend" and "chat_template" not in saved
    assert saved["extra_special_tokens"] == ["fox", "dog"]
    convert.main([f"--source={source}", f"--target={tmp_path / 'hf'}", "--to=hf"])
    np.save(tmp_path / "prompts.npy", np.arange(96).reshape(2, 48) + 3)
    original, _ = read(transformers_5, source, tmp_path / "prompts.npy", tmp_path / "original")
    for run, name in ((transformers_5, "new"), (transformers_446, "old")):
        found, _ = read(run, tmp_path / "hf", tmp_path / "prompts.npy", tmp_path / name)
        assert found["chats"] == original["chats"]
        assert found["version"].startswith("4.46.") == (name == "old")
