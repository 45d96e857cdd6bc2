"""Preference pairs as two encoded sequences each, and how one that is too long is cut."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from easylm.data.encode import Encoded, Examples, Policy, encode_named, too_long, unknown_ids
from easylm.data.pair_rows import PairRow, common_length
from easylm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Pairs:
    """Encoded pairs: a prompt with its chosen answer, and with the rejected one.

    Attributes:
        sequences: of pair i, 2i is the chosen and 2i + 1 the rejected one; `loss_mask` is 1 on
            tokens that are scored.
        ids: uint64 `[pairs]`, a hash of the tokens and masks of both: what was computed for a pair
            is known by it wherever the pair stands. Equal pairs have equal ids.
        margins: float32 `[pairs]`, by how much the chosen answer is better; NaN where the row does
            not say.
        known_fingerprint: what stored pairs are known by; `fingerprint` gives it as it is.
    """

    sequences: Examples
    ids: np.ndarray
    margins: np.ndarray
    known_fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of both sequences of each pair, int64 `[pairs]`."""
        return self.sequences.lengths.reshape(-1, 2).sum(1)

    def fingerprint(self) -> str:
        """A hash of tokens, masks, lengths and margins, in hexadecimal."""
        if self.known_fingerprint is not None:
            return self.known_fingerprint
        digest = hashlib.sha256(self.sequences.fingerprint().encode())
        digest.update(np.ascontiguousarray(self.margins).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class PairPolicy(Policy):
    """How a pair becomes two sequences.

    Attributes:
        seq_len: the most tokens that both may have together.
        too_long: `truncate`, as in `cut_pair`, drops the pair if a sequence has no target left or
            what is left of the answers is equal; `drop`; or `error`.
        keep_prompt: the side of a prompt that stays where it is cut, `end` or `start`.
        scored_turns: `last`, the answers alone, or `all` that the assistant says.
        eos_newline, special_tokens: as in `easylm.chat.encode_conversations`.
    """

    keep_prompt: str = "end"
    scored_turns: str = "last"

    def __post_init__(self):
        super().__post_init__()
        _require("keep_prompt", self.keep_prompt, "end", "start")
        _require("scored_turns", self.scored_turns, "last", "all")


def _require(field: str, found: str, *values: str) -> None:
    if found not in values:
        wanted = " or ".join(map(repr, values))
        raise InputError(f"dpo.{field}: found {found!r}; wanted {wanted}")


class Side(NamedTuple):
    """One sequence of a pair: its tokens, its mask, and where the answer begins."""

    tokens: np.ndarray
    mask: np.ndarray
    answer: int


def encode_pairs(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[PairRow], policy: PairPolicy, vocab_size: int
) -> Encoded:
    """Encodes pairs for training; of each, the chosen sequence comes first.

    Args:
        tokenizer: with the chat template to train on.
        rows: valid pairs.
        policy: what is done with them.
        vocab_size: the number of ids the model has.

    Returns:
        What became of them, with `ids` and `margins` of `Pairs` as columns; the lengths are of
        both sequences together.

    Raises:
        InputError: as `easylm.data.encode.encode_rows`, or the template does not mark each turn of
            the assistant as one.
    """
    header = _header_tokens(tokenizer, policy) if policy.keep_prompt == "start" else None
    encoded, ids, margins, row_lengths = [], [], [], []
    dropped: Counter[str] = Counter()
    truncated = cut_tokens = unknown_tokens = 0
    unknown = unknown_ids(tokenizer)
    for row, pair in zip(rows, _encode_sides(tokenizer, rows, policy, vocab_size), strict=True):
        length = _length(pair)
        row_lengths.append(length)
        unknown_tokens += sum(int(np.isin(side.tokens, unknown).sum()) for side in pair)
        long = length > policy.seq_len
        if long and policy.too_long == "error":
            raise too_long(row.where, f"{length:,} tokens in both sequences", policy)
        if long and policy.too_long == "drop":
            dropped["too long"] += 1
            continue
        if long:
            pair = cut_pair(pair, policy.seq_len, tokenizer.bos_token_id, header)
        wrong = _of_no_use(pair)
        if wrong:
            dropped[f"{wrong} after truncation" if long else wrong] += 1
            continue
        truncated += long
        cut_tokens += length - _length(pair)
        encoded += [(side.tokens, side.mask) for side in pair]
        ids.append(pair_id(pair))
        margins.append(row.margin)
    sequences = Examples.concatenate(encoded)
    return Encoded(
        sequences,
        sequences.lengths.reshape(-1, 2).sum(1),
        {"ids": np.array(ids, np.uint64), "margins": np.array(margins, np.float32)},
        np.array(row_lengths, np.int32),
        truncated,
        dropped,
        cut_tokens,
        unknown_tokens,
    )


def cut_pair(
    pair: tuple[Side, Side], seq_len: int, bos_token_id: int | None, header: int | None
) -> tuple[Side, Side]:
    """Cuts a pair to `seq_len` tokens.

    The prompt is cut first, in both sequences alike, but to no less than a quarter of `seq_len`
    each. Then the answers are cut from their ends, so that the shorter one keeps all it can of half
    of the room.

    Args:
        pair: two sequences.
        seq_len: tokens that both may have together.
        bos_token_id: where the end of a prompt is kept, this token stays at its beginning.
        header: keep the beginning of a prompt instead, and so many tokens of its end: what the
            template writes between a prompt and the answer.
    """
    answers = [len(side.tokens) - side.answer for side in pair]
    prompt = max(side.answer for side in pair)
    least = min(prompt, seq_len // 4)
    prompt = max(least, min(prompt, (seq_len - sum(answers)) // 2))
    room = seq_len - 2 * prompt
    shorter = min(*answers, room // 2)
    # Where both are cut, at the same place: what is left then differs, or does not.
    is_cut = shorter < min(answers)
    longer = shorter if is_cut else min(max(answers), room - shorter)
    kept = (shorter, longer) if answers[0] <= answers[1] else (longer, shorter)
    keeps_bos = int(pair[0].tokens[0] == bos_token_id)
    first = keeps_bos if header is None else max(0, prompt - header)
    chosen, rejected = (
        _cut(side, prompt, first, answer) for side, answer in zip(pair, kept, strict=True)
    )
    return chosen, rejected


def _cut(side: Side, prompt: int, first: int, answer: int) -> Side:
    """Keeps `prompt` tokens before the answer, `first` of them the very first, and of `answer`."""
    prompt = min(prompt, side.answer)
    first = min(first, prompt)
    end = slice(side.answer - (prompt - first), side.answer + answer)
    tokens, mask = (np.concatenate([array[:first], array[end]]) for array in side[:2])
    return Side(tokens, mask, prompt)


def _length(pair: tuple[Side, Side]) -> int:
    return sum(len(side.tokens) for side in pair)


def _of_no_use(pair: tuple[Side, Side]) -> str | None:
    """Why a pair says nothing about what is better, if so."""
    if not all(side.mask[1:].any() for side in pair):
        return "no target left"
    chosen, rejected = pair
    if np.array_equal(chosen.tokens, rejected.tokens):
        return "equal answers"
    return None


def pair_id(pair: tuple[Side, Side]) -> int:
    """A hash of the tokens and masks of both sequences, below 2 ** 64."""
    digest = hashlib.blake2b(digest_size=8)
    for side in pair:
        digest.update(len(side.tokens).to_bytes(8, "little"))
        digest.update(side.tokens.astype("<i4").data)
        digest.update(np.ascontiguousarray(side.mask).data)
    return int.from_bytes(digest.digest(), "little")


def _encode_sides(
    tokenizer, rows: Sequence[PairRow], policy: PairPolicy, vocab_size: int
) -> Iterator[tuple[Side, Side]]:
    named = (
        (row.conversation(answer), row.where)
        for row in rows
        for answer in (row.chosen, row.rejected)
    )
    encoded = encode_named(tokenizer, named, policy, vocab_size)
    for row in rows:
        turns = sum(message["role"] == "assistant" for message in row.prompt) + 1
        chosen, rejected = (
            _side(tokens, mask, turns, row.where, policy)
            for tokens, mask in itertools.islice(encoded, 2)
        )
        yield chosen, rejected


def _side(tokens: np.ndarray, mask: np.ndarray, turns: int, where: str, policy: PairPolicy) -> Side:
    starts = np.flatnonzero(np.diff(mask, prepend=np.uint8(0)) == 1)
    if len(starts) != turns:
        raise InputError(
            f"{where}: the chat template marks {len(starts)} parts of the text as the assistant's; "
            f"the conversation has {turns} of its turns. Add {{% generation %}} around the "
            "assistant's content and end of turn, once a turn, or use chat_template='tulu'"
        )
    answer = int(starts[-1])
    if policy.scored_turns == "last":
        mask = np.where(np.arange(len(mask)) < answer, np.uint8(0), mask)
    return Side(tokens, mask, answer)


def _header_tokens(tokenizer, policy: PairPolicy) -> int:
    """How many tokens the template writes between a user's text and the answer."""
    prompts = []
    for question in ("Well?", "Yes"):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "Well."}]
        named = [(turns, "data.chat_template")]
        [(tokens, mask)] = encode_named(tokenizer, named, policy, len(tokenizer))
        prompts.append(tokens[: int(mask.argmax())][::-1].tolist())
    return common_length(*prompts)
