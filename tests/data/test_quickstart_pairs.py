"""The quickstart's preference pairs: valid, distinct, and about more than an answer's looks."""

import pathlib
import re

import pytest

import easylm.configs
from easylm.data.pair_rows import PAIRS
from easylm.data.sources import read_rows
from easylm.tokenizer import load_tokenizer, train_tokenizer

FOLDER = pathlib.Path(easylm.configs.__file__).parent / "quickstart"
OFFER = " What would you like to know next?"
SUM = re.compile(r"What is \d+ (plus|minus|times) \d+\?|(Double|Divide) \d+.*\.")


@pytest.fixture(scope="module")
def files():
    names = {"train": "pairs.jsonl", "held out": "eval_pairs.jsonl"}
    return {name: read_rows(str(FOLDER / file), form=PAIRS).rows for name, file in names.items()}


def everything(files):
    return [pair for pairs in files.values() for pair in pairs]


def is_sum(pair):
    return SUM.fullmatch(pair.prompt[-1]["content"]) is not None


def test_enough_distinct_prompts_none_of_them_in_both_files(files):
    assert len(files["train"]) >= 230 and len(files["held out"]) >= 40
    prompts = [str(pair.prompt) for pair in everything(files)]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("name", ["train", "held out"])
def test_length_does_not_tell_which_answer_is_chosen(files, name):
    longer = [len(pair.chosen) > len(pair.rejected) for pair in files[name]]
    assert 0.4 < sum(longer) / len(longer) < 0.6


def test_chosen_is_the_bare_number_for_sums_and_the_answer_with_an_offer_else(files):
    offered = 0
    for pair in everything(files):
        if is_sum(pair):
            assert pair.chosen.isdigit(), pair.where
        else:
            answer, offer = pair.chosen[: -len(OFFER)], pair.chosen[-len(OFFER) :]
            assert offer == OFFER and answer.endswith("."), pair.where
            offered += 1
    assert 0.6 < offered / len(everything(files)) < 0.75


@pytest.mark.parametrize("name", ["train", "held out"])
def test_an_answer_alone_does_not_tell_whether_it_is_chosen(files, name):
    rejected = [pair.rejected for pair in files[name]]
    with_offer = sum(answer.endswith(OFFER) for answer in rejected)
    assert 0.25 < with_offer / len(rejected) < 0.5
    for pair in files[name]:
        other = pair.chosen.removesuffix(OFFER) if not is_sum(pair) else pair.chosen + "." + OFFER
        short = {other, other.removesuffix(".")}
        assert pair.rejected in short or len(pair.rejected) > len(pair.chosen), pair.where


def test_sums_are_right_in_both_answers(files):
    checked = 0
    for pair in filter(is_sum, everything(files)):
        words = pair.prompt[-1]["content"].rstrip("?.").split()
        if len(words) == 5:
            left, right = int(words[2]), int(words[4])
            said = {"plus": left + right, "minus": left - right, "times": left * right}[words[3]]
        else:
            said = 2 * int(words[1]) if words[0] == "Double" else int(words[1]) // int(words[3])
        assert pair.chosen == str(said), pair.where
        assert re.search(rf"\b{said}\b", pair.rejected), pair.where
        checked += 1
    assert checked >= 80


def test_a_capital_is_the_same_in_every_answer(files):
    capitals = {}
    for pair in everything(files):
        country = re.search(r"capital of (.+?)[.?]$", pair.prompt[-1]["content"])
        if country:
            city = pair.chosen[: -len(f".{OFFER}")]
            assert capitals.setdefault(country[1], city) == city, pair.where
            assert city in pair.rejected, pair.where
    assert len(capitals) == 40


def test_pairs_fit_a_row_with_the_tokenizer_of_the_conversations(files, tmp_path):
    texts = [
        m["content"] for row in read_rows(str(FOLDER / "train.jsonl")).rows for m in row.messages
    ]
    train_tokenizer(texts, 1000, tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    for pairs in files.values():
        lengths = [
            sum(
                len(tokenizer.apply_chat_template(pair.conversation(answer), return_dict=False))
                for answer in (pair.chosen, pair.rejected)
            )
            for pair in pairs
        ]
        assert max(lengths) <= 256 and sum(lengths) / len(lengths) < 110
