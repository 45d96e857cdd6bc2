"""Conversations to flat arrays of tokens and loss masks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from easylm.chat import encode_conversations
from easylm.data.sources import Row
from easylm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Enough for the tokenizer's threads, few enough for the progress bar to move.
_ROWS_PER_CALL = 512


@dataclass(frozen=True)
class Examples:
    """Encoded examples, one after another.

    Attributes:
        tokens: int32 `[total]`.
        loss_mask: uint8 `[total]`, 1 on tokens the model is trained to produce.
        offsets: int64 `[examples + 1]`; example i is `tokens[offsets[i]:offsets[i + 1]]`.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray

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
        """SHA-256 of tokens, masks and lengths, in hexadecimal."""
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
class EncodeReport:
    """What became of the rows.

    Attributes:
        rows: rows given.
        kept: examples made.
        truncated: examples among `kept` cut to `seq_len`.
        dropped: rows left out, by reason.
        tokens: tokens of the examples.
        target_tokens: those the model is trained to produce. The first token of an example is
            never one: nothing comes before it.
        length_mean: mean tokens of an example; the other lengths are quartiles and extremes.
    """

    rows: int
    kept: int
    truncated: int
    dropped: dict[str, int]
    tokens: int
    target_tokens: int
    length_mean: float
    length_min: int
    length_q25: int
    length_median: int
    length_q75: int
    length_max: int

    def __str__(self) -> str:
        dropped = "".join(f", {count:,} dropped ({why})" for why, count in self.dropped.items())
        return (
            f"{self.rows:,} rows: {self.kept:,} examples, {self.truncated:,} of them truncated"
            f"{dropped}; {self.tokens:,} tokens, {self.target_tokens:,} trained; "
            f"length mean {self.length_mean:,.0f}, quartiles {self.length_q25:,} "
            f"{self.length_median:,} {self.length_q75:,}, max {self.length_max:,}"
        )


def encode_rows(
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Row],
    *,
    seq_len: int,
    vocab_size: int,
    too_long: str = "truncate",
    progress: bool = True,
) -> tuple[Examples, EncodeReport]:
    """Encodes rows for training.

    Args:
        tokenizer: with the chat template to train on.
        rows: valid conversations.
        seq_len: the most tokens an example may have.
        vocab_size: the number of ids the model has.
        too_long: `truncate` keeps the first `seq_len` tokens, and drops the example if no target is
            among them; `drop`; or `error`.
        progress: whether to show a progress bar on stderr.

    Raises:
        InputError: an id is not below `vocab_size`, an example is too long under `error`, the chat
            template refuses a conversation, or no example is left.
    """
    if too_long not in ("truncate", "drop", "error"):
        raise InputError(f"data.too_long: found {too_long!r}; wanted 'truncate', 'drop' or 'error'")
    encoded = []
    dropped: Counter[str] = Counter()
    truncated = 0
    with tqdm(total=len(rows), desc="encode", unit=" rows", disable=not progress) as bar:
        for start in range(0, len(rows), _ROWS_PER_CALL):
            batch = rows[start : start + _ROWS_PER_CALL]
            for row, (tokens, mask) in zip(batch, _encode(tokenizer, batch), strict=True):
                _require_in_vocabulary(tokens, vocab_size, tokenizer, row.where)
                long = len(tokens) > seq_len
                if long and too_long == "error":
                    raise InputError(
                        f"{row.where}: {len(tokens):,} tokens; wanted at most "
                        f"data.seq_len={seq_len:,}. Raise it, or set data.too_long=truncate or drop"
                    )
                if long and too_long == "drop":
                    dropped["too long"] += 1
                    continue
                tokens, mask = tokens[:seq_len], mask[:seq_len]
                if not mask[1:].any():
                    dropped["no target left after truncation" if long else "no target"] += 1
                    continue
                truncated += long
                encoded.append((tokens, mask))
            bar.update(len(batch))
    if not encoded:
        raise InputError(
            f"no example is left of {len(rows):,} rows at data.seq_len={seq_len:,}: "
            + ", ".join(f"{count:,} {why}" for why, count in dropped.items())
        )
    examples = Examples.concatenate(encoded)
    return examples, _report(examples, len(rows), truncated, dropped)


def _encode(tokenizer, rows: Sequence[Row]) -> list[tuple[np.ndarray, np.ndarray]]:
    try:
        return encode_conversations(tokenizer, [row.messages for row in rows])
    except InputError:
        # Find the row, to name it.
        for row in rows:
            try:
                encode_conversations(tokenizer, [row.messages])
            except InputError as error:
                raise InputError(f"{row.where}: {error}") from error
        raise


def _require_in_vocabulary(tokens: np.ndarray, vocab_size: int, tokenizer, where: str) -> None:
    largest = tokens.max(initial=0)
    if largest >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(int(largest))
        raise InputError(
            f"{where}: token {token!r} has id {largest:,}: the tokenizer has {len(tokenizer):,} "
            f"ids, the model vocab_size={vocab_size:,}. Use the model's own tokenizer, or resize "
            f"the model's vocabulary"
        )


def _report(examples: Examples, rows: int, truncated: int, dropped: Counter[str]) -> EncodeReport:
    lengths, mask = examples.lengths, examples.loss_mask
    low, q25, median, q75, high = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1])
    return EncodeReport(
        rows=rows,
        kept=len(examples),
        truncated=truncated,
        dropped=dict(dropped),
        tokens=int(lengths.sum()),
        target_tokens=int(mask.sum(dtype=np.int64) - mask[examples.offsets[:-1]].sum()),
        length_mean=float(lengths.mean()),
        length_min=int(low),
        length_q25=int(q25),
        length_median=int(median),
        length_q75=int(q75),
        length_max=int(high),
    )
