"""Conversations to flat arrays of tokens and loss masks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from easylm.chat import encode_conversations
from easylm.data.rows import Row
from easylm.data.turns import Conversation
from easylm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Examples:
    """Encoded examples, one after another.

    Attributes:
        tokens: int32 `[total]`.
        loss_mask: uint8 `[total]`, 1 on tokens the model is trained to produce.
        offsets: int64 `[examples + 1]`; example i is `tokens[offsets[i]:offsets[i + 1]]`.
        known_fingerprint: what stored examples are known by; `fingerprint` gives it as it is.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    known_fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 `[examples]`."""
        return np.diff(self.offsets)

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """`(tokens, loss_mask)` of one example: int32 `[len]` and uint8 `[len]`."""
        where = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[where], self.loss_mask[where]

    def fingerprint(self) -> str:
        """A hash of tokens, masks and lengths, in hexadecimal."""
        if self.known_fingerprint is not None:
            return self.known_fingerprint
        digest = hashlib.sha256()
        for array in (self.tokens, self.loss_mask, self.offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @classmethod
    def concatenate(cls, encoded: Sequence[tuple[np.ndarray, np.ndarray]]) -> Examples:
        """Makes one from `(tokens, loss_mask)` pairs."""
        lengths = [len(tokens) for tokens, _ in encoded]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        empty = [np.zeros(0, np.int32)]
        return cls(
            np.concatenate([tokens for tokens, _ in encoded] or empty).astype(np.int32),
            np.concatenate([mask for _, mask in encoded] or empty).astype(np.uint8),
            offsets,
        )


@dataclass(frozen=True)
class Policy:
    """How a conversation becomes an example.

    Attributes:
        seq_len: the most tokens an example may have.
        too_long: `truncate` keeps the first `seq_len` tokens, and drops the example if no target is
            among them; `drop`; or `error`.
        eos_newline, special_tokens: as in `easylm.chat.encode_conversations`.
    """

    seq_len: int
    too_long: str = "truncate"
    eos_newline: str = "keep"
    special_tokens: str = "text"

    def __post_init__(self):
        if self.too_long not in ("truncate", "drop", "error"):
            raise InputError(
                f"data.too_long: found {self.too_long!r}; wanted 'truncate', 'drop' or 'error'"
            )


class Encoded(NamedTuple):
    """What became of some rows.

    Attributes:
        examples: in the order of the rows; of a row, one or several.
        lengths: int64 `[kept]`, tokens of what each row that is kept became.
        columns: further arrays `[kept]`, by name.
        row_lengths: int32 `[rows]`, tokens of every row before any was cut or dropped.
        truncated: how many of them were cut to `seq_len`.
        dropped: rows left out, by reason.
        cut_tokens: tokens that the truncated examples have lost.
        unknown_tokens: tokens of all rows, before any was cut or dropped, among `unknown_ids`.
    """

    examples: Examples
    lengths: np.ndarray
    columns: dict[str, np.ndarray]
    row_lengths: np.ndarray
    truncated: int
    dropped: Counter[str]
    cut_tokens: int
    unknown_tokens: int


def encode_rows(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], policy: Policy, vocab_size: int
) -> Encoded:
    """Encodes rows for training.

    Args:
        tokenizer: with the chat template to train on.
        rows: valid conversations.
        policy: what is done with them.
        vocab_size: the number of ids the model has.

    Raises:
        InputError: an id is not below `vocab_size`, an example is too long under `error`, or the
            chat template refuses a conversation; the message names the row.
    """
    encoded, lengths = [], []
    dropped: Counter[str] = Counter()
    truncated = cut_tokens = unknown_tokens = 0
    unknown = unknown_ids(tokenizer)
    named = ((row.messages, row.where) for row in rows)
    found = encode_named(tokenizer, named, policy, vocab_size)
    for row, (tokens, mask) in zip(rows, found, strict=True):
        lengths.append(len(tokens))
        unknown_tokens += int(np.isin(tokens, unknown).sum())
        long = len(tokens) > policy.seq_len
        if long and policy.too_long == "error":
            raise too_long(row.where, f"{len(tokens):,} tokens", policy)
        if long and policy.too_long == "drop":
            dropped["too long"] += 1
            continue
        tokens, mask = tokens[: policy.seq_len], mask[: policy.seq_len]
        if not mask[1:].any():
            dropped["no target left after truncation" if long else "no target"] += 1
            continue
        truncated += long
        cut_tokens += lengths[-1] - len(tokens)
        encoded.append((tokens, mask))
    examples = Examples.concatenate(encoded)
    return Encoded(
        examples,
        examples.lengths,
        {},
        np.array(lengths, np.int32),
        truncated,
        dropped,
        cut_tokens,
        unknown_tokens,
    )


def encode_named(
    tokenizer: PreTrainedTokenizerFast,
    named: Iterable[tuple[Conversation, str]],
    policy: Policy,
    vocab_size: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encodes conversations that have a place each: `(tokens, loss_mask)`, nothing cut.

    Raises:
        InputError: an id is not below `vocab_size`, or the chat template refuses a conversation;
            the message begins with its place.
    """
    conversations, places = zip(*named, strict=True)
    options = {"eos_newline": policy.eos_newline, "special_tokens": policy.special_tokens}
    try:
        encoded = encode_conversations(tokenizer, conversations, **options)
    except InputError:
        # Find the one, to name it.
        for messages, where in zip(conversations, places, strict=True):
            try:
                encode_conversations(tokenizer, [messages], **options)
            except InputError as error:
                raise InputError(f"{where}: {error}") from error
        raise
    for (tokens, mask), where in zip(encoded, places, strict=True):
        largest = int(tokens.max(initial=0))
        if largest >= vocab_size:
            raise outside_vocabulary(largest, vocab_size, tokenizer, where)
        yield tokens, mask


def too_long(where: str, found: str, policy: Policy) -> InputError:
    """The error for what does not fit into a row, where nothing may be cut."""
    return InputError(
        f"{where}: {found}; wanted at most data.seq_len={policy.seq_len:,}. Raise it, or set "
        "data.too_long=truncate or drop"
    )


def unknown_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids that a tokenizer gives to text it does not know: of its unknown and padding tokens.

    Not one that has another meaning: that begins or ends text, or that the chat template writes.
    """
    template = str(tokenizer.chat_template)
    meant = {tokenizer.bos_token, tokenizer.eos_token}
    named = tokenizer.special_tokens_map
    tokens = {
        named[name]
        for name in ("unk_token", "pad_token")
        if name in named and name not in template and named[name] not in template
    }
    return sorted(tokenizer.convert_tokens_to_ids(list(tokens - meant)))


def outside_vocabulary(token: int, vocab_size: int, tokenizer, where: str) -> InputError:
    """The error for an id that the model does not have."""
    return InputError(
        f"{where}: token {tokenizer.convert_ids_to_tokens(token)!r} has id {token:,}: the "
        f"tokenizer has {len(tokenizer):,} ids, the model vocab_size={vocab_size:,}. Use the "
        f"model's own tokenizer, or resize the model's vocabulary"
    )
