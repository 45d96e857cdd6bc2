"""Tokenizers keep their ids on every way in and out."""

import json
import shutil

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from easylm.chat import TULU
from easylm.errors import InputError
from easylm.tokenizer import (
    load_in_transformers_4,
    load_tokenizer,
    load_tokenizer_files,
    tokenizer_files,
    train_tokenizer,
)
from tests import bucket
from tests.slow_llama import train_model

TEXTS = [
    "The quick brown fox jumps over the lazy dog 1234567 times.",
    "def f(x):\n    return x ** 2  # a comment\n\n\nprint(f(12))",
    "naïve café Straße ☃ 😀 你好 e\u0301",
    "  two  spaces,\ttabs\tand trailing space ",
] * 3
ODD_TEXTS = [*TEXTS[:4], " ", "\n", "a\n\n b", "▁x▁", "\x00", "\r\n", "👨‍👩‍👧", "\ufeffbom", "ﬁ ½"]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return train_model(TEXTS, 420, tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "tokenizer"
    train_tokenizer(TEXTS, 420, folder)
    return folder


def test_sentencepiece_ids_are_the_librarys(model_file):
    library = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    for path in (model_file, model_file.parent):
        tokenizer = load_tokenizer(path)
        for text in ODD_TEXTS:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert ids == library.encode(text), text
            assert tokenizer.decode(ids) == library.decode(ids)
    assert len(tokenizer) == library.vocab_size()
    special = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert special == (0, 1, 2)
    assert tokenizer("fox").input_ids == [1, *library.encode("fox")]


def test_after_end_of_sequence_stands_a_space_and_the_newline(model_file):
    tokenizer = load_tokenizer(model_file)
    ids = tokenizer("fox</s>\n<|user|>", add_special_tokens=False).input_ids
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces[pieces.index("</s>") + 1 :][:2] == ["▁", "<0x0A>"]


def test_training_gives_llamas_layout_and_the_same_ids_again(trained, tmp_path):
    tokenizer = load_tokenizer(trained)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 13, 258]) == [
        "<unk>", "<s>", "</s>", "<0x00>", "<0x0A>", "<0xFF>",
    ]  # fmt: skip
    assert len(tokenizer) == 420
    digits = tokenizer.tokenize("1234567")
    assert digits == ["▁", *"1234567"]
    assert "▁the" in tokenizer.get_vocab()  # learned from the texts, not only bytes
    assert not [piece for piece in tokenizer.get_vocab() if "\n" in piece]
    for text in (text for text in ODD_TEXTS if "▁" not in text):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    train_tokenizer(TEXTS, 420, tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (
        trained / "tokenizer.json"
    ).read_bytes()


def test_vocabulary_too_small_for_the_texts_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"vocab_size: found 300; wanted at least 3\d\d: so many"):
        train_tokenizer(TEXTS, 300, tmp_path / "small")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="exists already"):
        train_tokenizer(TEXTS, 420, tmp_path)


def test_small_texts_give_a_smaller_vocabulary(tmp_path):
    train_tokenizer(["ab ab ab"], 5000, tmp_path / "small")
    assert 259 < len(load_tokenizer(tmp_path / "small")) < 300


def test_files_give_the_same_tokenizer(trained, tmp_path):
    tokenizer = load_tokenizer(trained)
    tokenizer("x", truncation=True, max_length=3)  # state of the backend that must not be kept
    files = tokenizer_files(tokenizer)
    config = json.loads(files["tokenizer_config.json"])
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["chat_template"] == TULU
    assert json.loads(files["tokenizer.json"])["truncation"] is None
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    # An export has config.json beside it; its model type must not change the tokenizer.
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer_files(files)):
        assert again.chat_template == TULU
        assert again.special_tokens_map == tokenizer.special_tokens_map
        for text in [*ODD_TEXTS, "a</s>b <s>"]:
            assert again(text).input_ids == tokenizer(text).input_ids
        assert tokenizer_files(again) == files


