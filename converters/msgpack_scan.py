"""Finds the arrays in flax's msgpack files without loading them.

The msgpack library reads one object whole into memory, and at most 2 or 4 GiB of it. Here only the
heads of objects are read, so a file of any size is indexed with little memory, and rows of its
arrays can be read later. Format: https://github.com/msgpack/msgpack/blob/master/spec.md.
"""

import struct
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes  # noqa: F401 (makes "bfloat16" a name that numpy knows)
import numpy as np

from easylm import storage
from easylm.errors import InputError

_WINDOW = 1 << 16  # bytes fetched at once: the heads of a few records
_MAX_TEXT = 1 << 12
_MAX_DEPTH = 64
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = dict(zip(range(0xCA, 0xD4), (">f", ">d", ">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"),
                    strict=True))  # fmt: skip
# First byte → what follows, and in how many bytes its length stands.
_SIZED = {
    0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4),
    0xC7: ("ext", 1), 0xC8: ("ext", 2), 0xC9: ("ext", 4),
    0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4),
    0xDC: ("array", 2), 0xDD: ("array", 4),
    0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
_CHUNKED = "__msgpack_chunked_array__"
_NDARRAY, _NUMPY_SCALAR = 1, 3  # flax's extension codes; 2 is a complex number
_DTYPES = ("bfloat16", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8",
           "uint16", "uint32", "uint64", "bool")  # fmt: skip


@dataclass(frozen=True)
class Leaf:
    """An array in the file: C order, little-endian, in pieces of `(start byte, bytes)`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[tuple[int, int], ...]

    def read(self, path: str, start_row: int = 0, end_row: int | None = None) -> np.ndarray:
        """Rows `[start_row, end_row)` of axis 0, from only their bytes; all of a scalar."""
        rows, row_shape = (self.shape[0], self.shape[1:]) if self.shape else (1, ())
        start_row, end_row, _ = slice(start_row, end_row).indices(rows)
        count = max(end_row - start_row, 0)
        row_bytes = prod(row_shape) * self.dtype.itemsize
        out = np.empty(count * row_bytes, np.uint8)
        # Where the wanted bytes begin, counted from the beginning of each piece in turn.
        first = start_row * row_bytes
        done = 0
        for start, nbytes in self.pieces:
            skipped = min(max(first, 0), nbytes)
            part = out[done : done + nbytes - skipped]
            storage.read_into(path, start + skipped, part)
            done += len(part)
            first -= nbytes
        return out.view(self.dtype).reshape((count, *row_shape) if self.shape else ())


class _Cursor:
    """A place in a file; reads little by little, in windows.

    `take` raises EOFError where the file ends too soon.
    """

    def __init__(self, path: str):
        self.path = path
        self.size = storage.file_size(path)
        self.position = 0
        self._window = b""
        self._window_start = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes, few."""
        start = self.position
        self.skip(count)
        at = start - self._window_start
        if at < 0 or at + count > len(self._window):
            self._window_start, at = start, 0
            end = min(start + max(count, _WINDOW), self.size)
            self._window = storage.read_range(self.path, start, end)
        return self._window[at : at + count]

    def skip(self, count: int) -> None:
        """Passes over `count` bytes, which must be there."""
        if self.position + count > self.size:
            raise EOFError(f"wanted bytes up to {self.position + count}")
        self.position += count

    def wrong(self, found: str, wanted: str) -> InputError:
        return InputError(
            f"{self.path}: near byte {self.position}: found {found}; wanted {wanted}; the file is "
            "damaged, or not written by EasyLM or flax"
        )


def is_stream(head: bytes) -> bool:
    """Whether a file that begins so is a stream of `[key, value]` records, the key an array."""
    return head[:1] == b"\x92" and len(head) > 1 and (0x91 <= head[1] <= 0x9F or head[1] == 0xDC)


def is_document(head: bytes) -> bool:
    """Whether a file that begins so is one msgpack map with text keys, or the beginning of one."""
    if head[:1] == b"" or not (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)):
        return False
    key = head[{0xDE: 3, 0xDF: 5}.get(head[0], 1) :]
    return key == b"" or 0xA1 <= key[0] <= 0xBF or key[0] == 0xD9


