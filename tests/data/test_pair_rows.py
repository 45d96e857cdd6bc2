"""Rows of every form become a prompt with two answers; what is wrong is said with its place."""

import math

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from easylm.data.pair_rows import PAIRS, common_length, read_pair
from easylm.data.prepare import open_rows
from easylm.data.rows import CONVERSATIONS
from easylm.data.sources import read_rows
from easylm.errors import InputError
from tests import bad_pairs
from tests.bad_pairs import transcript, turns

USER = turns("hi")
LONG = turns("hi", "hello", "how are you?")
SYSTEM = {"role": "system", "content": "Be kind."}


def answer(text):
    return turns(text, first="assistant")[0]


def sharegpt(*texts):
    who = ("human", "gpt")
    return [{"from": who[i % 2], "value": text} for i, text in enumerate(texts)]


# What a row holds beside 'chosen' and 'rejected', how an answer is written, and the prompt of it.
FORMS = {
    "conversations": ({}, lambda text: [*LONG, answer(text)], LONG),
    "conversations with a system": (
        {},
        lambda text: [SYSTEM, *USER, answer(text)],
        [SYSTEM, *USER],
    ),
    "the prompt beside": ({"prompt": "hi"}, lambda text: [*LONG, answer(text)], LONG),
    "the messages beside": ({"prompt": LONG}, lambda text: [*LONG, answer(text)], LONG),
    "null beside": ({"prompt": None}, lambda text: [*USER, answer(text)], USER),
    "texts": ({"prompt": "hi"}, lambda text: text, USER),
    "texts after messages": ({"prompt": LONG}, lambda text: text, LONG),
    "messages": ({"prompt": LONG}, answer, LONG),
    "lists of one message": ({"prompt": "hi"}, lambda text: [answer(text)], USER),
    "lists of the last turns": (
        {"prompt": "hi"},
        lambda text: [answer("hello"), *turns("how are you?", text)],
        LONG,
    ),
    "ShareGPT": (
        {"conversations": sharegpt("hi", "hello", "how are you?")},
        lambda text: {"from": "gpt", "value": text},
        LONG,
    ),
    "ShareGPT and messages": ({"conversations": sharegpt("hi")}, answer, USER),
    "ShareGPT and texts": ({"conversations": sharegpt("hi")}, lambda text: text, USER),
    "whole ShareGPT": ({}, lambda text: sharegpt("hi", text), USER),
    "transcripts": ({}, lambda text: transcript("hi", "hello", "how are you?", text), LONG),
    "answers to a transcript": (
        {"prompt": transcript("hi", "hello", "how are you?") + "\n\nAssistant:"},
        lambda text: f" {text}",
        LONG,
    ),
    "a system beside": ({"prompt": "hi", "system": "Be kind."}, lambda text: text, [SYSTEM, *USER]),
    "a system beside conversations": (
        {"system": "Be kind."},
        lambda text: [*USER, answer(text)],
        [SYSTEM, *USER],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form):
    beside, written, prompt = FORMS[form]
    row = {**beside, "chosen": written("yes"), "rejected": written("no")}
    pair, problems = read_pair(row, "f:1")
    assert problems == []
    assert pair.prompt == prompt
    assert (pair.chosen.strip(), pair.rejected.strip(), pair.where) == ("yes", "no", "f:1")
    assert math.isnan(pair.margin)
    assert PAIRS.unused_fields(row) == set()


def test_a_pair_is_two_conversations():
    row = {"prompt": LONG, "chosen": "yes", "rejected": "no", "margin": 2}
    pair, _ = read_pair(row, "f:1")
    assert pair.margin == 2.0
    assert pair.conversation(pair.chosen) == [*LONG, answer("yes")]
    assert pair.messages == [*LONG, answer("yes"), answer("no")]


def test_white_space_around_a_prompt_is_no_difference():
    row = {"chosen": turns("hi ", "yes"), "rejected": turns("hi\n", "no")}
    pair, problems = read_pair(row, "f:1")
    assert problems == [] and pair.prompt == turns("hi ")


def test_fields_that_are_not_used_are_named():
    ultrafeedback = {
        "prompt": "hi",
        "messages": turns("hi", "yes"),
        "score_chosen": 8.5,
        "chosen": [{**turn, "id": 1, "name": None} for turn in turns("hi", "yes")],
        "rejected": turns("hi", "no"),
    }
    assert PAIRS.unused_fields(ultrafeedback) == {"messages", "score_chosen", "chosen[].id"}
    other = {**ultrafeedback, "prompt": "<|user|>\nhi"}
    assert PAIRS.unused_fields(other) > {"prompt"}
    conversations = {"conversations": sharegpt("hi"), "margin": 1, "tools": "[]", "id": 1}
    conversations["conversations"][0]["lang"] = "en"
    answers = {"chosen": {**answer("yes"), "model": "a"}, "rejected": "no"}
    named = {"id", "conversations[].lang", "chosen.model"}
    assert PAIRS.unused_fields({**conversations, **answers}) == named
    beside = {"conversations": sharegpt("hi"), "chosen": transcript("hi", "a"), "rejected": "b"}
    assert PAIRS.unused_fields(beside) == {"conversations"}


@pytest.mark.parametrize("case", bad_pairs.ROW)
def test_a_bad_row(tmp_path, case):
    row, wanted = bad_pairs.ROW[case]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join([bad_pairs.GOOD, row, bad_pairs.GOOD, ""]))
    with pytest.raises(InputError) as error:
        open_rows(str(path), on_bad_row="refuse", seed=0, cache=str(tmp_path / "cache"), form=PAIRS)
    said = str(error.value)
    assert said.startswith("1 of 3 rows of data.sources are bad:\n")
    assert f"{path}:2: {wanted}" in said
    rows = read_rows(str(path), "skip", form=PAIRS)
    assert [row.where for row in rows.rows] == [f"{path}:1", f"{path}:3"]
    assert rows.skipped.total() == 1


