"""Prepared data: rows encoded once, kept under a key of all that decides what comes out."""

from __future__ import annotations

import dataclasses
import hashlib
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from easylm.data import store
from easylm.data.encode import Examples, Policy, outside_vocabulary, unknown_ids
from easylm.data.parallel import encode_in_parts
from easylm.data.sources import Rows, Source, digest, parse_sources, read_rows
from easylm.errors import InputError
from easylm.tokenizer import tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A tokenizer that does not know more of the text than this share of its tokens is of no use for it.
_MOST_UNKNOWN = 0.05
# To be raised when the same rows and tokenizer give other arrays, or another manifest, than before.
_VERSION = 2


class SourceRows:
    """The rows of some sources, known by content and read only if somebody needs them.

    Attributes:
        field: of the config that names the sources, for messages.
        digests: each source with the SHA-256 of its content.
        key: names the rows: contents, amounts, `on_bad_row`, and the seed where it chooses rows.
    """

    def __init__(self, sources: str, on_bad_row: str, seed: int, field: str):
        self._sources, self.on_bad_row, self.seed = sources, on_bad_row, seed
        self.field = field
        self.digests = self._digests()
        self.key = store.content_key(
            {
                "version": _VERSION,
                "sources": [[sha256, source.amount] for source, sha256 in self.digests],
                "on_bad_row": on_bad_row,
                "seed": seed
                if any(source.amount is not None for source, _ in self.digests)
                else None,
            }
        )
        self._rows: Rows | None = None

    def read(self) -> Rows:
        """Reads and checks the rows, once.

        Raises:
            InputError: as `easylm.data.sources.read_rows`, or a source changes meanwhile.
        """
        if self._rows is None:
            rows = read_rows(self._sources, self.on_bad_row, self.seed, self.field)
            # What is kept under the key must be what the key was made of.
            if self._digests() != self.digests:
                raise InputError(
                    f"{self.field}: {self._sources!r} changed while it was read; start again when "
                    "it is finished"
                )
            self._rows = rows
        return self._rows

    def forget(self) -> None:
        """Gives the memory of the rows back; who needs them again reads them again."""
        self._rows = None

    def _digests(self) -> list[tuple[Source, str]]:
        return [(source, digest(source)) for source in parse_sources(self._sources, self.field)]


def open_rows(
    sources: str, *, on_bad_row: str, seed: int, cache: str, field: str = "data.sources"
) -> SourceRows:
    """Looks up rows by content, and reads and checks them where they were never prepared.

    Args:
        sources: as in `easylm.data.sources.parse_sources`.
        on_bad_row: `refuse` or `skip`.
        seed: chooses the rows where a source gives an amount.
        cache: the folder of prepared data, local or gs://.
        field: of the config that names the sources, for messages.

    Raises:
        InputError: as `SourceRows.read`.
    """
    rows = SourceRows(sources, on_bad_row, seed, field)
    if not store.holds_any(cache, rows.key):
        rows.read()
    return rows


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

    def __str__(self) -> str:
        lines = [line for entry in self.sources for line in _describe(entry)]
        dropped = "".join(f", {count:,} dropped ({why})" for why, count in self.dropped.items())
        lines += _wrapped(
            f"{_rows(self.rows)}: {self.kept:,} examples, {self.truncated:,} of them truncated"
            f"{dropped}; {self.tokens:,} tokens, {self.target_tokens:,} trained"
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
            f"tokens of an example: mean {self.length_mean:,.0f}, quartiles {self.length_q25:,} "
            f"{self.length_median:,} {self.length_q75:,}, max {self.length_max:,}"
        )
        return "\n".join(lines)


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


@dataclass(frozen=True)
class Prepared:
    """Data ready to be packed.

    Attributes:
        examples: memory-mapped.
        row_lengths: int32 `[rows]`, tokens of every row before any was cut or dropped.
        manifest: what they are.
        folder: where they are on this machine.
        reused: whether they had been prepared before.
    """

    examples: Examples
    row_lengths: np.ndarray
    manifest: Manifest
    folder: str
    reused: bool


