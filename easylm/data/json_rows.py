"""Rows of JSON: one value a line or one array, in UTF-8, plain or gzip."""

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
from typing import Any

from easylm import storage
from easylm.data.turns import Problem, Values
from easylm.errors import InputError

_WANTED = "wanted JSON Lines or a JSON array in UTF-8, plain or .gz, or a parquet file"
# What a ValueError of the decoder means where the syntax is fine.
_LONG_NUMBER = "a number of thousands of digits"
_OTHER_KINDS = {
    b"PK": ("a zip file", "`unzip` unpacks it"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "`zstd -d` unpacks it"),
    b"BZh": ("a bzip2 file", "`bunzip2` unpacks it"),
    b"\xfd7zXZ": ("an xz file", "`unxz` unpacks it"),
    b"PAR1": ("a parquet file inside a .gz", "`gunzip` unpacks it"),
    b"ARROW1": ("an Arrow file", "datasets writes parquet by to_parquet"),
    b"\xff\xff\xff\xff": ("an Arrow stream", "Give the folder that save_to_disk wrote"),
}


def read_json(path: str) -> Values:
    """Reads the values of a file without looking at what they mean.

    `where` is `path:line`; in an array, the line where the element starts.

    Raises:
        InputError: the file cannot be read or is of another kind, or a JSON array is broken: what
            follows the break could not be counted.
    """
    try:
        with _on_disk(path) as local, storage.explained(local), open(local, "rb") as raw:
            packed = raw.peek(2).startswith(b"\x1f\x8b")
            with gzip.open(raw) if packed else contextlib.nullcontext(raw) as file:
                _refuse_other_kinds(file.peek(8)[:8], path)
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
    if not start:
        raise InputError(f"{path}: is empty; {_WANTED}")
    for magic, (kind, advice) in _OTHER_KINDS.items():
        if start.startswith(magic):
            raise InputError(f"{path}: is {kind}; {_WANTED}. {advice}")
    encoding = json.detect_encoding(start).upper()
    if not encoding.startswith("UTF-8"):
        name = encoding[:6]
        raise InputError(f"{path}: is {name}; {_WANTED}. `iconv -f {name} -t UTF-8` converts it")


def _read_stream(file, path: str) -> Values:
    first = True
    for number, line in enumerate(file, 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        if first and line.lstrip().startswith(b"["):
            yield from _read_array(line + file.read(), path, number)
            return
        if first and line.strip() == b"{":
            raise InputError(
                f"{path}:{number}: is an object over several lines; {_WANTED}. `jq -c .` writes "
                "each object in one line, `jq -c '.FIELD[]'` the objects of the list FIELD"
            )
        first = False
        yield _read_line(line, path, number)


def _read_line(line: bytes, path: str, number: int) -> tuple[str, Any, Problem | None]:
    where = f"{path}:{number}"
    try:
        return where, json.loads(line.decode(), object_pairs_hook=_refuse_duplicates), None
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at byte {error.start + 1}"
        return where, None, Problem("not UTF-8", "line", found, "UTF-8 text")
    except json.JSONDecodeError as error:
        found = f"{error.msg} at column {error.pos + 1}"
    except _DuplicateKeyError as error:
        return where, None, _duplicate_key(error)
    except ValueError:
        found = _LONG_NUMBER
    except RecursionError:
        found = "brackets nested too deeply"
    return where, None, Problem("broken JSON", "line", found, "one JSON object a line")


def _read_array(content: bytes, path: str, line: int) -> Values:
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
    position = _skip_space(text, _skip_space(text, 0) + 1)
    separator = "]" if text[position : position + 1] == "]" else ","
    if separator == "]":
        position += 1
    while separator == ",":
        start = position
        position, value, problem = _element(text, start)
        yield start, value, problem
        position = _skip_space(text, position)
        separator = text[position : position + 1]
        if separator not in (",", "]"):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        position = _skip_space(text, position + 1)
    if text[position:].strip():
        raise json.JSONDecodeError("Extra data", text, position)


def _element(text: str, start: int) -> tuple[int, Any, Problem | None]:
    """The end, value and problem of the element that begins at `start`."""
    try:
        value, end = _STRICT.raw_decode(text, start)
        return end, value, None
    except json.JSONDecodeError:
        raise
    except _DuplicateKeyError as error:
        problem = _duplicate_key(error)
    except ValueError:
        problem = Problem("broken JSON", "row", _LONG_NUMBER, "text fields")
    except RecursionError as error:
        raise json.JSONDecodeError("brackets nested too deeply", text, start) from error
    # Read once more without looking, for the place where it ends.
    _, end = _LENIENT.raw_decode(text, start)
    return end, None, problem


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


_STRICT = json.JSONDecoder(object_pairs_hook=_refuse_duplicates)
_LENIENT = json.JSONDecoder(parse_int=str)


def _duplicate_key(error: _DuplicateKeyError) -> Problem:
    found = f"key {error.args[0]!r} twice in one object"
    return Problem("duplicate key", "row", found, "every key once")
