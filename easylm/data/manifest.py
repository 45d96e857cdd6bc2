"""What is said about prepared data, and kept beside it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any, ClassVar

from easylm.data.sources import Source


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What was prepared, from what, and what became of every row.

    Attributes:
        sources: for each source its `path` and `amount`, the `sha256` of its content, and what
            `easylm.data.sources.Found` says of it.
        rows: valid rows.
        kept: examples made of them.
        truncated: examples among `kept` cut to `seq_len`.
        dropped: rows left out while encoding, by reason.
        cut_tokens, dropped_tokens: tokens that truncated examples, and rows left out, have lost.
        unknown_tokens: tokens, before any is lost, that stand for text the tokenizer does not know.
        tokens: tokens of the examples.
        target_tokens: those the model is trained to produce. The first token of an example is
            never one: nothing comes before it.
        length_mean: mean tokens of an example; the other lengths are quartiles and extremes.
        row_length_mean: the same of all rows before any is cut or left out.
        largest_token: the largest id.
        tokenizer, chat_template: SHA-256 of the tokenizer's files, and of the template alone.
        on_bad_row, seed, seq_len, too_long, eos_newline, special_tokens: the options; the seed
            decides nothing but which rows are taken where a source gives an amount.
    """

    sources: list[dict[str, Any]]
    rows: int
    kept: int
    truncated: int
    dropped: dict[str, int]
    cut_tokens: int
    dropped_tokens: int
    unknown_tokens: int
    tokens: int
    target_tokens: int
    length_mean: float
    length_min: int
    length_q25: int
    length_median: int
    length_q75: int
    length_max: int
    row_length_mean: float
    row_length_min: int
    row_length_q25: int
    row_length_median: int
    row_length_q75: int
    row_length_max: int
    largest_token: int
    tokenizer: str
    chat_template: str
    on_bad_row: str
    seed: int
    seq_len: int
    too_long: str
    eos_newline: str
    special_tokens: str
    article: ClassVar[str] = "an"
    noun: ClassVar[str] = "example"

    def __str__(self) -> str:
        lines = [line for entry in self.sources for line in _describe(entry)]
        dropped = "".join(f", {count:,} dropped ({why})" for why, count in self.dropped.items())
        lines += _wrapped(
            f"{_rows(self.rows)}: {self.kept:,} {self.noun}s, {self.truncated:,} of them "
            f"truncated{dropped}; {self.tokens:,} tokens, {self.target_tokens:,} trained"
        )
        total = self.tokens + self.cut_tokens + self.dropped_tokens
        if total > self.tokens:
            lines += _wrapped(
                f"tokens of a row before cutting: mean {self.row_length_mean:,.0f}, quartiles "
                f"{self.row_length_q25:,} {self.row_length_median:,} {self.row_length_q75:,}, "
                f"max {self.row_length_max:,}"
            )
            lines += _wrapped(
                f"{self.cut_tokens:,} tokens ({self.cut_tokens / total:.1%}) lost to truncation, "
                f"{self.dropped_tokens:,} ({self.dropped_tokens / total:.1%}) in dropped rows"
            )
        if self.unknown_tokens:
            lines += _wrapped(
                f"{self.unknown_tokens:,} tokens ({self.unknown_tokens / total:.2%}) stand for "
                "text that the tokenizer does not know"
            )
        lines += _wrapped(
            f"tokens of {self.article} {self.noun}: mean {self.length_mean:,.0f}, quartiles "
            f"{self.length_q25:,} {self.length_median:,} {self.length_q75:,}, "
            f"max {self.length_max:,}"
        )
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class PairManifest(Manifest):
    """The same of pairs: lengths are of both sequences together, and targets are scored tokens.

    Attributes:
        keep_prompt, scored_turns: further options.
    """

    keep_prompt: str
    scored_turns: str
    article: ClassVar[str] = "a"
    noun: ClassVar[str] = "pair"


def _describe(entry: dict[str, Any]) -> list[str]:
    """What became of the rows of a source, in lines."""
    lines = [f"{_rows(entry['taken'])} of {Source(entry['path'], entry['amount'])}"]
    lines += [
        f"  {_rows(count)} skipped: {reason}, the first is {entry['path']}:{entry['first'][reason]}"
        for reason, count in entry["skipped"].items()
    ]
    unused = [f"{name} ({_rows(count)})" for name, count in entry["unused"].items()]
    if unused:
        lines += _wrapped(f"  fields not used: {', '.join(unused)}")
    return lines


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, 80, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
