"""Training ids and masks are those of the chat template, and contents stay text."""

import json
import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from easylm.chat import TULU, encode_conversations, encode_messages
from easylm.data.show import format_example
from easylm.errors import InputError
from easylm.tokenizer import load_tokenizer, tokenizer_files, train_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
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


def test_template_without_generation_block_by_its_prefixes(byte_level):
    chatml = with_template(byte_level, CHATML)
    messages = turns("Hi", "Hello there!", "Again", "Bye 😀", system="Be brief.")
    tokens, mask = encode_messages(chatml, messages)
    assert tokens.tolist() == chatml.apply_chat_template(messages, return_dict=False)
    marked = format_example(chatml, tokens, mask, color=False)
    assert re.findall(r"\[\[(.*?)\]\]", marked) == ["Hello there!<|im_end|>", "Bye 😀<|im_end|>"]


def test_template_without_the_prefix_property_is_refused(byte_level):
    template = (
        "{% for message in messages %}{{ message['content'] }}"
        "{{ '!' if loop.last else ',' }}{% endfor %}"
    )
    with pytest.raises(InputError, match=r"message 2 changes.*generation"):
        encode_messages(with_template(byte_level, template), turns("a", "b", "c", "d"))


def test_two_bos_are_refused(byte_level):
    with pytest.raises(InputError, match="'<s>' twice"):
        encode_messages(with_template(byte_level, "{{ bos_token }}" + TULU), turns("a", "b"))


def with_template(tokenizer, template):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def test_show_colors_the_trained_part(sentencepiece):
    tokens, mask = encode_messages(sentencepiece, turns("Hi there", "Hello! 1234"))
    shown = format_example(sentencepiece, tokens, mask, color=True)
    assert shown.endswith("<|user|>\nHi there\n<|assistant|>\n\x1b[32mHello! 1234</s>\x1b[0m")


def test_template_text_is_valid_json_and_has_generation_markers():
    assert json.loads(json.dumps(TULU)) == TULU
    assert TULU.count("{% generation %}") == TULU.count("{% endgeneration %}") == 1
