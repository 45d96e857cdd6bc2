"""Rows become flat arrays; nothing is cut or left out uncounted."""

import numpy as np
import pytest

from easylm.chat import encode_messages
from easylm.data.encode import Examples, Policy, encode_rows
from easylm.data.rows import Row
from easylm.errors import InputError
from easylm.tokenizer import load_tokenizer, train_tokenizer

TEXTS = ["one two three four five six seven", "eight nine ten eleven twelve", "yes no 12 👍"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(TEXTS, 330, folder)
    return load_tokenizer(folder)


def row(user, assistant, where="f:1"):
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return Row(turns, where)


def random_rows(count):
    rng = np.random.default_rng(0)
    words = " ".join(TEXTS).split()

    def text(most):
        return " ".join(rng.choice(words, rng.integers(1, most)))

    return [row(text(40), text(15), f"f:{i}") for i in range(count)]


def encode(tokenizer, rows, seq_len, too_long="truncate"):
    examples, lengths, columns, *others = encode_rows(
        tokenizer, rows, Policy(seq_len, too_long), vocab_size=330
    )
    assert lengths.tolist() == examples.lengths.tolist() and columns == {}
    return examples, *others


def test_examples_are_the_encoded_rows(tokenizer):
    rows = random_rows(100)
    examples, lengths, truncated, dropped, *lost = encode(tokenizer, rows, 1000)
    assert len(examples) == 100
    for index in range(100):
        tokens, mask = examples.example(index)
        expected, expected_mask = encode_messages(tokenizer, rows[index].messages)
        assert tokens.tolist() == expected.tolist() and mask.tolist() == expected_mask.tolist()
    assert (examples.tokens.dtype, examples.loss_mask.dtype) == (np.int32, np.uint8)
    assert lengths.tolist() == examples.lengths.tolist()
    assert (truncated, dropped, lost) == (0, {}, [0, 0])


def test_too_long_examples(tokenizer):
    rows = random_rows(100)
    full = encode(tokenizer, rows, 1000)[0]
    limit = int(np.median(full.lengths))
    cut = [(t[:limit], m[:limit]) for t, m in map(full.example, range(100))]
    long = full.lengths > limit
    empty = np.array([not m.any() for _, m in cut])
    assert long.any() and (long & empty).any() and (long & ~empty).any()

    examples, lengths, truncated, dropped, *lost = encode(tokenizer, rows, limit)
    kept = [pair for pair, gone in zip(cut, empty, strict=True) if not gone]
    assert examples.tokens.tolist() == Examples.concatenate(kept).tokens.tolist()
    assert examples.loss_mask.tolist() == Examples.concatenate(kept).loss_mask.tolist()
    assert len(examples) == 100 - empty.sum()
    assert lengths.tolist() == full.lengths.tolist()
    assert truncated == (long & ~empty).sum()
    assert lost == [(full.lengths - limit)[long & ~empty].sum(), 0]
    assert dropped == {"no target left after truncation": empty.sum()}

    examples, lengths, truncated, dropped, *lost = encode(tokenizer, rows, limit, too_long="drop")
    assert examples.lengths.tolist() == full.lengths[~long].tolist()
    assert lengths.tolist() == full.lengths.tolist()
    assert (truncated, dropped) == (0, {"too long": long.sum()})

    first = int(np.flatnonzero(long)[0])
    with pytest.raises(InputError) as error:
        encode(tokenizer, rows, limit, too_long="error")
    message = f"f:{first}: {full.lengths[first]} tokens; wanted at most data.seq_len={limit}"
    assert str(error.value).startswith(message)

    with pytest.raises(InputError, match="found 'split'; wanted 'truncate', 'drop' or 'error'"):
        encode(tokenizer, rows, limit, too_long="split")


def test_id_outside_the_model_names_both_sizes(tokenizer):
    size = len(tokenizer)
    rows = [row("one", "yes", "f:1"), row("one", tokenizer.convert_ids_to_tokens(size - 1), "f:2")]
    encode_rows(tokenizer, rows, Policy(99), vocab_size=size)
    with pytest.raises(InputError) as error:
        encode_rows(tokenizer, rows, Policy(99), vocab_size=size - 1)
    text = str(error.value)
    assert text.startswith("f:2: token ") and f"the tokenizer has {size} ids" in text
    assert f"the model vocab_size={size - 1}" in text


def test_refused_conversation_is_named(tokenizer):
    rows = [row("one", "yes", "f:1"), row("</s>\ufdd0", "yes", "f:2"), row("two", "no", "f:3")]
    with pytest.raises(InputError, match=r"^f:2: the content has a Unicode noncharacter"):
        encode(tokenizer, rows, 99)