def scan_stream(path: str) -> tuple[dict[tuple[str, ...], Any], str]:
    """Indexes a stream of `[key, value]` records, the value a msgpack document in a bin.

    Returns:
      Key → `Leaf` (or a plain value, as for a step), and where the file is cut inside a record;
      an empty string if it is not.
    Raises:
      InputError: the bytes are no such stream, or hold a key twice.
    """
    cursor = _Cursor(path)
    found: dict[tuple[str, ...], Any] = {}
    while cursor.position < cursor.size:
        start = cursor.position
        try:
            key, value = _record(cursor)
        except EOFError as error:
            return found, (
                f"cut inside the record that begins at byte {start}: {error}; the file has "
                f"{cursor.size}"
            )
        if key in found:
            raise cursor.wrong(f"{'/'.join(key)} a second time", "every key once")
        found[key] = value
    return found, ""


def scan_document(path: str) -> tuple[dict[tuple[str, ...], Any], str]:
    """Indexes one msgpack document of nested maps; returns what `scan_stream` does."""
    cursor = _Cursor(path)
    found: dict[tuple[str, ...], Any] = {}
    try:
        _value(cursor, (), found)
    except EOFError as error:
        return found, f"cut: {error}; the file has {cursor.size}"
    if cursor.position != cursor.size:
        raise cursor.wrong("more bytes after the document", f"a file of {cursor.position} bytes")
    return found, ""


def _record(cursor: _Cursor) -> tuple[tuple[str, ...], Any]:
    _expect(cursor, "array", 2)
    kind, length = _token(cursor)
    if kind != "array" or not 1 <= length <= _MAX_DEPTH:
        raise cursor.wrong(f"{kind} {length!r}", "a record's key, an array of names")
    key = tuple(_text(cursor) for _ in range(length))
    size = _expect(cursor, "bin")
    end = cursor.position + size
    if end > cursor.size:
        raise EOFError(f"{'/'.join(key)} wants bytes up to {end}")
    inside: dict[tuple[str, ...], Any] = {}
    _value(cursor, (), inside)
    if cursor.position != end or set(inside) != {()}:
        raise cursor.wrong(f"a value of {'/'.join(key)} that is not one array", "one array")
    return key, inside[()]


def _value(cursor: _Cursor, key: tuple[str, ...], found: dict[tuple[str, ...], Any]) -> None:
    """Reads one value and adds its leaves to `found`, under `key` and the names below it."""
    if len(key) > _MAX_DEPTH:
        raise cursor.wrong(f"more than {_MAX_DEPTH} levels", "a model's nested maps")
    kind, value = _token(cursor)
    if kind == "map":
        for _ in range(value):
            _value(cursor, (*key, _text(cursor)), found)
        if (*key, _CHUNKED) in found:
            found[key] = _join_chunks(cursor, key, found)
        return
    if key in found:
        raise cursor.wrong(f"{'/'.join(key)} a second time", "every key once")
    if kind == "ext":
        found[key] = _array(cursor, *value)
    elif kind == "scalar":
        found[key] = value
    else:
        raise cursor.wrong(f"{kind} at {'/'.join(key) or 'the top'}", "a map, an array or a number")


def _join_chunks(cursor: _Cursor, key: tuple[str, ...], found: dict[tuple[str, ...], Any]) -> Leaf:
    """Takes the parts of a chunked array out of `found`; flax makes these of arrays over 1 GiB."""
    parts = {place: found.pop(place) for place in list(found) if place[: len(key)] == key}
    del parts[(*key, _CHUNKED)]
    shape, chunks = {}, {}
    for place, part in parts.items():
        name, index = place[len(key) : len(key) + 1], place[len(key) + 1 :]
        belongs = len(index) == 1 and index[0].isdecimal()
        if belongs and name == ("shape",) and type(part) is int:
            shape[int(index[0])] = part
        elif belongs and name == ("chunks",) and isinstance(part, Leaf):
            chunks[int(index[0])] = part
        else:
            raise cursor.wrong("/".join(place), "shape and chunks of a chunked array")
    leaves = [chunks[index] for index in sorted(chunks)]
    leaf = Leaf(
        tuple(shape[index] for index in sorted(shape)),
        leaves[0].dtype if leaves else np.dtype(np.uint8),
        tuple(piece for leaf in leaves for piece in leaf.pieces),
    )
    nbytes = prod(leaf.shape) * leaf.dtype.itemsize
    held = sum(size for _, size in leaf.pieces)
    if len({leaf.dtype for leaf in leaves}) != 1 or sorted(chunks) != list(range(len(chunks))):
        raise cursor.wrong(
            f"chunks {sorted(chunks)} of {'/'.join(key)}", "all chunks, of one dtype"
        )
    if held != nbytes:
        raise cursor.wrong(f"{held} bytes in the chunks of {'/'.join(key)}", f"{nbytes} bytes")
    return leaf


