"""Files of rows: JSON Lines or a JSON array, plain or gzip, local or in a bucket."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from easylm import storage
from easylm.data.rows import Conversation, Problem, normal_form
from easylm.errors import InputError

_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Source:
    """One part of `data.sources`: a file, and how much of it to take."""

    path: str
    amount: int | float | None = None  # rows, or a fraction of them; None is everything


class Row(NamedTuple):
    """A valid conversation and its place, `file:line`."""

    messages: Conversation
    where: str


@dataclass
class Rows:
    """The valid rows of some sources, in order.

    Attributes:
        rows: what was read.
        counts: rows taken of each source, by its text in `data.sources`.
        skipped: rows left out by reason; empty unless bad rows are skipped.
    """

    rows: list[Row]
    counts: dict[str, int]
    skipped: Counter[str]


def parse_sources(sources: str) -> list[Source]:
    """Reads `PATH[@count|@fraction],...`: `a.jsonl@1000,b.json.gz@0.5`.

    A fraction is written with a point, a count without. A local path that exists is taken as it
    stands, so a file name may contain `@`.

    Raises:
        InputError: nothing is named, or an amount is not positive or more than everything.
    """
    parsed = []
    for part in (os.path.expanduser(part.strip()) for part in sources.split(",")):
        if not part:
            raise InputError(f"data.sources: found {sources!r}; wanted PATH[@count|@fraction],...")
        path, at, text = part.rpartition("@")
        if not at or "/" in text or os.path.exists(part):
            parsed.append(Source(part))
            continue
        amount: int | float | None = None
        if re.fullmatch(r"\d+", text) and int(text) > 0:
            amount = int(text)
        elif re.fullmatch(r"\d*\.\d+|\d+\.\d*", text) and 0 < float(text) <= 1:
            amount = float(text)
        if not path or amount is None:
            raise InputError(
                f"data.sources: found {part!r}; wanted PATH, PATH@count with a count of at least "
                f"1, or PATH@fraction with a fraction like 0.25, at most 1.0"
            )
        parsed.append(Source(path, amount))
    return parsed


def read_rows(sources: str, on_bad_row: str = "refuse", seed: int = 0) -> Rows:
    """Reads and checks every row of every source.

    Args:
        sources: as in `parse_sources`.
        on_bad_row: `refuse` raises for all bad rows at once; `skip` leaves them out and counts
            them by reason.
        seed: chooses the rows where a source gives a count or fraction of them. Each source has
            its own random numbers, so adding one does not change the choice in another.

    Raises:
        InputError: a file is missing or unreadable, rows are bad (with the first ten and the
            totals by reason), a count exceeds the rows, or nothing is left.
    """
    if on_bad_row not in ("refuse", "skip"):
        raise InputError(f"data.on_bad_row: found {on_bad_row!r}; wanted 'refuse' or 'skip'")
    read = Rows([], {}, Counter())
    problems: list[str] = []
    total = 0
    for index, source in enumerate(parse_sources(sources)):
        valid = []
        for where, value, broken in read_values(source.path):
            total += 1
            messages, found = ([], [broken]) if broken else normal_form(value)
            if not found:
                valid.append(Row(messages, where))
                continue
            read.skipped[found[0].reason] += 1
            problems += [f"{where}: {problem}" for problem in found]
        valid = _take(valid, source, np.random.default_rng([seed, index]))
        name = source.path if source.amount is None else f"{source.path}@{source.amount}"
        read.counts[name] = read.counts.get(name, 0) + len(valid)
        read.rows += valid
    bad = read.skipped.total()
    if bad and on_bad_row == "refuse":
        shown = "\n".join(f"  {problem}" for problem in problems[:_SHOWN_PROBLEMS])
        more = len(problems) - _SHOWN_PROBLEMS
        raise InputError(
            f"{bad:,} of {total:,} rows of data.sources are bad:\n{shown}\n"
            + (f"  ... and {more:,} more problems\n" if more > 0 else "")
            + f"{_table(read.skipped)}\n"
            f"Repair them, or set data.on_bad_row=skip to leave them out."
        )
    if not read.rows:
        table = f"\n{_table(read.skipped)}" if bad else ""
        raise InputError(f"data.sources: no rows in {sources!r} ({total:,} read){table}")
    return read


def read_values(path: str) -> Iterator[tuple[str, Any, Problem | None]]:
    """Reads the JSON values of a file without looking at what they mean.

    Yields:
        `(file:line, value, None)`, or `(file:line, None, problem)` for a line that is not JSON.

    Raises:
        InputError: the file is missing or is not a text file, or a JSON array is broken: what
            follows the break could not be counted.
    """
    if storage.is_folder(path):
        raise InputError(f"{path}: is a folder; wanted a .jsonl or .json file, plain or .gz")
    if not storage.exists(path):
        raise InputError(f"{path}: no such file; wanted a .jsonl or .json file, plain or .gz")
    try:
        with _on_disk(path) as local, storage.explained(local), open(local, "rb") as file:
            start = file.read(4)
            file.seek(0)
            if start[:2] == b"\x1f\x8b":
                with gzip.open(file) as unpacked:
                    yield from _read_stream(unpacked, path)
            else:
                _refuse_other_kinds(start, path)
                yield from _read_stream(file, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: the gzip file is broken: {error}; copy it again") from error


@contextlib.contextmanager
def _on_disk(path: str) -> Iterator[str]:
    """The file itself, or a temporary copy of one in a bucket."""
    if not storage.is_bucket(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "rows")
        storage.copy_to_disk(path, local)
        yield local


def _refuse_other_kinds(start: bytes, path: str) -> None:
    wanted = "wanted JSON Lines or a JSON array in UTF-8, plain or .gz"
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path}: is UTF-16; {wanted}. `iconv -f UTF-16 -t UTF-8` converts it")
    if start == b"PAR1":
        raise InputError(f"{path}: is a parquet file; {wanted}")
    if start[:2] == b"PK":
        raise InputError(f"{path}: is a zip file; {wanted}")


def _read_stream(file, path: str) -> Iterator[tuple[str, Any, Problem | None]]:
    first = True
    for number, line in enumerate(file, 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        if first and line.lstrip().startswith(b"["):
            yield from _read_array(line + file.read(), path, number)
            return
        first = False
        yield _read_line(line, path, number)


def _read_line(line: bytes, path: str, number: int) -> tuple[str, Any, Problem | None]:
    where = f"{path}:{number}"
    try:
        value = json.loads(line.decode(), object_pairs_hook=_refuse_duplicates)
        return where, value, None
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at byte {error.start + 1}"
        return where, None, Problem("not UTF-8", "line", found, "UTF-8 text")
    except json.JSONDecodeError as error:
        found = f"{error.msg} at column {error.pos + 1}"
        return where, None, Problem("broken JSON", "line", found, "one JSON object a line")
    except _DuplicateKeyError as error:
        return where, None, _duplicate_key(error)
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        return where, None, Problem("broken JSON", "line", str(error), "one JSON object a line")


def _read_array(content: bytes, path: str, line: int) -> Iterator[tuple[str, Any, Problem | None]]:
    """Reads element by element, so that each has its line number."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise InputError(
            f"{path}:{line}: found byte 0x{content[error.start]:02x}; wanted UTF-8 text"
        ) from error
    position = counted = 0
    try:
        for position, value, problem in _elements(text):
            line += text.count("\n", counted, position)
            counted = position
            yield f"{path}:{line}", value, problem
    except json.JSONDecodeError as error:
        line += text.count("\n", counted, error.pos)
        raise InputError(
            f"{path}:{line}: the JSON array is broken: {error.msg}; "
            f"the rows after it cannot be read"
        ) from error


