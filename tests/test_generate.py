"""`python -m easylm.generate`: answers as transformers gives them, and every wrong call refused."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

from easylm import storage
from easylm.command import run_command
from easylm.convert import main as convert
from easylm.generate import main, new_file, text_of
from easylm.models.llama.decoding import Completion
from easylm.tokenizer import load_tokenizer
from tests.bucket import running_bucket
from tests.converters import models

ROOT = pathlib.Path(__file__).resolve().parent.parent
QUICK, LAZY = "The quick brown fox", "the lazy dog 123"
ROWS = [
    {"prompt": QUICK, "id": 7, "kept": {"ü": [1, None]}},
    {"messages": [{"role": "user", "content": LAZY}]},
    {
        "messages": [
            {"role": "system", "content": "fox"},
            {"role": "user", "content": "dog"},
            {"role": "assistant", "content": "jumps"},
            {"role": "user", "content": "times"},
        ]
    },
    {"prompt": "Straße, 你好!"},
    {"prompt": "over"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """hf, native, base (no chat template) and bare (no tokenizer): one model."""
    folder = tmp_path_factory.mktemp("models")
    models.write_all(folder)
    set_config(folder / "hf", max_position_embeddings=256)
    with pytest.MonkeyPatch.context() as patch:
        target = folder / "run" / "checkpoints" / "1"
        patch.setenv("JAX_PLATFORMS", os.environ["JAX_PLATFORMS"])
        convert([f"--source={folder / 'hf'}", f"--target={target}", "--to=native"])
    shutil.copytree(folder / "hf", folder / "base")
    config = folder / "base" / "tokenizer_config.json"
    values = json.loads(config.read_text())
    del values["chat_template"]
    config.write_text(json.dumps(values))
    shutil.copytree(folder / "hf", folder / "bare", ignore=shutil.ignore_patterns("*token*"))
    return folder


def set_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def generate(monkeypatch, capfd):
    """Runs the command in this process → (exit code, stdout, stderr)."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, argv)])
        with pytest.raises(SystemExit) as left:
            run_command(main)
        return left.value.code, *capfd.readouterr()

    return run


