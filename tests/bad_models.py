"""Bad tokenizers, chat templates and weights for `python -m easylm.sft`.

Each case writes into a folder, which has good rows.jsonl, what is wrong, beside what it copies from
a finished run, and gives the options and what the message says.
"""

import json
import os
import pathlib
import shutil
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.runs import RANDOM, ROWS


class Case(NamedTuple):
    """A wrong call: options, what is said, the workdir and a library that is not installed."""

    options: dict
    wanted: list[str]
    workdir: str = "new"
    missing: str = ""


def copied(run: pathlib.Path, folder: pathlib.Path, part: str = "hf") -> pathlib.Path:
    """A copy of a part of the run, to damage."""
    return pathlib.Path(shutil.copytree(run / part, folder / part))


def edit(path: pathlib.Path, **changes) -> None:
    """Changes fields of a JSON object; None takes one away."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: part for name, part in value.items() if part is not None}))


def change_tensors(model: pathlib.Path, change) -> None:
    """Rewrites model.safetensors after change(tensors)."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


# Tokenizers and chat templates.


def no_such_tokenizer(folder, run):
    path = folder / "tokenizer"
    return Case(
        {"init_from": run / "hf", "data.tokenizer": path},
        [f"{path}: no such folder or file; wanted a folder with tokenizer.json or tokenizer.model"],
    )


def a_tokenizer_of_the_hub_that_does_not_answer(folder, run):
    name = "easylm/no-such-tokenizer"
    return Case(
        {"init_from": run / "hf", "data.tokenizer": name},
        [f"{name}: no such folder here, and the Hugging Face hub gave no tokenizer of that name"],
    )


def a_folder_without_tokenizer(folder, run):
    path = folder / "tokenizer"
    path.mkdir()
    return Case(
        {"init_from": run / "hf", "data.tokenizer": path},
        [f"{path}: no tokenizer in this folder; wanted tokenizer.json or tokenizer.model"],
    )


def a_cut_tokenizer(folder, run):
    path = copied(run, folder)
    os.truncate(path / "tokenizer.json", 1000)
    return Case({"init_from": path}, [f"{path}/tokenizer.json: not valid JSON"])


def no_sentencepiece_model(folder, run):
    path = folder / "tokenizer.model"
    path.write_text("SGVsbG8= 0\n")
    return Case(
        {"init_from": run / "hf", "data.tokenizer": path},
        [f"{path}: not a sentencepiece model", "give the Hugging Face folder with tokenizer.json"],
    )


def weights_without_tokenizer(folder, run):
    model = copied(run, folder)
    for path in (*model.glob("tokenizer*"), model / "special_tokens_map.json"):
        path.unlink()
    return Case(
        {"init_from": model},
        [f"{model}: no tokenizer came with these weights", "name one with data.tokenizer"],
    )