def _elements(text: str) -> Iterator[tuple[int, Any, Problem | None]]:
    """Yields `(position, value, problem)` of the elements of a JSON array."""
    strict = json.JSONDecoder(object_pairs_hook=_refuse_duplicates)
    position = _skip_space(text, _skip_space(text, 0) + 1)
    separator = "]" if text[position : position + 1] == "]" else ","
    if separator == "]":
        position += 1
    while separator == ",":
        start, problem = position, None
        try:
            value, position = strict.raw_decode(text, start)
        except _DuplicateKeyError as error:
            value, problem = None, _duplicate_key(error)
            _, position = json.JSONDecoder().raw_decode(text, start)
        yield start, value, problem
        position = _skip_space(text, position)
        separator = text[position : position + 1]
        if separator not in (",", "]"):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        position = _skip_space(text, position + 1)
    if text[position:].strip():
        raise json.JSONDecodeError("Extra data", text, position)


_SPACE = re.compile(r"\s*")


def _skip_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()


class _DuplicateKeyError(Exception):
    """A JSON object has the key `args[0]` twice; never leaves this module."""


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        times = Counter(key for key, _ in pairs)
        raise _DuplicateKeyError(next(key for key, count in times.items() if count > 1))
    return keys


def _duplicate_key(error: _DuplicateKeyError) -> Problem:
    found = f"key {error.args[0]!r} twice in one object"
    return Problem("duplicate key", "row", found, "every key once")


def _take(rows: list[Row], source: Source, rng: np.random.Generator) -> list[Row]:
    """Chooses the amount of rows that the source asks for, in file order."""
    if source.amount is None:
        return rows
    count = source.amount
    if isinstance(count, float):
        count = round(count * len(rows))
    if count > len(rows):
        raise InputError(
            f"data.sources: {source.path}@{source.amount}: wanted {count:,} rows; "
            f"found {len(rows):,} valid ones"
        )
    return [rows[i] for i in np.sort(rng.choice(len(rows), count, replace=False))]


def _table(counts: Counter[str]) -> str:
    return "\n".join(f"  {count:>9,}  {reason}" for reason, count in counts.most_common())