def test_folder_keeps_the_ids_of_its_tokenizer_json(trained, tmp_path):
    """transformers 5 rebuilds LlamaTokenizer in its own way; here the file decides."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    config = json.loads((trained / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "LlamaTokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    for text in [*ODD_TEXTS, "a</s>\nb"]:
        assert tokenizer(text).input_ids == raw.encode(text).ids


def test_files_without_tokenizer_json(tmp_path):
    vocab = {c: i for i, c in enumerate(["<|endoftext|>", "a", "b", "Ġ", "ab", "Ġab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("ab ab").input_ids == [4, 5]
    again = load_tokenizer_files(tokenizer_files(tokenizer))
    assert again("ab ab").input_ids == [4, 5]


def test_what_transformers_4_would_not_read_is_told_apart(trained):
    files = tokenizer_files(load_tokenizer(trained))
    config = json.loads(files["tokenizer_config.json"])

    def told(others=(), **changes):
        content = json.dumps({**config, **changes}).encode()
        return load_in_transformers_4({**files, "tokenizer_config.json": content, **dict(others)})

    assert told() and told(tokenizer_class="LlamaTokenizer") and told(tokenizer_class=None)
    assert load_in_transformers_4({"tokenizer.model": b"any"})
    assert not told(tokenizer_class="TokenizersBackend")
    assert not told(extra_special_tokens=["<a>"]) and told(extra_special_tokens={"a_token": "<a>"})
    assert told({"chat_template.jinja": TULU.encode()})
    assert not told({"chat_template.jinja": b"{{ 'other' }}"})
    assert not told({"tokenizer_config.json": b"["})


def test_chat_template_choice(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    config = json.loads((trained / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**config, "chat_template": "{{ 'own' }}"})
    )
    (tmp_path / "mine.jinja").write_text("{{ 'mine' }}")
    assert load_tokenizer(tmp_path).chat_template == TULU
    assert load_tokenizer(tmp_path, "own").chat_template == "{{ 'own' }}"
    assert load_tokenizer(tmp_path, tmp_path / "mine.jinja").chat_template == "{{ 'mine' }}"
    with pytest.raises(InputError, match="found 'chatml'; wanted 'tulu', 'own' or a jinja file"):
        load_tokenizer(tmp_path, "chatml")


def test_a_broken_chat_template_is_blamed_where_it_lies(trained, tmp_path):
    binary, broken = tmp_path / "binary.jinja", tmp_path / "broken.jinja"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=rf"^{binary}: not UTF-8 text; wanted a jinja template"):
        load_tokenizer(trained, binary)
    broken.write_text("{{ bos_token }}\n{% for message in messages %}\n{{ message['content' }}\n")
    with pytest.raises(InputError, match=rf"^{broken}, line 3: not a jinja template: "):
        load_tokenizer(trained, broken)
    # Tags of transformers' own are no errors.
    broken.write_text("{% generation %}{{ messages[0]['content'] }}{% endgeneration %}")
    assert load_tokenizer(trained, broken).chat_template == broken.read_text()

    own = tmp_path / "own"
    shutil.copytree(trained, own)
    config = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(
        json.dumps({**config, "chat_template": "\n{% if %}"})
    )
    assert load_tokenizer(own).chat_template == TULU
    with pytest.raises(InputError, match=rf"^own template of {own}, line 2: not a jinja template"):
        load_tokenizer(own, "own")
    (own / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": 7}))
    with pytest.raises(InputError, match=rf"^{own}: chat_template: found 7; wanted a jinja"):
        load_tokenizer(own, "own")
    several = [{"name": name, "template": f"{{{{ '{name}' }}}}"} for name in ("rag", "tool_use")]
    (own / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": several}))
    with pytest.raises(InputError, match=rf"^{own}: .*no default.*\['rag', 'tool_use'\]"):
        load_tokenizer(own, "own")


def unigram(folder):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )


def changed(folder, name, content):
    train_tokenizer(TEXTS, 420, folder / "made")
    shutil.copytree(folder / "made", folder, dirs_exist_ok=True)
    (folder / name).write_bytes(content.encode(errors="surrogateescape"))


def no_eos(folder):
    train_tokenizer(TEXTS, 420, folder / "made")
    shutil.copytree(folder / "made", folder, dirs_exist_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").unlink()


BAD_FOLDERS = {
    "empty folder": (lambda folder: None, "no tokenizer in this folder"),
    "unigram": (unigram, "model_type: wanted BPE; byte_fallback: wanted true; normalization"),
    "tiktoken": (
        lambda folder: (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n"),
        "give the Hugging Face folder with tokenizer.json instead",
    ),
    "broken json": (
        lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0"'),
        "/tokenizer.json: not valid JSON: Expecting ',' delimiter",
    ),
    "deep json": (
        lambda folder: (folder / "tokenizer.json").write_text("[" * 100_000),
        "/tokenizer.json: not valid JSON: maximum recursion depth",
    ),
    "an integer too long": (
        lambda folder: changed(folder, "tokenizer_config.json", '{"a": ' + "9" * 5000 + "}"),
        "/tokenizer_config.json: not valid JSON: Exceeds the limit",
    ),
    "a list": (
        lambda folder: changed(folder, "special_tokens_map.json", "[]"),
        "/special_tokens_map.json: found a list; wanted a JSON object",
    ),
    "a binary template": (
        lambda folder: changed(folder, "chat_template.jinja", "\udcff"),
        "/chat_template.jinja: not UTF-8 text",
    ),
    "no model": (
        lambda folder: changed(folder, "tokenizer.json", '{"added_tokens": [], "model": {}}'),
        "the tokenizer files cannot be read: ",
    ),
    "an odd token": (
        lambda folder: changed(folder, "tokenizer_config.json", '{"added_tokens_decoder": [3]}'),
        "the tokenizer files cannot be read: ",
    ),
    "not a tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "the tokenizer files cannot be read",
    ),
    "no eos": (no_eos, "names no eos_token"),
}


@pytest.mark.parametrize("make, message", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folder_is_named(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("path", ["/no/such/folder", "./tokenizer", "a/b/c", "no_such.model/x y"])
def test_missing_path_is_not_taken_for_a_hub_name(path):
    with pytest.raises(InputError, match="no such folder or file"):
        load_tokenizer(path)


def test_hub_name_that_is_not_there():
    with pytest.raises(InputError, match=r"no-such-org/no-such-model: .* hub gave no tokenizer"):
        load_tokenizer("no-such-org/no-such-model")


def test_everything_in_a_bucket(trained):
    with bucket.running_bucket() as url:
        train_tokenizer(TEXTS, 420, f"{url}/run/tokenizer")
        tokenizer = load_tokenizer(f"{url}/run/tokenizer")
        assert tokenizer_files(tokenizer) == tokenizer_files(load_tokenizer(trained))
        with pytest.raises(InputError, match=f"{url}/none: no such folder or file"):
            load_tokenizer(f"{url}/none")