def prepare(
    rows: SourceRows,
    tokenizer: PreTrainedTokenizerFast,
    *,
    cache: str,
    seq_len: int,
    vocab_size: int,
    too_long: str,
    eos_newline: str,
    special_tokens: str,
    processes: int | None,
    progress: bool = True,
) -> Prepared:
    """Encodes rows, or opens what an earlier run made of the same rows in the same way.

    Args:
        rows: of `open_rows`; they forget what was read, which may be gigabytes.
        tokenizer: with the chat template to train on.
        cache: the folder of prepared data, local or gs://; see easylm/data/store.py.
        seq_len, too_long, eos_newline, special_tokens: as in `easylm.data.encode.Policy`.
        vocab_size: the number of ids the model has.
        processes: how many encode; None: one per core.
        progress: whether to show progress bars on stderr.

    Raises:
        InputError: as `SourceRows.read` and `easylm.data.encode.encode_rows`, or no example is
            left.
    """
    policy = Policy(seq_len, too_long, eos_newline, special_tokens)
    hashes = _tokenizer_hashes(tokenizer)

    def fill(writer: store.ArrayWriter) -> Mapping[str, Any]:
        parts = encode_in_parts(
            tokenizer,
            rows.read().rows,
            policy,
            vocab_size,
            processes=processes,
            progress=progress,
        )
        counts = _write_examples(writer, parts, rows, seq_len, tokenizer)
        return dataclasses.asdict(
            Manifest(
                sources=_describe_sources(rows),
                on_bad_row=rows.on_bad_row,
                seed=rows.seed,
                **counts,
                **hashes,
                **dataclasses.asdict(policy),
            )
        )

    name = f"{rows.key}/{store.content_key({**hashes, **dataclasses.asdict(policy)})}"
    stored = store.open_or_make(cache, name, fill, progress)
    rows.forget()
    manifest = Manifest(**stored.manifest)
    # Another run may have called the same content something else.
    for entry, (source, _) in zip(manifest.sources, rows.digests, strict=True):
        entry["path"] = source.path
    if manifest.largest_token >= vocab_size:
        where = f"{rows.field}: {', '.join(str(source) for source, _ in rows.digests)}"
        raise outside_vocabulary(manifest.largest_token, vocab_size, tokenizer, where)
    arrays = dict(stored.arrays)
    row_lengths = arrays.pop("row_lengths")
    examples = Examples(**arrays, known_fingerprint=stored.fingerprint)
    return Prepared(examples, row_lengths, manifest, stored.folder, stored.reused)


def _tokenizer_hashes(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    files = hashlib.sha256()
    for name, content in sorted(tokenizer_files(tokenizer).items()):
        files.update(name.encode() + hashlib.sha256(content).digest())
    template = str(tokenizer.chat_template).encode()  # text, or named texts
    return {
        "tokenizer": files.hexdigest(),
        "chat_template": hashlib.sha256(template).hexdigest(),
    }


def _describe_sources(rows: SourceRows) -> list[dict[str, Any]]:
    return [
        {**dataclasses.asdict(source), "sha256": sha256, **dataclasses.asdict(found)}
        for (source, sha256), found in zip(rows.digests, rows.read().found, strict=True)
    ]


def _write_examples(
    writer: store.ArrayWriter, parts, rows: SourceRows, seq_len: int, tokenizer
) -> dict[str, Any]:
    """Writes the arrays of a `Prepared`; returns the counts of a `Manifest`."""
    count = len(rows.read().rows)
    row_lengths = []
    lengths = []
    dropped: Counter[str] = Counter()
    truncated = cut_tokens = unknown = target_tokens = largest = 0
    for part in parts:
        examples = part.examples
        writer.append(
            tokens=examples.tokens, loss_mask=examples.loss_mask, row_lengths=part.row_lengths
        )
        lengths.append(examples.lengths)
        row_lengths.append(part.row_lengths)
        dropped += part.dropped
        truncated += part.truncated
        cut_tokens += part.cut_tokens
        unknown += part.unknown_tokens
        mask = examples.loss_mask
        target_tokens += int(mask.sum(dtype=np.int64) - mask[examples.offsets[:-1]].sum())
        largest = max(largest, int(examples.tokens.max(initial=0)))
    of_all, of_rows = np.concatenate(lengths), np.concatenate(row_lengths)
    total = int(of_rows.sum(dtype=np.int64))
    if unknown > _MOST_UNKNOWN * total:
        raise _knows_too_little(unknown, total, tokenizer, rows.field)
    if not len(of_all):
        raise InputError(
            f"{rows.field}: no example is left of {count:,} rows at data.seq_len={seq_len:,}; "
            "wanted at least one. Dropped: "
            + ", ".join(f"{dropped[why]:,} {why}" for why in dropped)
        )
    writer.append(offsets=np.concatenate([[0], np.cumsum(of_all)]).astype(np.int64))
    return {
        "rows": count,
        "kept": len(of_all),
        "truncated": truncated,
        "dropped": dict(dropped),
        "cut_tokens": cut_tokens,
        "dropped_tokens": total - cut_tokens - int(of_all.sum()),
        "unknown_tokens": unknown,
        "tokens": int(of_all.sum()),
        "target_tokens": target_tokens,
        **_statistics("length", of_all),
        **_statistics("row_length", of_rows),
        "largest_token": largest,
    }


def _statistics(name: str, lengths: np.ndarray) -> dict[str, float]:
    quantiles = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1])
    names = ("min", "q25", "median", "q75", "max")
    values = {f"{name}_{at}": int(value) for at, value in zip(names, quantiles, strict=True)}
    return {f"{name}_mean": float(lengths.mean()), **values}


def _knows_too_little(unknown: int, total: int, tokenizer, field: str) -> InputError:
    spelled = " or ".join(tokenizer.convert_ids_to_tokens(unknown_ids(tokenizer)))
    return InputError(
        f"data.tokenizer: {unknown / total:.1%} of the tokens of {field} are {spelled}, which "
        f"stands for text that the tokenizer does not know; wanted a tokenizer that knows this "
        f"text (at most {_MOST_UNKNOWN:.0%})"
    )
