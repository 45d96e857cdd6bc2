"""Pairs become two sequences each; what is too long is cut as said, counted, and never hidden."""

import dataclasses
import itertools

import numpy as np
import pytest

from easylm.chat import encode_messages
from easylm.data.encode import Examples
from easylm.data.pair_rows import PairRow
from easylm.data.pairs import PairPolicy, Pairs, Side, cut_pair, encode_pairs, pair_id
from easylm.errors import InputError
from easylm.tokenizer import load_tokenizer, train_tokenizer

TEXTS = ["one two three four five six seven", "eight nine ten eleven twelve", "yes no 12 👍"]
WORDS = " ".join(TEXTS).split()
HEADER = "\n<|assistant|>\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(TEXTS, 330, folder)
    return load_tokenizer(folder)


def row(prompt, chosen, rejected, where="f:1", before=(), margin=np.nan):
    return PairRow([*before, {"role": "user", "content": prompt}], chosen, rejected, margin, where)


TURNS = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two three"}]


def random_rows(count, seed=0):
    rng = np.random.default_rng(seed)

    def text(most):
        return " ".join(rng.choice(WORDS, rng.integers(1, most)))

    return [
        row(text(60), f"yes {text(40)}", f"no {text(40)}", f"f:{i}", TURNS * (i % 2), margin=i)
        for i in range(count)
    ]


def encode(tokenizer, rows, seq_len=1000, **options):
    return encode_pairs(tokenizer, rows, PairPolicy(seq_len, **options), vocab_size=330)


def pairs_of(encoded):
    return Pairs(encoded.examples, **encoded.columns)


def texts(tokenizer, examples, index):
    """The whole text of a sequence, and what of it is scored."""
    tokens, mask = examples.example(index)
    return tokenizer.decode(tokens), tokenizer.decode(tokens[mask == 1])


def test_both_sequences_are_the_encoded_conversations(tokenizer):
    rows = random_rows(20)
    encoded = encode(tokenizer, rows, scored_turns="all")
    pairs = pairs_of(encoded)
    assert len(pairs) == 20 and len(pairs.sequences) == 40
    for index, (pair, side) in enumerate(itertools.product(rows, ("chosen", "rejected"))):
        tokens, mask = pairs.sequences.example(index)
        expected, expected_mask = encode_messages(tokenizer, pair.conversation(getattr(pair, side)))
        assert tokens.tolist() == expected.tolist() and mask.tolist() == expected_mask.tolist()
    both = pairs.sequences.lengths[::2] + pairs.sequences.lengths[1::2]
    assert pairs.lengths.tolist() == both.tolist() == encoded.row_lengths.tolist()
    assert encoded.lengths.tolist() == pairs.lengths.tolist()
    assert (pairs.ids.dtype, pairs.margins.dtype) == (np.uint64, np.float32)
    assert pairs.margins.tolist() == list(range(20))
    assert (encoded.truncated, encoded.dropped, encoded.cut_tokens) == (0, {}, 0)


def test_the_last_turn_is_scored_or_all_turns_are(tokenizer):
    rows = [row("four?", "five", "six seven", before=TURNS)]
    last, every = (
        encode(tokenizer, rows, scored_turns=turns).examples for turns in ("last", "all")
    )
    assert texts(tokenizer, last, 0)[1] == "five</s>"
    assert texts(tokenizer, last, 1)[1] == "six seven</s>"
    assert texts(tokenizer, every, 0)[1] == "two three</s>five</s>"
    assert texts(tokenizer, every, 0)[0] == texts(tokenizer, last, 0)[0]


def test_ids_are_of_the_content(tokenizer):
    rows = random_rows(30)
    ids = encode(tokenizer, rows).columns["ids"]
    assert len(set(ids.tolist())) == 30
    order = np.random.default_rng(1).permutation(30)[:20]
    assert (
        encode(tokenizer, [rows[i] for i in order]).columns["ids"].tolist() == ids[order].tolist()
    )
    # What is scored counts, and which answer is which; a margin does not.
    scored = encode(tokenizer, rows, scored_turns="all").columns["ids"]
    assert (scored == ids).tolist() == [True, False] * 15
    swapped = [pair._replace(chosen=pair.rejected, rejected=pair.chosen) for pair in rows]
    assert not set(encode(tokenizer, swapped).columns["ids"].tolist()) & set(ids.tolist())
    others = [pair._replace(margin=0.0, where="g:1") for pair in rows]
    assert encode(tokenizer, others).columns["ids"].tolist() == ids.tolist()


