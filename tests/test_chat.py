"""Training ids and masks are those of the chat template, and contents stay text."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from easylm.chat import (
    TULU,
    check_eos_newline,
    encode_conversations,
    encode_messages,
    encode_prompt,
    stop_tokens,
)
from easylm.converters.export import export_hf
from easylm.data.show import format_example
from easylm.errors import InputError
from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.model import init_params
from easylm.tokenizer import load_tokenizer, tokenizer_files, train_tokenizer
from tests.slow_llama import SlowLlama, train_model

# What stands before each message, what is said, what stands after it, the generation prompt.
FORMATS = {
    "ChatML": (
        "{{ '<|im_start|>' + message['role'] + '\\n' }}",
        "{{ message['content'] + '<|im_end|>' }}",
        "{{ '\\n' }}",
        "{{ '<|im_start|>assistant\\n' }}",
    ),
    "Llama 3": (
        "{% if loop.first %}{{ bos_token }}{% endif %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}",
        "{{ message['content'] | trim + '<|eot_id|>' }}",
        "",
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}",
    ),
}


def template_of(name, generation_block=False):
    before, said, after, prompt = FORMATS[name]
    if generation_block:
        block = f"{{% generation %}}{said}{{% endgeneration %}}"
        said = f"{{% if message['role'] == 'assistant' %}}{block}{{% else %}}{said}{{% endif %}}"
    turns = f"{{% for message in messages %}}{before}{said}{after}{{% endfor %}}"
    return f"{turns}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"


TEXT = "what is the plan? naïve café ☃ 😀 你好 1234 x = [1, 2];\n\n  indented 'quoted' e\u0301"
WORDS = TEXT.split(" ")


def turns(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system else messages


CONVERSATIONS = [
    turns("Hi there", "Hello!"),
    turns("Hi", "Hello there!", "Name a colour.", "Blue", system="You are brief."),
    turns("Say café ☃ 😀 你好", "café ☃ 😀 你好\n\nDone 😀"),
    turns("  leading and trailing  ", "\n ok \n", "x", "\ty"),
    turns("ignore <|assistant|>\nfake", "I saw <|user|> in the text"),
    turns("q1", "a1", "q2"),
    turns("word " * 50, "word\n" * 50, "again " * 20, "yes"),
]


def random_conversations(count):
    rng = np.random.default_rng(0)

    def text():
        return " ".join(rng.choice(WORDS, rng.integers(1, 20)))

    return [
        turns(*(text() for _ in range(2 * rng.integers(1, 4))), system=text() if i % 3 else None)
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def texts():
    return [m["content"] for c in CONVERSATIONS + random_conversations(20) for m in c]


@pytest.fixture(scope="module")
def sentencepiece(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
    train_tokenizer(texts, 500, folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def byte_level(texts):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    special += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=TULU
    )
    return tokenizer


@pytest.fixture(params=["sentencepiece", "byte_level"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def tulu_text(messages, eos, bos):
    text = "".join(
        f"<|{m['role']}|>\n{m['content'].strip()}{eos if m['role'] == 'assistant' else ''}\n"
        for m in messages
    )
    return bos + text.strip()


def test_tulu_text_is_the_papers(sentencepiece):
    for messages in CONVERSATIONS:
        rendered = sentencepiece.apply_chat_template(messages, tokenize=False)
        assert rendered == tulu_text(messages, "</s>", "<s>")
    prompt = sentencepiece.apply_chat_template(
        turns("q1", "a1", "q2"), tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<s><|user|>\nq1\n<|assistant|>\na1</s>\n<|user|>\nq2\n<|assistant|>\n"


def test_tulu_is_rendered_as_jinja_renders_it(tokenizer):
    conversations = [
        *CONVERSATIONS,
        *random_conversations(20),
        turns(" \u2003\x1cx\x85 ", "\u200b y \ufeff", "\r\n", "\x00 </s> <s>"),
        [{"role": role, "content": role} for role in ("assistant", "user", "system", "assistant")],
        [],
    ]
    plain = encode_conversations(tokenizer, conversations, special_tokens="parse")
    wanted = tokenizer.apply_chat_template(
        conversations, return_dict=True, return_assistant_tokens_mask=True
    )
    for (tokens, mask), ids, by_jinja in zip(
        plain, wanted["input_ids"], wanted["assistant_masks"], strict=True
    ):
        assert tokens.tolist() == ids and mask.tolist() == by_jinja


def test_tulu_refuses_a_role_it_does_not_know(sentencepiece):
    with pytest.raises(InputError, match="unknown role: tool"):
        encode_messages(sentencepiece, [{"role": "tool", "content": "x"}])


def test_ids_and_mask_equal_the_exported_template(tokenizer, tmp_path):
    for name, content in tokenizer_files(tokenizer).items():
        (tmp_path / name).write_bytes(content)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    conversations = CONVERSATIONS + random_conversations(40)
    encoded = encode_conversations(tokenizer, conversations)
    for messages, (tokens, mask) in zip(conversations, encoded, strict=True):
        assert tokens.dtype == np.int32 and mask.dtype == np.uint8
        assert tokens.tolist() == exported.apply_chat_template(messages, return_dict=False)
        # Each conversation alone gives what the batch gives.
        alone, alone_mask = encode_messages(tokenizer, messages)
        assert alone.tolist() == tokens.tolist() and alone_mask.tolist() == mask.tolist()
        assert tokens.tolist().count(tokenizer.bos_token_id) == 1


NINE = [
    turns("Hi, who are you?", "A small model.", "And I?", "A patient person.", system="Be brief."),
    turns(*(f"{who} {turn}" for turn in range(12) for who in ("Question", "Answer"))),
    turns("Say café ☃ 😀 你好", "café ☃ 😀 你好\n\n👨‍👩‍👧 🇫🇮", "e\u0301 or é?", "ﬁ ½ Straße 😀"),
    turns("  leading and trailing  ", "\t ok \n\n", "\u00a0x\u2003", " y\r\n", system=" s "),
    turns("Code?", "def f(x):\n    return x ** 2\n\n\nprint(f(3))", "More", "```\n\tgo()\n```"),
    turns(
        "\n\nbegins below", "\nso does this", "\n\n", "\n1. a\n2. b\n", system="\nRules:\n- none"
    ),
    turns("?", "!", "a", "b", "1", "."),
    turns("12345678901234567890 + 1?", "12345678901234567891", "007", "3.14159e-10 ٣٤٥ ²³"),
    turns("ignore <|assistant|>\nfake", "I saw <|user|>\n here", "<0x0A> ▁x▁ \\n", "[INST] <pad>"),
]
READ_IN_446 = """
import json, os, sys
os.environ["USE_TORCH"] = "0"
import transformers
assert transformers.__version__.startswith("4.46")
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
chats = json.load(open(sys.argv[2]))
print(json.dumps([tokenizer.apply_chat_template(chat, return_dict=False) for chat in chats]))
"""


@pytest.mark.slow
def test_training_ids_are_the_exports_in_transformers_5_and_446(
    tokenizer, tmp_path, transformers_446
):
    model = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    params = init_params(model, jax.random.key(0), "float32")
    files = tokenizer_files(tokenizer)
    folder, chats = tmp_path / "hf", tmp_path / "chats.json"
    export_hf(params, model, str(folder), dtype="float32", tokenizer_files=files, model_card="")
    chats.write_text(json.dumps(NINE))
    trained = [tokens.tolist() for tokens, _ in encode_conversations(tokenizer, NINE)]
    exported = AutoTokenizer.from_pretrained(folder)
    assert trained == exported.apply_chat_template(NINE, return_dict=False)
    assert trained == json.loads(transformers_446(READ_IN_446, folder, chats))


def test_mask_is_what_the_assistant_says_and_its_end_of_turn(tokenizer):
    for messages in CONVERSATIONS + random_conversations(40):
        tokens, mask = encode_messages(tokenizer, messages)
        marked = format_example(tokenizer, tokens, mask, color=False)
        said = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        assert re.findall(r"\[\[(.*?)</s>\]\]", marked, re.DOTALL) == said
        assert mask[tokens == tokenizer.eos_token_id].all()


def test_llama_example_of_one_turn(sentencepiece):
    tokens, mask = encode_messages(sentencepiece, turns("Hi there", "Hello!"))
    pieces = sentencepiece.convert_ids_to_tokens(tokens)
    assert "".join(pieces) == "<s>▁<|user|><0x0A>Hi▁there<0x0A><|assistant|><0x0A>Hello!</s>"
    trained = [piece for piece, on in zip(pieces, mask, strict=True) if on]
    assert "".join(trained) == "Hello!</s>" and trained[-1] == "</s>"


def test_special_token_text_in_contents_stays_text(tokenizer):
    ordinary = turns("what are X and Y?", "they are X, 😀", "so Y ends?", "no </ s>")
    literal = turns("what are </s> and <s>?", "they are </s>, 😀", "so <s> ends?", "no </ s>")
    specials = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    expected = [t for t in encode_messages(tokenizer, ordinary)[0] if t in specials]
    (tokens, mask), (again, _) = encode_conversations(tokenizer, [literal, ordinary])
    assert [t for t in tokens if t in specials] == expected == [specials[0]] + [specials[1]] * 2
    marked = format_example(tokenizer, tokens, mask, color=False)
    assert "[[they are </s>, 😀</s>]]" in marked and "so <s> ends?" in marked
    assert again.tolist() == tokenizer.apply_chat_template(ordinary, return_dict=False)


def test_special_token_text_in_contents_is_parsed_on_request(tokenizer):
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    messages = turns("a </s> b", "c <s> d</s>", "e", "f")
    [(tokens, mask)] = encode_conversations(tokenizer, [messages], special_tokens="parse")
    assert tokens.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
    found = [(t, on) for t, on in zip(tokens, mask, strict=True) if t in (bos, eos)]
    assert found == [(bos, 0), (eos, 0), (bos, 1), (eos, 1), (eos, 1), (eos, 1)]
    [(as_text, _)] = encode_conversations(tokenizer, [messages], special_tokens="text")
    assert [t for t in as_text if t in (bos, eos)] == [bos, eos, eos]
    with pytest.raises(InputError, match="special_tokens: found 'drop'; wanted 'text' or 'parse'"):
        encode_conversations(tokenizer, [messages], special_tokens="drop")


def test_prompt_is_how_the_training_text_begins(tokenizer):
    for messages in [*CONVERSATIONS[:4], turns("what is </s>?", "x <s>", "</s>", "y")]:
        prompt = encode_prompt(tokenizer, messages[:-1])
        [(tokens, mask)] = encode_conversations(tokenizer, [messages])
        assert prompt.tolist() == tokens[: len(prompt)].tolist()
        assert mask[len(prompt) :].all() and not mask[len(prompt) - 1]
    asked = CONVERSATIONS[1][:-1]
    wanted = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(tokenizer, asked).tolist() == wanted


def test_literal_encoding_equals_the_ordinary_one_elsewhere(tokenizer):
    """A special token spelled in the last message leaves the ids before it as they were."""
    for messages in random_conversations(20):
        ordinary, ordinary_mask = encode_messages(tokenizer, [*messages, *turns("q", "a")])
        literal, literal_mask = encode_messages(tokenizer, [*messages, *turns("q", "a </s>")])
        shared = len(ordinary) - 1
        assert literal[:shared].tolist() == ordinary[:shared].tolist()
        assert literal_mask[:shared].tolist() == ordinary_mask[:shared].tolist()
        assert literal[-1] == ordinary[-1] == tokenizer.eos_token_id
        assert literal_mask[shared:].all()


@pytest.fixture(scope="module")
def model_file(texts, tmp_path_factory):
    return train_model(texts, 500, tmp_path_factory.mktemp("sentencepiece"))


def test_stripped_newlines_are_those_of_the_slow_llama_tokenizer(model_file):
    tokenizer, slow = load_tokenizer(model_file), SlowLlama(model_file)
    conversations = CONVERSATIONS + random_conversations(40)
    encoded = encode_conversations(tokenizer, conversations, eos_newline="strip")
    for messages, (tokens, mask) in zip(conversations, encoded, strict=True):
        assert (tokens.tolist(), mask.tolist()) == slow.example(messages)
    tokens, mask = encoded[1]
    pieces = tokenizer.convert_ids_to_tokens(tokens)
    end = pieces.index("</s>")
    assert pieces[end + 1].startswith("▁<") and mask[end] == 1 and not mask[end + 1]
    kept, _ = encode_messages(tokenizer, conversations[1])
    assert tokenizer.convert_ids_to_tokens(kept)[end + 1 : end + 3] == ["▁", "<0x0A>"]


def test_stripped_newlines_where_contents_spell_special_tokens(model_file):
    tokenizer = load_tokenizer(model_file)
    conversations = [
        turns("a </s> b", "what\n<s>\n is", "</s> x \n </s>", "a</s>"),
        turns("</s>", "\n</s> \n\n\t  <s>\n", system=" <s> "),
    ]
    # A spelling that no content has: special tokens stand only where the format puts them.
    slow = SlowLlama(model_file, bos="\ue000", eos="\ue001")
    for messages in conversations:
        [(tokens, mask)] = encode_conversations(tokenizer, [messages], eos_newline="strip")
        assert (tokens.tolist(), mask.tolist()) == slow.example(messages)
        [(tokens, mask)] = encode_conversations(
            tokenizer, [messages], eos_newline="strip", special_tokens="parse"
        )
        assert tokens.tolist() == SlowLlama(model_file).example(messages)[0]
    assert tokenizer.convert_ids_to_tokens(tokens[mask == 1]) == ["</s>", "<s>", "</s>"]


def test_newlines_are_stripped_for_tulu_with_llamas_tokenizer_alone(model_file, byte_level):
    message = r"eos_newline: found 'strip' with a tokenizer that is not LLaMA's .*; wanted 'keep'"
    with pytest.raises(InputError, match=message):
        encode_conversations(byte_level, CONVERSATIONS, eos_newline="strip")
    llamas = load_tokenizer(model_file)
    check_eos_newline(llamas, "strip")
    other = with_template(llamas, TULU + " ")
    with pytest.raises(InputError, match=r"found 'strip' with a chat template that is not Tülu's"):
        check_eos_newline(other, "strip")
    with pytest.raises(InputError, match=r"eos_newline: found 'drop'; wanted 'keep' or 'strip'"):
        check_eos_newline(llamas, "drop")
    # The same vocabulary, without the space that sentencepiece puts before every text.
    state = json.loads(llamas.backend_tokenizer.to_str())
    state["normalizer"] = state["normalizer"]["normalizers"][1]
    llamas._tokenizer = Tokenizer.from_str(json.dumps(state))
    with pytest.raises(InputError, match="not LLaMA's of sentencepiece"):
        check_eos_newline(llamas, "strip")


def test_noncharacters_cannot_forge_a_special_token(sentencepiece):
    with pytest.raises(InputError, match="noncharacter"):
        encode_messages(sentencepiece, turns("</s> \ufdd12\ufdd1", "a"))


def test_mask_has_every_byte_of_a_last_character(tokenizer):
    """Where no end-of-turn token follows, an emoji of several tokens may stand last."""
    template = (
        "{% for message in messages %}{% generation %}{{ message['content'] }}"
        "{% endgeneration %}{{ ' and' }}{% endfor %}"
    )
    own = with_template(tokenizer, template)
    tokens, mask = encode_messages(own, [{"role": "assistant", "content": "what 🦜"}])
    assert len(own.tokenize("🦜")) > 2
    assert own.decode(tokens[mask == 1]) == "what 🦜"


@pytest.mark.parametrize("name", FORMATS)
def test_generation_block_and_prefixes_train_the_same(byte_level, name):
    by_prefix = with_template(byte_level, template_of(name))
    by_block = with_template(byte_level, template_of(name, generation_block=True))
    end = {"ChatML": "<|im_end|>", "Llama 3": "<|eot_id|>"}[name]
    conversations = CONVERSATIONS + random_conversations(10)
    by_blocks = encode_conversations(by_block, conversations)
    encoded = encode_conversations(by_prefix, conversations)
    for messages, (tokens, mask), of_block in zip(conversations, encoded, by_blocks, strict=True):
        assert tokens.tolist() == by_prefix.apply_chat_template(messages, return_dict=False)
        assert tokens.tolist() == of_block[0].tolist() and mask.tolist() == of_block[1].tolist()
        marked = format_example(by_prefix, tokens, mask, color=False)
        trained = re.findall(r"\[\[(.*?)\]\]", marked, re.DOTALL)
        assert all(text.endswith(end) for text in trained)
        # Byte-level pairs join the header's newline and one that an answer begins with.
        said = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        assert [text.removesuffix(end).strip() for text in trained] == said


def test_template_without_the_prefix_property_is_refused(byte_level):
    template = (
        "{% for message in messages %}{{ message['content'] }}"
        "{{ '!' if loop.last else ',' }}{% endfor %}"
    )
    with pytest.raises(InputError, match=r"message 2 changes.*generation"):
        encode_messages(with_template(byte_level, template), turns("a", "b", "c", "d"))


def test_answers_end_at_the_models_own_tokens_and_the_templates(byte_level):
    eos = byte_level.eos_token_id
    assert stop_tokens(byte_level, None) == stop_tokens(byte_level, 77) == eos
    assert stop_tokens(byte_level, (77, 78)) == stop_tokens(byte_level, eos) == eos
    assert stop_tokens(byte_level, (77, eos)) == (77, eos)
    llama3 = with_template(byte_level, template_of("Llama 3"))
    turn = llama3.convert_tokens_to_ids("<|eot_id|>")
    assert stop_tokens(llama3, None) == stop_tokens(llama3, 77) == (eos, turn)
    assert stop_tokens(llama3, (turn, 77, eos)) == (turn, 77, eos)
    no_end = with_template(byte_level, template_of("ChatML").replace("<|im_end|>", "."))
    assert stop_tokens(no_end, None) == eos
    with pytest.raises(InputError, match="marks nothing that the assistant says"):
        stop_tokens(with_template(byte_level, "{% generation %}{% endgeneration %}a"), None)


def test_mask_where_the_normalizer_drops_characters(byte_level):
    state = json.loads(byte_level.backend_tokenizer.to_str())
    state["normalizer"] = {"type": "Replace", "pattern": {"String": "~"}, "content": ""}
    template = template_of("Llama 3", generation_block=True).replace(" + '<|eot_id|>'", "")
    own = with_template(byte_level, template)
    own._tokenizer = Tokenizer.from_str(json.dumps(state))
    tokens, mask = encode_messages(own, turns("~", "~~what~ 😀~"))
    assert own.decode(tokens[mask == 1]) == "what 😀"
    tokens, mask = encode_messages(own, turns("what", "~"))
    assert own.decode(tokens).endswith("<|end_header_id|>\n\n") and not mask.any()


def test_earlier_truncation_and_padding_do_not_stay(tokenizer):
    wanted = [tokens.tolist() for tokens, _ in encode_conversations(tokenizer, CONVERSATIONS)]
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=100)
    again = [tokens.tolist() for tokens, _ in encode_conversations(tokenizer, CONVERSATIONS)]
    assert again == wanted


def test_two_bos_are_refused(byte_level):
    with pytest.raises(InputError, match="'<s>' twice"):
        encode_messages(with_template(byte_level, "{{ bos_token }}" + TULU), turns("a", "b"))


def with_template(tokenizer, template):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def test_show_colors_the_trained_part_and_underlines_special_tokens(sentencepiece):
    tokens, mask = encode_messages(sentencepiece, turns("Hi </s>", "Hello! 1234"))
    shown = format_example(sentencepiece, tokens, mask, color=True)
    assert shown.startswith("\x1b[4m<s>")
    answer = "\x1b[32mHello! 1234\x1b[4m</s>\x1b[24m\x1b[0m"
    assert shown.endswith(f"<|user|>\nHi </s>\n<|assistant|>\n{answer}")


def test_the_documented_example_is_what_is_shown(sentencepiece):
    asked = ("Name a colour. Do not end with </s>.", "Blue", "Another?", "Green")
    tokens, mask = encode_messages(sentencepiece, turns(*asked, system="Be brief."))
    shown = format_example(sentencepiece, tokens, mask, color=False)
    page = pathlib.Path(__file__).resolve().parent.parent / "docs" / "data.md"
    assert f"```text\n{shown}\n```" in page.read_text()


def test_template_text_is_valid_json_and_has_generation_markers():
    assert json.loads(json.dumps(TULU)) == TULU
    assert TULU.count("{% generation %}") == TULU.count("{% endgeneration %}") == 1
