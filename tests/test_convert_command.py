"""`python -m easylm.convert`: every source to both targets, and every wrong call refused."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from easylm.checkpoint import read_bundle
from easylm.command import run_command
from easylm.convert import main
from easylm.tokenizer import load_tokenizer
from tests.converters import models

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    models.write_all(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command(folder / "hf", folder / "native", "native"))
        with pytest.raises(SystemExit) as left:
            run_command(main)
    assert left.value.code == 0
    return folder


def command(source, target, to, *options):
    return ["convert", f"--source={source}", f"--target={target}", f"--to={to}", *options]


@pytest.fixture
def convert(monkeypatch, capfd):
    """Runs the command in this process → (exit code, what it wrote to stderr)."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", list(argv))
        with pytest.raises(SystemExit) as left:
            run_command(main)
        return left.value.code, capfd.readouterr().err

    return run


def tensors(folder):
    """Every tensor of a Hugging Face folder: name -> (dtype, bytes)."""
    found = {}
    for file in folder.glob("*.safetensors"):
        loaded = safetensors.numpy.load_file(file)
        found |= {name: (array.dtype.name, array.tobytes()) for name, array in loaded.items()}
    return found


def stream_options(sources):
    return f"--hf_config={sources / 'hf' / 'config.json'}"


SOURCES = {
    "hf": ("hf", "Hugging Face safetensors"),
    "hf_bin": ("hf", "PyTorch .bin"),
    "hf_bfloat16": ("hf_bfloat16", "Hugging Face safetensors"),
    "native": ("hf", "native checkpoint"),
    "streaming_params": ("hf", "EasyLM parameters"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_becomes_hf_directly_and_by_way_of_native(sources, tmp_path, convert, name):
    expected, kind = SOURCES[name]
    options = [stream_options(sources)] if name == "streaming_params" else []
    code, said = convert(*command(sources / name, tmp_path / "hf", "hf", *options))
    assert code == 0, said
    assert kind in said
    assert f"wrote {tmp_path / 'hf'}" in said
    assert tensors(tmp_path / "hf") == tensors(sources / expected)

    code, said = convert(*command(sources / name, tmp_path / "native", "native", *options))
    assert code == 0, said
    code, said = convert(*command(tmp_path / "native", tmp_path / "back", "hf"))
    assert code == 0, said
    assert tensors(tmp_path / "back") == tensors(sources / expected)
    for target in ("hf", "back"):
        for file in TOKENIZER_FILES:
            assert (tmp_path / target / file).read_bytes() == (sources / "hf" / file).read_bytes()


@pytest.mark.parametrize("name", ["hf", "native"])
@pytest.mark.parametrize("to", ["hf", "native"])
def test_recast_to_bfloat16_rounds_as_torch_does(sources, tmp_path, convert, name, to):
    code, said = convert(*command(sources / name, tmp_path / "out", to, "--dtype=bfloat16"))
    assert code == 0, said
    out = tmp_path / "out"
    if to == "native":
        assert convert(*command(out, tmp_path / "again", "hf"))[0] == 0
        out = tmp_path / "again"
    assert tensors(out) == tensors(sources / "hf_bfloat16")
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_result_is_the_model_to_transformers(sources, tmp_path, convert):
    assert convert(*command(sources / "native", tmp_path / "hf", "hf"))[0] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens).logits, models.hf_model()(tokens).logits, rtol=0, atol=0
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    turns = [{"role": "user", "content": "jumps"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<s><|user|>\njumps"


def test_the_card_and_generation_config_of_hf_stay_and_others_get_one(sources, tmp_path, convert):
    kept = sources / "hf"
    assert convert(*command(kept, tmp_path / "hf", "hf"))[0] == 0
    for file in ("README.md", "generation_config.json"):
        assert (tmp_path / "hf" / file).read_bytes() == (kept / file).read_bytes()
    assert convert(*command(sources / "native", tmp_path / "new", "hf"))[0] == 0
    assert "native checkpoint" in (tmp_path / "new" / "README.md").read_text()


def test_a_checkpoint_keeps_the_config_of_its_run(sources, tmp_path, convert):
    from easylm.checkpoint import abstract_params_in, make_bundle, read_params, write_params

    step = str(sources / "native")
    bundle = make_bundle(
        read_bundle(step)["model_config"], tokenizer_files={}, run_config={"seed": 7}
    )
    write_params(str(tmp_path / "run"), read_params(step, abstract_params_in(step)), bundle)
    code, said = convert(*command(tmp_path / "run", tmp_path / "out", "native"))
    assert code == 0
    assert "no tokenizer beside the weights" in said
    assert read_bundle(str(tmp_path / "out"))["run_config"] == {"seed": 7}


def exports(sources, folder, complete, cut_off):
    """`folder` as the hf of a run with export.every: whole models by step, and one that is not."""
    for step in complete:
        shutil.copytree(sources / "hf", folder / step)
        (folder / step / "COMPLETE").touch()
    shutil.copytree(sources / "hf_bfloat16", folder / cut_off)


@pytest.mark.parametrize("to", ["hf", "native"])
def test_exports_of_a_run_mean_the_newest_complete_one(sources, tmp_path, convert, to):
    exports(sources, tmp_path / "hf", complete=["9", "10"], cut_off="11")
    code, said = convert(*command(tmp_path / "hf", tmp_path / "out", to))
    assert code == 0, said
    assert f"newest in {tmp_path / 'hf' / '10'}\n" in said
    if to == "hf":
        assert tensors(tmp_path / "out") == tensors(sources / "hf")


def test_exports_of_which_none_is_complete_are_refused(sources, tmp_path, convert):
    exports(sources, tmp_path / "hf", complete=[], cut_off="11")
    code, said = convert(*command(tmp_path / "hf", tmp_path / "out", "hf"))
    assert code == 2
    assert "no files in this folder" in " ".join(said.split())


@pytest.mark.parametrize("name", ["hf", "native"])
@pytest.mark.parametrize("to", ["hf", "native"])
def test_a_larger_tokenizer_gets_mean_rows(sources, tmp_path, convert, name, to):
    larger = tmp_path / "tokenizer"
    tokenizer = load_tokenizer(sources / "tokenizer")
    tokenizer.add_tokens([f"<extra {i}>" for i in range(models.VOCAB_SIZE + 3 - len(tokenizer))])
    tokenizer.save_pretrained(larger)
    options = (f"--tokenizer={larger}", "--resize_vocab")
    code, said = convert(*command(sources / name, tmp_path / "out", to, *options))
    assert code == 0, said
    assert "mean of the old ones" in said
    out = tmp_path / "out"
    if to == "native":
        assert convert(*command(out, tmp_path / "again", "hf"))[0] == 0
        out = tmp_path / "again"
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert len(transformers.AutoTokenizer.from_pretrained(out)) == models.VOCAB_SIZE + 3
    original = models.hf_model().state_dict()
    for tensor in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = model.state_dict()[tensor]
        assert torch.equal(rows[: models.VOCAB_SIZE], original[tensor])
        mean = original[tensor].mean(0, keepdim=True).expand(3, -1)
        torch.testing.assert_close(rows[models.VOCAB_SIZE :], mean, rtol=0, atol=1e-6)


def test_a_tilde_is_the_home_folder_in_every_path(sources, tmp_path, convert, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    (tmp_path / "hf").mkdir()
    for file in ("config.json", *TOKENIZER_FILES):
        shutil.copy(sources / "hf" / file, tmp_path / "hf")
    shutil.copy(sources / "streaming_params", tmp_path)
    options = ("--hf_config=~/hf/config.json", "--tokenizer=~/hf")
    for to in ("native", "hf"):
        code, said = convert(*command("~/streaming_params", f"~/to_{to}", to, *options))
        assert code == 0, said
        assert "wrote " + str(tmp_path / f"to_{to}") in said
        assert (tmp_path / f"to_{to}").is_dir()
    assert not (tmp_path.parent / "~").exists()
    assert convert(*command("~/to_native", "~/again", "hf"))[0] == 0
    assert tensors(tmp_path / "again") == tensors(sources / "hf")


def with_a_tokenizer_of_transformers_5(sources, folder, *, chat_template="{{ 'mine' }}"):
    """A copy of sources/hf whose tokenizer files are as transformers 5 saves them."""
    shutil.copytree(sources / "hf", folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = chat_template
    for file in TOKENIZER_FILES:
        (folder / file).unlink()
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "TokenizersBackend"
    )
    assert (folder / "chat_template.jinja").exists() == (chat_template is not None)


@pytest.mark.parametrize("chat_template", ["{{ 'mine' }}", None])
def test_tokenizer_files_of_transformers_5_are_rewritten_for_4(
    sources, tmp_path, convert, chat_template
):
    source = tmp_path / "source"
    with_a_tokenizer_of_transformers_5(sources, source, chat_template=chat_template)
    assert convert(*command(source, tmp_path / "native", "native"))[0] == 0
    for start, out in ((source, tmp_path / "out"), (tmp_path / "native", tmp_path / "back")):
        code, said = convert(*command(start, out, "hf"))
        assert code == 0, said
        assert said.count("tokenizer files rewritten") == 1
        config = json.loads((out / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert config.get("chat_template") == chat_template
        assert not (out / "chat_template.jinja").exists()
        text = "The quick</s> Straße 42"
        ids = [transformers.AutoTokenizer.from_pretrained(f)(text).input_ids for f in (source, out)]
        assert ids[0] == ids[1]


# Wrong calls. Each gets the folder of all sources, a copy of hf to damage and a target, and gives
# the arguments and what the one message must say.


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


@pytest.mark.parametrize("wrong", WRONG_CALLS, ids=lambda wrong: wrong.__name__)
def test_a_wrong_call_is_one_message_and_leaves_nothing(sources, tmp_path, convert, wrong):
    hf = tmp_path / "hf"
    shutil.copytree(sources / "hf", hf)
    (tmp_path / "targets").mkdir()
    argv, wanted = wrong(sources, hf, tmp_path / "targets" / "new")
    code, said = convert(*argv)
    assert code == 2, said
    # The message is wrapped; the line that says what the source is may stand before it.
    words = " ".join(said[said.index("error:") :].split())
    for text in wanted:
        assert text in words
    assert said.count("error:") == 1
    assert "Traceback" not in said
    assert list((tmp_path / "targets").iterdir()) == []


@pytest.mark.parametrize("wrong", [no_such_folder, unknown_format, nan_to_native, truncated_stream])
def test_a_wrong_call_of_the_real_command(sources, tmp_path, wrong):
    shutil.copytree(sources / "hf", tmp_path / "hf")
    argv, _ = wrong(sources, tmp_path / "hf", tmp_path / "new")
    result = subprocess.run(
        [sys.executable, "-m", "easylm.convert", *argv[1:]], capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "new").exists()


def test_help_fits_a_terminal_and_loads_no_heavy_library():
    program = (
        "import sys\nfrom easylm.convert import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as left:\n    assert left.code == 0\n"
        "print([name for name in ('jax', 'torch', 'transformers') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert lines[-1] == "[]", result.stderr
    assert "examples:" in lines
    assert max(map(len, lines)) <= 80
