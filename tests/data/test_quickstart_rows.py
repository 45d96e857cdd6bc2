"""The quickstart's conversations are valid, distinct, and short enough to be learned."""

import pathlib

import pytest

import easylm.configs
from easylm.data.encode import Policy, encode_rows
from easylm.data.sources import read_rows
from easylm.tokenizer import load_tokenizer, train_tokenizer

FOLDER = pathlib.Path(easylm.configs.__file__).parent / "quickstart"


@pytest.fixture(scope="module")
def files():
    return {name: read_rows(str(FOLDER / f"{name}.jsonl")).rows for name in ("train", "eval")}


def test_enough_distinct_conversations(files):
    assert len(files["train"]) >= 300 and len(files["eval"]) >= 20
    for rows in files.values():
        prompts = [str(row.messages[:-1]) for row in rows]
        assert len(set(prompts)) == len(prompts)


def test_eval_prompts_are_not_trained(files):
    trained = {str(row.messages[:-1]) for row in files["train"]}
    assert not [row.where for row in files["eval"] if str(row.messages[:-1]) in trained]


def test_same_question_has_the_same_answer(files):
    answers = {}
    for row in files["train"]:
        first = tuple(m["content"] for m in row.messages[:2])
        if row.messages[0]["role"] == "user" and len(row.messages) == 2:
            assert answers.setdefault(first[0], first[1]) == first[1], row.where


def test_sums_are_right(files):
    signs = {"plus": "+", "minus": "-", "times": "*"}
    checked = 0
    for row in files["train"]:
        words = row.messages[0]["content"].rstrip("?").split()
        if len(row.messages) == 2 and len(words) == 5 and words[3] in signs:
            left, right = int(words[2]), int(words[4])
            expected = {"+": left + right, "-": left - right, "*": left * right}[signs[words[3]]]
            assert row.messages[1]["content"] == str(expected), row.where
            checked += 1
    assert checked >= 50


def test_short_rows_with_a_tokenizer_of_their_own(files, tmp_path):
    texts = [m["content"] for row in files["train"] for m in row.messages]
    train_tokenizer(texts, 1000, tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    encoded = encode_rows(tokenizer, files["train"], Policy(128), vocab_size=1000)
    examples = encoded.examples
    assert len(examples) == len(files["train"]) and encoded.truncated == 0
    assert examples.lengths.mean() < 45 and len(examples.tokens) < 15_000