def by_transformers(folder, asked, new_tokens):
    """(text, finish reason) of one conversation or text by transformers alone, greedily."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    if isinstance(asked, str):
        ids = tokenizer(asked)["input_ids"]
    else:
        text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    room = min(new_tokens, model.config.max_position_embeddings - len(ids))
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=room,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
    )[0, len(ids) :].tolist()
    reason = "stop" if out[-1] == 2 else "length"
    return spelled(tokenizer.convert_ids_to_tokens(out)), reason


def spelled(tokens):
    """The text of sentencepiece tokens: bytes that make no characters are U+FFFD each."""
    text, run = "", b""
    for token in [*filter(None, tokens), "</s>"]:  # None: beyond the tokenizer's ids
        if token.startswith("<0x"):
            run += bytes([int(token[3:5], 16)])
            continue
        try:
            text += run.decode()
        except UnicodeDecodeError:
            text += "\ufffd" * len(run)
        run = b""
        text += "" if token in ("<unk>", "<s>", "</s>") else token.replace("▁", " ")
    return text


def user(text):
    return [{"role": "user", "content": text}]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_answers(path):
    lines = storage.read_bytes(str(path)).decode().splitlines()
    return [json.loads(line) for line in lines]


def test_a_prompt_is_a_users_message(folder, generate):
    text, _ = by_transformers(folder, user(QUICK), 12)
    code, out, said = generate(
        f"--model={folder / 'hf'}", f"--prompt={QUICK}", "--max_new_tokens=12"
    )
    assert (code, out) == (0, f"{text}\n"), said
    assert "Hugging Face safetensors" in said
    assert "chat template (own)" in said
    assert "cut off after 12 tokens; --max_new_tokens allows more" in said


def test_raw_continues_the_prompt_as_it_stands(folder, generate):
    text, _ = by_transformers(folder, QUICK, 12)
    code, out, said = generate(
        f"--model={folder / 'base'}", f"--prompt={QUICK}", "--raw", "--max_new_tokens=12"
    )
    assert (code, out) == (0, f"{text}\n"), said
    assert "as they stand (--raw)" in said


@pytest.mark.parametrize("text", [" quick brown", "fox", "\n\n dog ", "ü你", "\ufffd\ufffd dog"])
def test_the_text_of_an_answer_keeps_its_spaces_and_bytes(folder, text):
    tokenizer = load_tokenizer(folder / "hf")
    # Behind a letter, so that the tokenizer adds no space of its own; broken bytes by hand.
    ids = tokenizer("a" + text.replace("\ufffd", "\n"), add_special_tokens=False)["input_ids"]
    ids = ids[len(tokenizer("a", add_special_tokens=False)["input_ids"]) :]
    broken, newline = tokenizer.convert_tokens_to_ids(["<0xFF>", "<0x0A>"])
    if "\ufffd" in text:
        ids = [broken if id == newline else id for id in ids]
    assert text_of(tokenizer, Completion(ids, "stop")) == text


def test_an_answer_ends_at_the_last_position(folder, generate):
    length = len(load_tokenizer(folder / "hf")(LONG[:200])["input_ids"])
    code, _, said = generate(f"--model={folder / 'hf'}", f"--prompt={LONG[:200]}", "--raw")
    assert code == 0, said
    assert f"cut off after {256 - length} tokens; the model has no more positions" in said


def test_several_prompts_are_told_apart(folder, generate):
    model = f"--model={folder / 'hf'}"
    options = [f"--prompt={QUICK}", f"--prompt={LAZY}", "--max_new_tokens=12"]
    code, out, said = generate(model, *options)
    answers = [by_transformers(folder, user(text), 12)[0] for text in (QUICK, LAZY)]
    assert (code, out) == (0, f"> {QUICK}\n{answers[0]}\n> {LAZY}\n{answers[1]}\n"), said


def test_a_base_model_takes_a_chat_template_from_elsewhere(folder, generate, tmp_path):
    wanted = by_transformers(folder, user(QUICK), 4)[0]
    options = [f"--model={folder / 'base'}", f"--prompt={QUICK}", "--max_new_tokens=4"]
    assert generate(*options, "--chat_template=tulu")[:2] == (0, f"{wanted}\n")
    (tmp_path / "raw.jinja").write_text("{{ bos_token + messages[0]['content'] }}")
    wanted = by_transformers(folder, QUICK, 4)[0]
    assert generate(*options, f"--chat_template={tmp_path / 'raw.jinja'}")[:2] == (0, f"{wanted}\n")


@pytest.fixture(scope="module")
def answered(folder):
    """ROWS with the answers of transformers, at most 30 tokens each."""
    rows = []
    for row in ROWS:
        asked = row.get("messages") or user(row["prompt"])
        text, reason = by_transformers(folder, asked, 30)
        rows.append({**row, "completion": text, "finish_reason": reason})
    return rows


@pytest.mark.parametrize("model", ["hf", "run", "run/checkpoints/1"])
def test_a_file_comes_back_with_answers(folder, generate, tmp_path, answered, model):
    rows = write_rows(tmp_path / "in.jsonl", ROWS)
    target = tmp_path / "new" / "out.jsonl"
    command = [f"--model={folder / model}", f"--input={rows}", f"--output={target}"]
    code, out, said = generate(*command, "--max_new_tokens=30", "--batch_size=2")
    assert (code, out) == (0, ""), said
    assert read_answers(target) == answered
    assert os.listdir(target.parent) == ["out.jsonl"]
    assert f"wrote {target}: 5 rows" in said
    assert "tokens/s" in said


def test_every_token_that_the_model_calls_an_end_ends_an_answer(folder, generate, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    ids = tokenizer(QUICK)["input_ids"]
    mask = torch.ones(1, len(ids), dtype=torch.long)
    out = model.generate(
        torch.tensor([ids]), attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0
    )[0, len(ids) :].tolist()
    end = next(i for i in range(2, 40) if out[i] not in out[:i])
    shutil.copytree(folder / "hf", tmp_path / "hf")
    set_config(tmp_path / "hf", eos_token_id=[1, out[end]])
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": QUICK}])
    command = [f"--model={tmp_path / 'hf'}", f"--input={rows}", f"--output={tmp_path / 'out'}"]
    code, _, said = generate(*command, "--raw")
    assert code == 0, said
    assert "1 ended, 0 cut off" in said
    [row] = read_answers(tmp_path / "out")
    text = spelled(tokenizer.convert_ids_to_tokens(out[:end]))
    assert (row["completion"], row["finish_reason"]) == (text, "stop")


def test_files_of_a_bucket(folder, generate, tmp_path, answered):
    with running_bucket() as bucket:
        write_rows(tmp_path / "in.jsonl", ROWS)
        storage.write_bytes(f"{bucket}/in.jsonl", (tmp_path / "in.jsonl").read_bytes())
        command = [f"--input={bucket}/in.jsonl", f"--output={bucket}/out.jsonl"]
        code, _, said = generate(f"--model={folder / 'hf'}", *command, "--max_new_tokens=30")
        assert code == 0, said
        assert read_answers(f"{bucket}/out.jsonl") == answered
        code, _, said = generate(f"--model={folder / 'hf'}", *command)
        assert (code, "out.jsonl exists" in said) == (2, True)


def test_draws_depend_on_the_seed_and_not_on_the_batch(folder, generate, tmp_path):
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": QUICK}] * 6)
    answers = {}
    for name, options in {
        "a": ["--seed=1", "--batch_size=2"],
        "b": ["--seed=1", "--batch_size=5"],
        "c": ["--seed=2"],
    }.items():
        command = [f"--model={folder / 'hf'}", f"--input={rows}", f"--output={tmp_path / name}"]
        sampling = ["--temperature=1", "--top_p=0.9", "--max_new_tokens=8"]
        code, _, said = generate(*command, *sampling, *options)
        assert code == 0, said
        answers[name] = [row["completion"] for row in read_answers(tmp_path / name)]
    assert answers["a"] == answers["b"] != answers["c"]
    assert len(set(answers["a"])) > 1


@pytest.mark.parametrize("options", [["--mesh=2,2,2"], ["--dtype=bfloat16"]])
def test_another_mesh_or_dtype_answers_too(folder, generate, answered, options):
    code, out, said = generate(
        f"--model={folder / 'hf'}", f"--prompt={QUICK}", "--max_new_tokens=30", *options
    )
    assert code == 0, said
    # bfloat16 may take other tokens after a few.
    assert out[:4] == answered[0]["completion"][:4]
    if "--mesh=2,2,2" in options:
        assert out == answered[0]["completion"] + "\n"


def test_what_was_finished_stays_beside_the_output(folder, generate, tmp_path):
    target, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with pytest.raises(KeyboardInterrupt), new_file(str(target)) as file:
        file.write(b"{}\n")
        assert partial.read_bytes() == b"{}\n"
        raise KeyboardInterrupt
    assert not target.exists()
    rows = write_rows(tmp_path / "in.jsonl", ROWS)
    code, _, said = generate(f"--model={folder / 'hf'}", f"--input={rows}", f"--output={target}")
    assert code == 2
    assert f"{partial} exists, the answers of a run that did not finish" in " ".join(said.split())
    partial.unlink()
    with pytest.raises(KeyboardInterrupt), new_file(str(target)):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["in.jsonl"]


# Wrong calls: each gives the arguments and what the one message must say.


def rows_with(tmp_path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    return [f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]


ANSWERED = [*user("a"), {"role": "assistant", "content": "b"}]
BAD_ROWS = {
    "broken JSON": ('{"prompt": ', "line: ", "one JSON object a line"),
    "no object": ([1], "row: list", "an object with 'prompt', or 'messages'"),
    "no prompt": ({"question": "x"}, "row: fields 'question'", "'prompt', or 'messages'"),
    "both": ({"prompt": "x", "messages": user("x")}, "row: fields 'prompt', 'messages'"),
    "no text": ({"prompt": 3}, "prompt: 3; wanted text"),
    "empty": ({"prompt": "  "}, "prompt: only white space; wanted text"),
    "answered": ({"messages": ANSWERED}, "messages[1].role: 'assistant'", "last to be 'user'"),
    "role": ({"messages": [{"role": "me", "content": "x"}]}, "messages[0].role: 'me'; wanted"),
    "turns": ({"messages": user("a") + user("b")}, "messages[1]: user after user"),
    "no list": ({"messages": "hello"}, "messages: 'hello'; wanted a list"),
    "no messages": ({"messages": []}, "messages: an empty list"),
    "completion": ({"prompt": "x", "completion": "y"}, "completion: in the row already"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused_by_line_and_field(folder, generate, tmp_path, name):
    row, *wanted = BAD_ROWS[name]
    command = rows_with(tmp_path, {"prompt": "fine"}, row)
    assert_refused(generate, tmp_path, [f"--model={folder / 'hf'}", *command], [
        "1 of 2 rows", f"{tmp_path / 'in.jsonl'}:2: ", *wanted
    ])  # fmt: skip


def assert_refused(generate, tmp_path, command, wanted):
    code, out, said = generate(*command)
    assert (code, out) == (2, ""), said
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    said = " ".join(said.split())
    for text in wanted:
        assert text in said
    assert not list(tmp_path.glob("out*"))


def test_many_bad_rows_are_listed_up_to_ten(folder, generate, tmp_path):
    command = rows_with(tmp_path, *[{"prompt": ""}] * 12, {"prompt": "fine"})
    assert_refused(
        generate,
        tmp_path,
        [f"--model={folder / 'hf'}", *command],
        ["12 of 13 rows", "in.jsonl:10: ", "... and 2 more", "12 text is empty"],
    )


LONG = "fox " * 300
WRONG = {
    "no model": (["--prompt=x"], ["--model", "required", "--help"]),
    "empty model": (["--model=", "--prompt=x"], ["--model: found an empty path"]),
    "model is not there": (["--model=/no/such", "--prompt=x"], ["/no/such: no such file"]),
    "nothing to answer": (["--model=HF"], ["--prompt and --input: found neither"]),
    "prompt and input": (["--model=HF", "--prompt=x", "--input=y"], ["found both"]),
    "no output": (["--model=HF", "--input=y"], ["--input: found without --output"]),
    "no input": (["--model=HF", "--prompt=x", "--output=y"], ["--output: found without --input"]),
    "empty prompt": (["--model=HF", "--prompt= "], ["--prompt: found only white space"]),
    "no such input": (["--model=HF", "--input=/no/in", "--output=OUT"], ["/no/in: no such"]),
    "output is there": (["--model=HF", "--input=x", "--output=HF"], ["hf exists; wanted a new"]),
    "raw with template": (["--model=HF", "--prompt=x", "--raw", "--chat_template=tulu"], ["--raw"]),
    "raw with messages": (
        ["--model=HF", "--raw", "--input=CHAT", "--output=OUT"],
        ["chat.jsonl:1: row: fields 'messages'; wanted 'prompt'"],
    ),
    "no chat template": (
        ["--model=BASE", "--prompt=x"],
        ["base: the tokenizer has no chat template", "--chat_template=tulu", "--raw"],
    ),
    "no such template": (
        ["--model=HF", "--prompt=x", "--chat_template=alpaca"],
        ["chat_template: found 'alpaca'; wanted 'tulu', 'own' or a jinja file"],
    ),
    "no tokenizer": (["--model=BARE", "--prompt=x"], ["bare: found no tokenizer", "--tokenizer"]),
    "larger tokenizer": (
        ["--model=HF", "--prompt=x<e99>", "--tokenizer=LARGER", "--raw"],
        ["the tokenizer gives id 419", "the model has 324", "--tokenizer"],
    ),
    "prompt too long": (
        ["--model=HF", f"--prompt={LONG}"],
        ["--prompt: found", "tokens; wanted 1 to 255, for the model has 256 positions"],
    ),
    "row too long": (
        ["--model=HF", "--input=TOO_LONG", "--output=OUT"],
        ["2 of 3 prompts cannot be answered", "long.jsonl:1: found", "long.jsonl:3: found"],
    ),
    "template refuses": (
        ["--model=HF", "--prompt=x", "--chat_template=REFUSING"],
        ["--prompt: the chat template refuses this conversation: not today"],
    ),
    "max_new_tokens": (
        ["--model=HF", "--prompt=x", "--max_new_tokens=0"],
        ["--max_new_tokens", "found '0'; wanted an integer from 1"],
    ),
    "temperature": (
        ["--model=HF", "--prompt=x", "--temperature=-1"],
        ["--temperature", "found '-1'; wanted a number from 0"],
    ),
    "temperature nan": (["--model=HF", "--prompt=x", "--temperature=nan"], ["found 'nan'"]),
    "top_p": (["--model=HF", "--prompt=x", "--top_p=1.5"], ["--top_p", "from 0 to 1"]),
    "top_p zero": (["--model=HF", "--prompt=x", "--top_p=0"], ["--top_p: found 0"]),
    "seed": (["--model=HF", "--prompt=x", "--seed=-3"], ["--seed", "found '-3'"]),
    "dtype": (["--model=HF", "--prompt=x", "--dtype=int8"], ["--dtype", "'int8'", "bfloat16"]),
    "mesh": (["--model=HF", "--prompt=x", "--mesh=2,2"], ["mesh: found '2,2'"]),
    "unknown option": (["--model=HF", "--prompt=x", "--top_k=3"], ["--top_k=3", "--help"]),
}


@pytest.fixture(scope="module")
def places(folder, tmp_path_factory):
    """What the words in capitals stand for."""
    made = tmp_path_factory.mktemp("places")
    shutil.copytree(folder / "tokenizer", made / "larger")
    tokenizer = transformers.AutoTokenizer.from_pretrained(made / "larger")
    tokenizer.add_tokens([transformers.AddedToken(f"<e{i}>", normalized=False) for i in range(100)])
    tokenizer.save_pretrained(made / "larger")
    (made / "refusing.jinja").write_text("{{ raise_exception('not today') }}")
    return {
        "TOO_LONG": write_rows(made / "long.jsonl", [{"prompt": p} for p in (LONG, "x", LONG)]),
        "CHAT": write_rows(made / "chat.jsonl", [{"messages": user("x")}]),
        "LARGER": made / "larger",
        "REFUSING": made / "refusing.jinja",
        "BASE": folder / "base",
        "BARE": folder / "bare",
        "HF": folder / "hf",
    }


def filled_in(arguments, places, tmp_path):
    for name, place in {**places, "OUT": tmp_path / "out.jsonl"}.items():
        arguments = [
            f"{option}={place}" if value == name else f"{option}{equals}{value}"
            for option, equals, value in (argument.partition("=") for argument in arguments)
        ]
    return arguments


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_one_message(places, generate, tmp_path, name):
    arguments, wanted = WRONG[name]
    assert_refused(generate, tmp_path, filled_in(arguments, places, tmp_path), wanted)


def test_a_mesh_that_does_not_fit_is_refused(places, generate, tmp_path):
    command = [f"--model={places['HF']}", "--prompt=x", "--mesh=3,1,1"]
    assert_refused(generate, tmp_path, command, ["mesh: found '3,1,1' on 8 devices"])


@pytest.mark.parametrize("name", ["row too long", "no chat template", "template refuses", "mesh"])
def test_what_is_wrong_with_prompts_is_said_without_jax(places, tmp_path, name):
    arguments, wanted = WRONG[name]
    code = (
        "import runpy, sys; sys.modules['jax'] = None; "
        "runpy.run_module('easylm.generate', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", code, *filled_in(arguments, places, tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert wanted[0] in " ".join(result.stderr.split())
