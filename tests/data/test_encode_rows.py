"""Rows become flat arrays; nothing is cut or left out uncounted."""

import numpy as np
import pytest

from easylm.chat import encode_messages
from easylm.data.encode import Examples, encode_rows
from easylm.data.sources import Row
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


def encode(tokenizer, rows, seq_len, **options):
    return encode_rows(tokenizer, rows, seq_len=seq_len, vocab_size=330, progress=False, **options)


def test_examples_are_the_encoded_rows(tokenizer):
    rows = random_rows(600)  # more than one call of the tokenizer
    examples, report = encode(tokenizer, rows, 1000)
    assert len(examples) == 600
    for index in range(600):
        tokens, mask = examples.example(index)
        expected, expected_mask = encode_messages(tokenizer, rows[index].messages)
        assert tokens.tolist() == expected.tolist() and mask.tolist() == expected_mask.tolist()
    assert (examples.tokens.dtype, examples.loss_mask.dtype) == (np.int32, np.uint8)
    assert (report.rows, report.kept, report.truncated, report.dropped) == (600, 600, 0, {})
    assert report.tokens == len(examples.tokens)
    assert report.target_tokens == examples.loss_mask.sum()
    lengths = examples.lengths
    assert report.length_mean == pytest.approx(lengths.mean())
    assert (report.length_min, report.length_max) == (lengths.min(), lengths.max())
    assert abs(report.length_median - np.median(lengths)) < 1
    assert "600 rows: 600 examples, 0 of them truncated;" in str(report)


def test_too_long_examples(tokenizer):
    rows = random_rows(100)
    full, _ = encode(tokenizer, rows, 1000)
    limit = int(np.median(full.lengths))
    cut = [(t[:limit], m[:limit]) for t, m in map(full.example, range(100))]
    long = full.lengths > limit
    empty = np.array([not m.any() for _, m in cut])
    assert long.any() and (long & empty).any() and (long & ~empty).any()

    examples, report = encode(tokenizer, rows, limit)
    kept = [pair for pair, gone in zip(cut, empty, strict=True) if not gone]
    assert examples.tokens.tolist() == Examples.concatenate(kept).tokens.tolist()
    assert examples.loss_mask.tolist() == Examples.concatenate(kept).loss_mask.tolist()
    assert report.truncated == (long & ~empty).sum()
    assert report.dropped == {"no target left after truncation": empty.sum()}
    assert report.kept == 100 - empty.sum()
    assert f"{empty.sum()} dropped (no target left after truncation)" in str(report)

    examples, report = encode(tokenizer, rows, limit, too_long="drop")
    assert examples.lengths.tolist() == full.lengths[~long].tolist()
    assert (report.truncated, report.dropped) == (0, {"too long": long.sum()})

    first = int(np.flatnonzero(long)[0])
    with pytest.raises(InputError) as error:
        encode(tokenizer, rows, limit, too_long="error")
    message = f"f:{first}: {full.lengths[first]} tokens; wanted at most data.seq_len={limit}"
    assert str(error.value).startswith(message)

    with pytest.raises(InputError, match="found 'split'; wanted 'truncate', 'drop' or 'error'"):
        encode(tokenizer, rows, limit, too_long="split")


def test_nothing_left_is_an_error(tokenizer):
    with pytest.raises(InputError) as error:
        encode(tokenizer, random_rows(3), 4)
    assert "no example is left of 3 rows at data.seq_len=4" in str(error.value)
    assert "3 no target left after truncation" in str(error.value)


def test_id_outside_the_model_names_both_sizes(tokenizer):
    size = len(tokenizer)
    rows = [row("one", "yes", "f:1"), row("one", tokenizer.convert_ids_to_tokens(size - 1), "f:2")]
    encode_rows(tokenizer, rows, seq_len=99, vocab_size=size, progress=False)
    with pytest.raises(InputError) as error:
        encode_rows(tokenizer, rows, seq_len=99, vocab_size=size - 1, progress=False)
    text = str(error.value)
    assert text.startswith("f:2: token ") and f"the tokenizer has {size} ids" in text
    assert f"the model vocab_size={size - 1}" in text


def test_refused_conversation_is_named(tokenizer):
    rows = [row("one", "yes", "f:1"), row("</s>\ufdd0", "yes", "f:2"), row("two", "no", "f:3")]
    with pytest.raises(InputError, match=r"^f:2: the content has a Unicode noncharacter"):
        encode(tokenizer, rows, 99)