def test_what_both_share_is_wrong_once():
    row = {"chosen": turns("a", "b", first="assistant"), "rejected": "c", "prompt": turns("x", "y")}
    _, problems = read_pair({**row, "chosen": "d"}, "f:1")
    assert [str(problem) for problem in problems] == [
        "chosen: assistant after assistant; wanted user",
        "rejected: assistant after assistant; wanted user",
    ]
    row["prompt"] = turns("x", first="assistant")
    _, problems = read_pair({**row, "chosen": "d"}, "f:1")
    assert [str(problem) for problem in problems] == ["prompt[0]: assistant first; wanted user"]


def test_a_difference_is_shown_where_it_is():
    text = "word " * 40
    row = {"chosen": turns(f"{text}one", "yes"), "rejected": turns(f"{text}two", "no")}
    _, [problem] = read_pair(row, "f:1")
    assert problem.found == "'word word word word two'"
    assert problem.wanted.endswith("says: 'word word word word one'")


def test_common_length():
    assert [common_length(*texts) for texts in (("", "a"), ("ab", "abc"), ("ab", "ac"))] == [
        0,
        2,
        1,
    ]


def test_pairs_of_parquet(tmp_path):
    rows = [
        {"chosen": turns("hi", "yes"), "rejected": turns("hi", "no"), "margin": 0.5},
        {"chosen": turns("hi", "one"), "rejected": turns("hi", "two"), "margin": None},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    read = read_rows(str(tmp_path / "pairs.parquet"), form=PAIRS).rows
    assert [(row.chosen, row.rejected) for row in read] == [("yes", "no"), ("one", "two")]
    assert np.array_equal([row.margin for row in read], [0.5, np.nan], equal_nan=True)


def test_the_same_file_is_other_rows_in_another_form(tmp_path):
    row = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "b"}]'
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{row}, "prompt": "hi", "chosen": "a", "rejected": "b"}}\n')
    options = {"on_bad_row": "refuse", "seed": 0, "cache": str(tmp_path / "cache")}
    pairs, conversations = (
        open_rows(str(path), **options, form=form) for form in (PAIRS, CONVERSATIONS)
    )
    assert pairs.key != conversations.key
    assert pairs.key == open_rows(str(path), **options, form=PAIRS).key
    assert len(pairs.read().rows[0].messages) == 3 and len(conversations.read().rows[0]) == 2