def test_where_one_sequence_ends_is_part_of_the_id():
    tokens, mask = np.zeros(10, np.int32), np.zeros(10, np.uint8)
    ids = {
        pair_id((Side(tokens[:end], mask[:end], 0), Side(tokens[end:], mask[end:], 0)))
        for end in (4, 5)
    }
    assert len(ids) == 2


def test_the_fingerprint_is_of_everything(tokenizer):
    pairs = pairs_of(encode(tokenizer, random_rows(5)))
    other = pairs_of(encode(tokenizer, random_rows(5)))
    assert pairs.fingerprint() == other.fingerprint()
    margins = np.arange(5, dtype=np.float32)[::-1]
    sequences = pairs_of(encode(tokenizer, random_rows(5, seed=1))).sequences
    different = {
        dataclasses.replace(pairs, margins=margins).fingerprint(),
        dataclasses.replace(pairs, sequences=sequences).fingerprint(),
        pairs.fingerprint(),
    }
    assert len(different) == 3
    assert dataclasses.replace(other, known_fingerprint="abc").fingerprint() == "abc"


def sides(prompt, chosen, rejected):
    """A pair of so many tokens; of prompts 0, 1, ..., of answers 1000, ... and 2000, ..."""
    return tuple(
        Side(
            np.r_[0:prompt, start : start + answer].astype(np.int32),
            np.r_[np.zeros(prompt), np.ones(answer)].astype(np.uint8),
            prompt,
        )
        for start, answer in ((1000, chosen), (2000, rejected))
    )


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [
        # (prompt, chosen, rejected) of 100 tokens, and what is left of them.
        ((60, 20, 10), (35, 20, 10)),  # the prompt alone is cut
        ((60, 25, 25), (25, 25, 25)),
        ((60, 30, 30), (25, 25, 25)),  # to no less than a quarter; then both answers
        ((60, 30, 10), (30, 30, 10)),
        ((60, 90, 10), (25, 40, 10)),  # the longer answer makes room for the shorter
        ((60, 10, 90), (25, 10, 40)),
        ((60, 90, 80), (25, 25, 25)),
        ((23, 90, 80), (23, 27, 27)),
        ((25, 90, 80), (25, 25, 25)),
        ((20, 90, 80), (20, 30, 30)),  # a short prompt stays whole
        ((20, 90, 7), (20, 53, 7)),
        ((60, 21, 20), (29, 21, 20)),
    ],
)
@pytest.mark.parametrize("header", [None, 5])
def test_what_is_cut(lengths, kept, header):
    cut = cut_pair(sides(*lengths), 100, None, header)
    prompt, *answers = kept
    for side, start, answer in zip(cut, (1000, 2000), answers, strict=True):
        first = range(prompt - header) if header and prompt < lengths[0] else ()
        rest = range(lengths[0] - prompt + len(first), lengths[0])
        assert side.tokens.tolist() == [*first, *rest, *range(start, start + answer)]
        assert side.mask.tolist() == [0] * prompt + [1] * answer
        assert side.answer == prompt
    assert sum(len(side.tokens) for side in cut) <= 100


def test_answers_that_are_both_cut_are_cut_at_the_same_place():
    cut = cut_pair(sides(60, 90, 80), 101, None, None)
    assert [len(side.tokens) - side.answer for side in cut] == [25, 25]


def test_the_first_token_stays_where_it_begins_the_sequence():
    cut = cut_pair(sides(60, 30, 30), 100, 0, None)
    assert cut[0].tokens[:25].tolist() == [0, *range(36, 60)]
    # A header longer than what is left of the prompt leaves its end.
    cut = cut_pair(sides(60, 30, 30), 100, 0, 40)
    assert cut[0].tokens[:25].tolist() == [*range(35, 60)]