def _array(cursor: _Cursor, size: int, code: int) -> Leaf:
    """Reads the payload of flax's extension, `[shape, dtype name, bytes]`, and skips the bytes."""
    if code not in (_NDARRAY, _NUMPY_SCALAR):
        raise cursor.wrong(f"msgpack extension {code}", f"{_NDARRAY} or {_NUMPY_SCALAR}, an array")
    end = cursor.position + size
    if end > cursor.size:
        raise EOFError(f"an array wants bytes up to {end}")
    _expect(cursor, "array", 3)
    shape = tuple(_expect(cursor, "scalar") for _ in range(_expect(cursor, "array")))
    if any(type(length) is not int or length < 0 for length in shape):
        raise cursor.wrong(f"shape {shape}", "whole numbers")
    name = _text(cursor)
    if name not in _DTYPES:
        raise cursor.wrong(f"dtype {name!r}", f"one of {', '.join(_DTYPES)}")
    dtype = np.dtype(name)
    nbytes = _expect(cursor, "bin")
    start = cursor.position
    if nbytes != prod(shape) * dtype.itemsize or start + nbytes != end:
        raise cursor.wrong(f"{nbytes} bytes for {name} {list(shape)}", "as many as its shape says")
    cursor.skip(nbytes)
    return Leaf(shape, dtype, ((start, nbytes),))


def _expect(cursor: _Cursor, kind: str, value: Any = None) -> Any:
    """The value of the next token, which must be of that kind (and that value)."""
    found, content = _token(cursor)
    if found != kind or value not in (None, content):
        wanted = kind if value is None else f"{kind} of {value}"
        raise cursor.wrong(f"{found} {content!r}", wanted)
    return content


def _text(cursor: _Cursor) -> str:
    return _expect(cursor, "str")


def _token(cursor: _Cursor) -> tuple[str, Any]:
    """The next token: its kind, and its length, (length, extension code), text or number."""
    first = cursor.take(1)[0]
    if first <= 0x7F or first >= 0xE0:
        return "scalar", first if first <= 0x7F else first - 256
    if first <= 0x8F:
        return "map", first & 0x0F
    if first <= 0x9F:
        return "array", first & 0x0F
    if first <= 0xBF:
        return _sized(cursor, "str", first & 0x1F)
    if first in _CONSTANTS:
        return "scalar", _CONSTANTS[first]
    if first in _NUMBERS:
        packed = _NUMBERS[first]
        return "scalar", struct.unpack(packed, cursor.take(struct.calcsize(packed)))[0]
    if 0xD4 <= first <= 0xD8:
        return _sized(cursor, "ext", 1 << (first - 0xD4))
    if first not in _SIZED:
        raise cursor.wrong(f"byte {first:#04x}", "a msgpack object")
    kind, width = _SIZED[first]
    return _sized(cursor, kind, int.from_bytes(cursor.take(width), "big"))


def _sized(cursor: _Cursor, kind: str, length: int) -> tuple[str, Any]:
    if kind == "ext":
        return kind, (length, int.from_bytes(cursor.take(1), "big", signed=True))
    if kind != "str":
        return kind, length
    if length > _MAX_TEXT:
        raise cursor.wrong(f"a text of {length} bytes", f"a name of at most {_MAX_TEXT}")
    try:
        return kind, cursor.take(length).decode("utf-8")
    except UnicodeDecodeError:
        raise cursor.wrong("text that is not UTF-8", "a name") from None
