"""Prepared data: rows encoded once, kept under a key of all that decides what comes out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from easylm.data import store
from easylm.data.encode import (
    Encoded,
    Examples,
    Policy,
    encode_rows,
    outside_vocabulary,
    unknown_ids,
)
from easylm.data.manifest import Manifest, PairManifest
from easylm.data.pairs import PairPolicy, Pairs, encode_pairs
from easylm.data.parallel import encode_in_parts
from easylm.data.rows import CONVERSATIONS, Form
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

    Args:
        hashes: SHA-256 of each source's content where that is known; else they are read for it.
        sources, on_bad_row, seed, field, form: as in `open_rows`.
    Attributes:
        field: of the config that names the sources, for messages.
        digests: each source with the SHA-256 of its content.
        key: names the rows: form, contents, amounts, `on_bad_row`, and the seed where it chooses
            rows.
    """

    def __init__(
        self,
        sources: str,
        *,
        on_bad_row: str,
        seed: int,
        field: str,
        form: Form,
        hashes: Sequence[str] | None = None,
    ):
        self._sources, self.on_bad_row, self.seed = sources, on_bad_row, seed
        self._form, self.field = form, field
        self.digests = self._digests(hashes)
        self.key = store.content_key(
            {
                "version": _VERSION,
                "form": form.name,
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
            rows = read_rows(self._sources, self.on_bad_row, self.seed, self.field, self._form)
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

    def _digests(self, hashes: Sequence[str] | None = None) -> list[tuple[Source, str]]:
        sources = parse_sources(self._sources, self.field)
        return list(zip(sources, hashes or map(digest, sources), strict=True))


def open_rows(
    sources: str,
    *,
    on_bad_row: str,
    seed: int,
    cache: str,
    field: str = "data.sources",
    form: Form = CONVERSATIONS,
) -> SourceRows:
    """Looks up rows by content, and reads and checks them where they were never prepared.

    Args:
        sources: as in `easylm.data.sources.parse_sources`.
        on_bad_row: `refuse` or `skip`.
        seed: chooses the rows where a source gives an amount.
        cache: the folder of prepared data, local or gs://.
        field: of the config that names the sources, for messages.
        form: what the rows are, such as `easylm.data.pair_rows.PAIRS`.

    Raises:
        InputError: as `SourceRows.read`.
    """
    rows = SourceRows(sources, on_bad_row=on_bad_row, seed=seed, field=field, form=form)
    if not store.holds_any(cache, rows.key):
        rows.read()
    return rows


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

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 `[examples]`."""
        return self.examples.lengths


@dataclass(frozen=True)
class PreparedPairs:
    """The same of pairs; the lengths are of both sequences together."""

    pairs: Pairs
    row_lengths: np.ndarray
    manifest: PairManifest
    folder: str
    reused: bool

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair, int64 `[pairs]`."""
        return self.pairs.lengths


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
    encoding = _Encoding(policy, encode_rows, Manifest, vocab_size, processes, progress)
    stored, manifest, arrays = _open_or_encode(rows, tokenizer, cache, encoding)
    row_lengths = arrays.pop("row_lengths")
    examples = Examples(**arrays, known_fingerprint=stored.fingerprint)
    return Prepared(examples, row_lengths, manifest, stored.folder, stored.reused)


def prepare_pairs(
    rows: SourceRows,
    tokenizer: PreTrainedTokenizerFast,
    *,
    cache: str,
    seq_len: int,
    vocab_size: int,
    too_long: str,
    keep_prompt: str,
    scored_turns: str,
    eos_newline: str,
    special_tokens: str,
    processes: int | None,
    progress: bool = True,
) -> PreparedPairs:
    """The same for rows of the form `easylm.data.pair_rows.PAIRS`.

    Args:
        rows, tokenizer, cache, vocab_size, processes, progress: as in `prepare`.
        seq_len, too_long, keep_prompt, scored_turns, eos_newline, special_tokens: as in
            `easylm.data.pairs.PairPolicy`.

    Raises:
        InputError: as `SourceRows.read` and `easylm.data.pairs.encode_pairs`, or no pair is left.
    """
    policy = PairPolicy(seq_len, too_long, eos_newline, special_tokens, keep_prompt, scored_turns)
    encoding = _Encoding(policy, encode_pairs, PairManifest, vocab_size, processes, progress)
    stored, manifest, arrays = _open_or_encode(rows, tokenizer, cache, encoding)
    row_lengths, ids, margins = (arrays.pop(name) for name in ("row_lengths", "ids", "margins"))
    pairs = Pairs(Examples(**arrays), ids, margins, known_fingerprint=stored.fingerprint)
    return PreparedPairs(pairs, row_lengths, manifest, stored.folder, stored.reused)


class _Encoding(NamedTuple):
    """How rows are encoded, and what is said of the result."""

    policy: Policy
    encode: Callable[[Any, Sequence[Any], Any, int], Encoded]
    manifest: type[Manifest]
    vocab_size: int
    processes: int | None
    progress: bool

    def in_parts(self, tokenizer, rows: Sequence[Any]) -> Iterator[Encoded]:
        """What becomes of rows, a part at a time."""
        return encode_in_parts(
            tokenizer,
            rows,
            functools.partial(self.encode, policy=self.policy, vocab_size=self.vocab_size),
            processes=self.processes,
            progress=self.progress,
        )


def _open_or_encode(
    rows: SourceRows, tokenizer, cache: str, encoding: _Encoding
) -> tuple[store.Stored, Manifest, dict[str, np.ndarray]]:
    """The arrays and what is said about them, made where they are not there."""
    hashes = _tokenizer_hashes(tokenizer)
    options = dataclasses.asdict(encoding.policy)

    def fill(writer: store.ArrayWriter) -> Mapping[str, Any]:
        parts = encoding.in_parts(tokenizer, rows.read().rows)
        counts = _write(writer, parts, rows, encoding, tokenizer)
        return dataclasses.asdict(
            encoding.manifest(
                sources=_describe_sources(rows),
                on_bad_row=rows.on_bad_row,
                seed=rows.seed,
                **counts,
                **hashes,
                **options,
            )
        )

    name = f"{rows.key}/{store.content_key({**hashes, **options})}"
    stored = store.open_or_make(cache, name, fill, encoding.progress)
    rows.forget()
    manifest = encoding.manifest(**stored.manifest)
    # Another run may have called the same content something else.
    for entry, (source, _) in zip(manifest.sources, rows.digests, strict=True):
        entry["path"] = source.path
    if manifest.largest_token >= encoding.vocab_size:
        where = f"{rows.field}: {', '.join(str(source) for source, _ in rows.digests)}"
        largest = manifest.largest_token
        raise outside_vocabulary(largest, encoding.vocab_size, tokenizer, where)
    return stored, manifest, dict(stored.arrays)


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


def _write(
    writer: store.ArrayWriter,
    parts: Iterable[Encoded],
    rows: SourceRows,
    encoding: _Encoding,
    tokenizer,
) -> dict[str, Any]:
    """Writes the arrays of what was encoded; returns the counts of a `Manifest`."""
    count = len(rows.read().rows)
    example_lengths, lengths, row_lengths = [], [], []
    dropped: Counter[str] = Counter()
    truncated = cut_tokens = unknown = target_tokens = largest = 0
    for part in parts:
        examples = part.examples
        writer.append(
            tokens=examples.tokens,
            loss_mask=examples.loss_mask,
            row_lengths=part.row_lengths,
            **part.columns,
        )
        example_lengths.append(examples.lengths)
        lengths.append(part.lengths)
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
            f"{rows.field}: no {encoding.manifest.noun} is left of {count:,} rows at "
            f"data.seq_len={encoding.policy.seq_len:,}; wanted at least one. Dropped: "
            + ", ".join(f"{dropped[why]:,} {why}" for why in dropped)
        )
    ends = np.cumsum(np.concatenate(example_lengths))
    writer.append(offsets=np.concatenate([[0], ends]).astype(np.int64))
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
    values = {f"{name}_{at}": round(value) for at, value in zip(names, quantiles, strict=True)}
    return {f"{name}_mean": float(lengths.mean()), **values}


def _knows_too_little(unknown: int, total: int, tokenizer, field: str) -> InputError:
    spelled = " or ".join(tokenizer.convert_ids_to_tokens(unknown_ids(tokenizer)))
    return InputError(
        f"data.tokenizer: {unknown / total:.1%} of the tokens of {field} are {spelled}, which "
        f"stands for text that the tokenizer does not know; wanted a tokenizer that knows this "
        f"text (at most {_MOST_UNKNOWN:.0%})"
    )