def a_tokenizer_without_eos(folder, run):
    path = copied(run, folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        edit(path / name, eos_token=None)
    return Case(
        {"init_from": run / "hf", "data.tokenizer": path},
        [f"{path}: the tokenizer names no eos_token", "add eos_token to its tokenizer_config.json"],
    )


def weights_whose_tokenizer_has_no_eos(folder, run):
    case = a_tokenizer_without_eos(folder, run)
    return case._replace(options={"init_from": folder / "hf"})


def a_tokenizer_larger_than_the_model(folder, run):
    path = copied(run, folder)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    new = {**tokenizer["added_tokens"][-1], "id": 320, "content": "<new>"}
    edit(path / "tokenizer.json", added_tokens=[*tokenizer["added_tokens"], new])
    return Case(
        {"init_from": run / "hf", "data.tokenizer": path},
        [
            "data.tokenizer: found 321 ids; the model has vocab_size=320.",
            "Use the model's own tokenizer, or set model.resize_vocab=True",
        ],
    )


def more_characters_than_ids(folder, run):
    path = folder / "chinese.jsonl"
    row = {"prompt": "".join(map(chr, range(0x4E00, 0x4F00))), "completion": "好"}
    path.write_text(json.dumps(row) + "\n")
    return Case(
        {**RANDOM, "data.tokenizer_vocab_size": 300, "data.sources": path},
        ["data.tokenizer_vocab_size: found 300; wanted at least 517: so many different characters"],
    )


def template(folder, run, text, *wanted, **options):
    path = folder / "template.jinja"
    path.write_text(text)
    options = {"init_from": run / "hf", "data.chat_template": path, **options}
    return Case(options, [said.replace("TEMPLATE", str(path)) for said in wanted])


def no_such_template(folder, run):
    options = {"init_from": run / "hf", "data.chat_template": "chatml"}
    return Case(options, ["chat_template: found 'chatml'; wanted 'tulu', 'own' or a jinja file"])


def no_template_of_its_own(folder, run):
    model = copied(run, folder)
    edit(model / "tokenizer_config.json", chat_template=None)
    return Case(
        {"init_from": model, "data.chat_template": "own"},
        [f"{model}: the tokenizer has no chat template; use", "chat_template"],
    )


def no_jinja(folder, run):
    text = "{% for m in messages %}\n{{ m['content'] }\n{% endfor %}"
    return template(folder, run, text, "TEMPLATE, line 2: not a jinja template", "correct it, or")


def a_template_that_refuses(folder, run):
    text = "{% if messages|length > 2 %}{{ raise_exception('one question only') }}{% endif %}"
    text += "{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
    # The first conversation of two questions.
    where = f"{folder}/rows.jsonl:{next(i for i, row in enumerate(ROWS, 1) if 'messages' in row)}"
    said = f"{where}: the chat template refuses this conversation: one question only"
    return template(folder, run, text, said)


def a_template_that_knows_no_system(folder, run):
    rows = [{"messages": [{"role": "system", "content": "Be kind."}, *ROWS[-1]["messages"]]}]
    path = folder / "system.jsonl"
    path.write_text(json.dumps(rows))
    text = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
    text += "{% endif %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
    said = f"{path}:1: the chat template refuses this conversation: no system"
    return template(folder, run, text, said, **{"data.sources": path})


def a_template_that_is_no_prefix(folder, run):
    text = "{% for m in messages %}{{ loop.revindex ~ m['role'] + m['content'] + eos_token }}"
    text += "{% endfor %}{% if add_generation_prompt %}0assistant{% endif %}"
    return template(
        folder, run, text,
        "data.chat_template=TEMPLATE: the chat template does not say what the assistant produces",
        "Add {% generation %} around",
    )  # fmt: skip


def a_template_that_trains_nothing(folder, run):
    text = "{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
    text += "{% generation %}{% endgeneration %}"
    said = (
        "data.chat_template=TEMPLATE: the chat template marks nothing",
        "put {% generation %} around",
    )
    return template(folder, run, text, *said)


def a_template_with_two_bos(folder, run):
    text = "{{ bos_token + bos_token }}{% for m in messages %}{{ m['role'] }}"
    text += "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% endfor %}"
    said = "data.chat_template=TEMPLATE: the chat template writes the beginning-of-sequence token"
    return template(folder, run, text, said, "'<s>' twice; remove one")


def stripped_newlines_of_another_tokenizer(folder, run):
    path = copied(run, folder)
    # As GPT-2 and Llama 3 split text: no Prepend, so what follows a special token is as elsewhere.
    edit(path / "tokenizer.json", normalizer={"type": "NFC"})
    return Case(
        {"init_from": path, "data.eos_newline": "strip"},
        ["eos_newline: found 'strip' with a tokenizer that is not LLaMA's", "wanted 'keep'"],
    )


def stripped_newlines_of_another_template(folder, run):
    text = "{% for m in messages %}{% generation %}{{ m['content'] + eos_token }}"
    text += "{% endgeneration %}{% endfor %}"
    said = "eos_newline: found 'strip' with a chat template that is not Tülu's; wanted 'keep'"
    return template(folder, run, text, said, **{"data.eos_newline": "strip"})


# Weights.


def no_such_weights(folder, run):
    path = folder / "model"
    return Case(
        {"init_from": path}, [f"{path}: no such file or folder; wanted a Hugging Face folder"]
    )


def weights_of_the_hub_that_does_not_answer(folder, run):
    return Case(
        {"init_from": "easylm/no-such-model"},
        ["easylm/no-such-model: no such folder here, and the Hugging Face hub gave no model of"],
    )


def a_folder_without_weights(folder, run):
    path = copied(run, folder)
    (path / "model.safetensors").unlink()
    return Case({"init_from": path}, [f"{path}: a folder with config.json but no weights; wanted"])


def another_architecture(folder, run):
    path = copied(run, folder)
    edit(path / "config.json", model_type="mistral", architectures=["MistralForCausalLM"])
    return Case(
        {"init_from": path},
        [f"{path}/config.json: model_type: found 'mistral'", "wanted 'llama'"],
    )


def a_config_that_is_no_json(folder, run):
    path = copied(run, folder)
    (path / "config.json").write_text('{"model_type": "llama",')
    return Case({"init_from": path}, [f"{path}/config.json: not valid JSON: "])


def a_rope_that_depends_on_the_text(folder, run):
    path = copied(run, folder)
    rope = {"rope_type": "dynamic", "factor": 2.0}
    edit(path / "config.json", rope_scaling=rope, rope_parameters=rope)
    return Case(
        {"init_from": path},
        ["init_from: rope_scaling.rope_type: found 'dynamic'; wanted linear or llama3"],
    )


def cut_weights(folder, run):
    path = copied(run, folder)
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    return Case(
        {"init_from": path},
        [str(path), "model.safetensors: truncated at tensor lm_head.weight: the file has"],
    )


def a_missing_tensor(folder, run):
    path = copied(run, folder)
    change_tensors(path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    return Case(
        {"init_from": path},
        [str(path), "no tensor model.layers.1.mlp.up_proj.weight; wanted one of shape [64, 32]"],
    )


def wrong_shapes(folder, run):
    path = copied(run, folder)
    edit(path / "config.json", intermediate_size=48)
    return Case(
        {"init_from": path},
        [
            str(path),
            "model.safetensors: tensor model.layers.0.mlp.gate_proj.weight: found shape [64, 32]; "
            "config.json says [48, 32]",
        ],
    )


def weights_that_are_not_finite(folder, run):
    path = copied(run, folder)
    change_tensors(path, lambda tensors: tensors["model.norm.weight"].put(3, np.nan))
    return Case(
        {"init_from": path},
        [str(path), "model.safetensors: tensor model.norm.weight holds values that are not finite"],
    )


def a_checkpoint_folder_without_checkpoints(folder, run):
    path = folder / "checkpoints"
    path.mkdir()
    return Case({"init_from": path}, [f"{path}: no files in this folder; wanted a Hugging Face"])


MODELS = [
    no_such_tokenizer, a_tokenizer_of_the_hub_that_does_not_answer, a_folder_without_tokenizer,
    a_cut_tokenizer, no_sentencepiece_model, weights_without_tokenizer, a_tokenizer_without_eos,
    weights_whose_tokenizer_has_no_eos, a_tokenizer_larger_than_the_model, more_characters_than_ids,
    no_such_template, no_template_of_its_own, no_jinja, a_template_that_refuses,
    a_template_that_knows_no_system, a_template_that_is_no_prefix, a_template_that_trains_nothing,
    a_template_with_two_bos, stripped_newlines_of_another_tokenizer,
    stripped_newlines_of_another_template, no_such_weights, weights_of_the_hub_that_does_not_answer,
    a_folder_without_weights, another_architecture, a_config_that_is_no_json,
    a_rope_that_depends_on_the_text, cut_weights, a_missing_tensor, wrong_shapes,
    weights_that_are_not_finite, a_checkpoint_folder_without_checkpoints,
]  # fmt: skip
