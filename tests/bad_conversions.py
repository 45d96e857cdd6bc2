"""Wrong calls of `python -m easylm.convert`.

Each gets the folder of all sources, a copy of hf to damage and a target, and gives the arguments
and what the one message must say.
"""

import json
import os
import pickle
import shutil

import numpy as np
import safetensors.numpy

from easylm.tokenizer import load_tokenizer
from tests.converters import models


def command(source, target, to, *options):
    return ["convert", f"--source={source}", f"--target={target}", f"--to={to}", *options]


def stream_options(sources):
    return f"--hf_config={sources / 'hf' / 'config.json'}"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensor(folder, name, change):
    """Replaces one tensor by change(tensor), or removes it where that is None."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][name]
    content = safetensors.numpy.load_file(file)
    content[name] = change(content[name])
    safetensors.numpy.save_file(content, file, metadata={"format": "pt"})


def nan_at_the_end(array):
    array = array.copy()
    array.flat[-1] = np.nan
    return array


def no_such_folder(sources, hf, target):
    return command("/no/such/folder", target, "hf"), ["/no/such/folder: no such file or folder"]


def empty_folder(sources, hf, target):
    (hf / "empty").mkdir()
    return command(hf / "empty", target, "hf"), [f"{hf / 'empty'}: no files", "wanted a Hugging"]


def not_a_checkpoint(sources, hf, target):
    shutil.rmtree(hf)
    hf.mkdir()
    (hf / "notes.txt").write_text("hello")
    return command(hf, target, "native"), ["without config.json and weights (found notes.txt)"]


def file_of_no_kind(sources, hf, target):
    (hf / "notes.txt").write_text("hello")
    return command(hf / "notes.txt", target, "hf"), ["notes.txt: a file of no known kind", "wanted"]


def other_architecture(sources, hf, target):
    edit_config(hf, model_type="mistral", architectures=["MistralForCausalLM"])
    return command(hf, target, "hf"), [
        f"{hf / 'config.json'}: model_type: found 'mistral'",
        "wanted 'llama', the one architecture supported",
        "Code Llama",
    ]


def wrong_type_in_config(sources, hf, target):
    edit_config(hf, hidden_size="32")
    return command(hf, target, "hf"), [
        "config.json: hidden_size: found '32'; wanted a positive int"
    ]


def config_is_no_json(sources, hf, target):
    (hf / "config.json").write_text('{"model_type": "llama",')
    return command(hf, target, "hf"), [f"{hf / 'config.json'}: not valid JSON"]


def target_exists(sources, hf, target):
    target = hf / "made"
    target.mkdir()
    return command(hf, target, "hf"), [f"--target: {target} exists; wanted a new folder"]


def target_is_source(sources, hf, target):
    return command(hf, f"{hf}/../hf/", "hf"), ["which is the source; wanted a new folder"]


def unknown_format(sources, hf, target):
    return command(hf, target, "gguf"), ["--to", "'gguf'", "native", "hf", "--help"]


def unknown_dtype(sources, hf, target):
    return command(hf, target, "hf", "--dtype=int8"), ["--dtype", "'int8'", "float32", "bfloat16"]


def unknown_option(sources, hf, target):
    return command(hf, target, "hf", "--shards=3"), ["--shards=3", "--help"]


def no_target(sources, hf, target):
    return ["convert", f"--source={hf}", "--to=hf"], ["--target", "required"]


def stream_without_config(sources, hf, target):
    return command(sources / "streaming_params", target, "hf"), [
        f"{sources / 'streaming_params'}: an EasyLM file does not say how many heads",
        "--hf_config=PATH",
    ]


def stream_of_another_size(sources, hf, target):
    edit_config(hf, intermediate_size=64)
    options = f"--hf_config={hf}"
    return command(sources / "streaming_params", target, "hf", options), [
        "transformer/h/0/feed_forward/w1/kernel: found [32, 48]",
        "wants [32, 64]",
    ]


def truncated_stream(sources, hf, target):
    content = (sources / "streaming_params").read_bytes()
    (hf / "streaming_params").write_bytes(content[: len(content) // 2])
    options = stream_options(sources)
    return command(hf / "streaming_params", target, "native", options), [
        f"{hf / 'streaming_params'}",
        "cut inside the record",
        "tensors are missing",
        "transformer/wte/embedding",
    ]


def truncated_safetensors(sources, hf, target):
    file = sorted(hf.glob("model-*.safetensors"))[0]
    os.truncate(file, file.stat().st_size - 10)
    return command(hf, target, "native"), [file.name, "truncated at tensor", "bytes; wanted"]


def missing_shard(sources, hf, target):
    file = sorted(hf.glob("model-*.safetensors"))[1]
    file.unlink()
    return command(hf, target, "hf"), [str(hf), file.name]


def extra_tensor(sources, hf, target):
    edit_config(hf, num_hidden_layers=1)
    return command(hf, target, "hf"), ["tensor model.layers.1.mlp.up_proj.weight is unknown"]


def missing_tensor(sources, hf, target):
    edit_config(hf, num_hidden_layers=3)
    return command(hf, target, "native"), ["no tensor model.layers.2.mlp.up_proj.weight; wanted"]


def wrong_shape(sources, hf, target):
    edit_config(hf, intermediate_size=64)
    return command(hf, target, "hf"), [
        "model.layers.0.mlp.up_proj.weight: found shape [48, 32]; config.json says [64, 32]"
    ]


def wrong_dtype(sources, hf, target):
    name = "model.norm.weight"
    change_tensor(hf, name, lambda array: array.astype(np.int32))
    return command(hf, target, "hf"), [name, "found dtype int32; wanted a float"]


def nan_to_hf(sources, hf, target):
    change_tensor(hf, "lm_head.weight", nan_at_the_end)
    return command(hf, target, "hf"), [str(hf), "lm_head.weight holds values that are not finite"]


def nan_to_native(sources, hf, target):
    change_tensor(hf, "lm_head.weight", nan_at_the_end)
    return command(hf, target, "native"), ["lm_head.weight holds values that are not finite"]


def rows_do_not_match_vocab_size(sources, hf, target):
    edit_config(hf, vocab_size=models.VOCAB_SIZE + 1)
    return command(hf, target, "native"), [
        f"model.embed_tokens.weight: found shape [{models.VOCAB_SIZE}, 32]; config.json says"
    ]


def a_pickle(sources, hf, target):
    (hf / "dataset.pkl").write_bytes(pickle.dumps({"step": 1}))
    return command(hf / "dataset.pkl", target, "hf"), ["Python pickle", "never opened"]


def larger_tokenizer(sources, hf, target):
    tokenizer = load_tokenizer(hf)
    tokenizer.add_tokens([f"<extra {i}>" for i in range(models.VOCAB_SIZE + 1 - len(tokenizer))])
    tokenizer.save_pretrained(hf)
    return command(hf, target, "hf"), [
        f"the tokenizer has {models.VOCAB_SIZE + 1}",
        f"vocab_size is {models.VOCAB_SIZE}",
        "--resize_vocab",
    ]


def damaged_checkpoint(sources, hf, target):
    step = hf / "native"
    shutil.copytree(sources / "native", step)
    for file in (step / "params").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            os.truncate(file, file.stat().st_size // 2)
    return command(step, target, "hf"), [f"{step / 'params'}: cannot be restored"]


def config_for_a_checkpoint(sources, hf, target):
    options = stream_options(sources)
    return command(sources / "native", target, "hf", options), ["native checkpoint", "leave out"]


def unpermuted_hf(sources, hf, target):
    return command(hf, target, "hf", "--unpermuted"), ["--unpermuted is for EasyLM files"]


def tokenizer_is_not_there(sources, hf, target):
    return command(hf, target, "hf", "--tokenizer=/no/tokenizer"), ["/no/tokenizer: no such folder"]


def target_under_a_file(sources, hf, target):
    return command(hf, hf / "config.json" / "new", "hf"), ["config.json is a file; wanted a folder"]


WRONG_CALLS = [
    no_such_folder, empty_folder, not_a_checkpoint, file_of_no_kind, other_architecture,
    wrong_type_in_config, config_is_no_json, target_exists, target_is_source, unknown_format,
    unknown_dtype, unknown_option, no_target, stream_without_config, stream_of_another_size,
    truncated_stream, truncated_safetensors, missing_shard, extra_tensor, missing_tensor,
    wrong_shape, wrong_dtype, nan_to_hf, nan_to_native, rows_do_not_match_vocab_size, a_pickle,
    larger_tokenizer, damaged_checkpoint, config_for_a_checkpoint, unpermuted_hf,
    tokenizer_is_not_there, target_under_a_file,
]  # fmt: skip
