"""`python -m easylm.convert`: every source to both targets, and every wrong call refused."""

import json
import shutil
import subprocess
import sys

import pytest
import safetensors.numpy
import torch
import transformers

from easylm.checkpoint import read_bundle
from easylm.command import run_command
from easylm.convert import main
from easylm.tokenizer import load_tokenizer
from tests import bad_conversions
from tests.bad_conversions import command, stream_options
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


@pytest.mark.parametrize("wrong", bad_conversions.WRONG_CALLS, ids=lambda wrong: wrong.__name__)
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


@pytest.mark.parametrize(
    "wrong",
    [
        bad_conversions.no_such_folder,
        bad_conversions.unknown_format,
        bad_conversions.nan_to_native,
        bad_conversions.truncated_stream,
    ],
)
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