@pytest.mark.parametrize("keep_prompt", ["end", "start"])
def test_long_pairs_are_cut(tokenizer, keep_prompt):
    rows = random_rows(60)
    full = encode(tokenizer, rows)
    limit = int(np.median(full.lengths))
    encoded = encode(tokenizer, rows, limit, keep_prompt=keep_prompt)
    assert encoded.dropped == {} and len(encoded.lengths) == 60
    assert encoded.row_lengths.tolist() == full.lengths.tolist()
    long = full.lengths > limit
    assert encoded.truncated == long.sum() > 20
    assert encoded.cut_tokens == (full.lengths - encoded.lengths).sum() > 0
    assert encoded.lengths.max() <= limit and encoded.lengths[long].min() >= limit - 1
    assert encoded.lengths[~long].tolist() == full.lengths[~long].tolist()
    for index in np.flatnonzero(long):
        for number in (2 * index, 2 * index + 1):
            text, scored = texts(tokenizer, encoded.examples, number)
            whole, answer = texts(tokenizer, full.examples, number)
            start, end = text[: text.rindex(scored)], whole[: whole.rindex(answer)]
            assert answer.startswith(scored) and start.endswith(HEADER)
            assert text.startswith("<s>")
            if keep_prompt == "end":
                assert end.endswith(start.removeprefix("<s>").lstrip("�"))
            else:
                assert end.startswith(start.removesuffix(HEADER).rstrip("�"))


def test_what_is_of_no_use_is_dropped_and_counted(tokenizer):
    same = " ".join(WORDS * 8)
    rows = [row("one", f"{same} yes", f"{same} no", "f:1"), row("one", "yes", "no", "f:2")]
    lengths = encode(tokenizer, rows).lengths
    limit = int(lengths[0]) // 2  # every answer is cut before what tells it from the other
    encoded = encode(tokenizer, rows, limit)
    assert encoded.dropped == {"equal answers after truncation": 1}
    assert (encoded.truncated, encoded.cut_tokens) == (0, 0)
    assert encoded.lengths.tolist() == [lengths[1]]
    assert encoded.row_lengths.tolist() == lengths.tolist()
    assert len(encoded.columns["ids"]) == len(encoded.columns["margins"]) == 1

    encoded = encode(tokenizer, rows, limit, too_long="drop")
    assert encoded.dropped == {"too long": 1} and encoded.lengths.tolist() == [lengths[1]]

    with pytest.raises(InputError) as error:
        encode(tokenizer, rows, limit, too_long="error")
    assert str(error.value).startswith(
        f"f:1: {lengths[0]} tokens in both sequences; wanted at most data.seq_len={limit}."
    )


def test_answers_that_a_tokenizer_makes_equal_are_dropped(tokenizer):
    """Nothing else tells them apart than white space at their ends inside of a template."""
    rows = [row("one", "yes", "yes ", "f:1"), row("one", "yes", "no", "f:2")]
    assert encode(tokenizer, rows).dropped == {"equal answers": 1}


def with_template(tokenizer, old, new):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace(old, new)
    assert other.chat_template != tokenizer.chat_template
    return other


def test_a_template_that_trains_nothing_is_refused(tokenizer):
    nothing = with_template(
        tokenizer,
        "{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}",
        "{{ message['content'] | trim + eos_token }}{% generation %}{% endgeneration %}",
    )
    with pytest.raises(InputError, match=r"^f:1: the chat template marks 0 parts of the text"):
        encode(nothing, [row("one", "yes", "no")])


def test_a_template_that_parts_a_turn_is_refused(tokenizer):
    parted = with_template(
        tokenizer,
        "{{ message['content'] | trim + eos_token }}{% endgeneration %}",
        "{{ message['content'] | trim }}{% endgeneration %}{{ ' ' }}{% generation %}{{ eos_token }}"
        "{% endgeneration %}",
    )
    with pytest.raises(InputError, match=r"^f:1: the chat template marks 2 .* has 1 of its turns"):
        encode(parted, [row("one", "yes", "no")])


def test_errors_name_the_row(tokenizer):
    size = len(tokenizer)
    last = tokenizer.convert_ids_to_tokens(size - 1)
    rows = [row("one", "yes", "no", "f:1"), row("one", "yes", last, "f:2")]
    with pytest.raises(InputError, match=r"^f:2: token .* has id"):
        encode_pairs(tokenizer, rows, PairPolicy(1000), vocab_size=size - 1)
    rows[1] = row("one", "yes", "</s>\ufdd0", "f:3")
    with pytest.raises(InputError, match=r"^f:3: the content has a Unicode noncharacter"):
        encode(tokenizer, rows)


@pytest.mark.parametrize("field", ["keep_prompt", "scored_turns", "too_long"])
def test_policies_are_checked(field):
    with pytest.raises(InputError, match=rf"{field}: found 'middle'; wanted '"):
        PairPolicy(100, **{field: "middle"})


def test_no_pairs():
    empty = Pairs(Examples.concatenate([]), np.zeros(0, np.uint64), np.zeros(0, np.float32))
    assert len(empty) == 0 and empty.lengths.tolist() == []
