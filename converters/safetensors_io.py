"""Safetensors files: read by ranges of bytes, written as a stream.

The format (https://huggingface.co/docs/safetensors): 8 bytes, little-endian, with the length of a
JSON header; the header, name → {dtype, shape, data_offsets}; then the data without gaps. It is read
here rather than by the library because a share of a file in a bucket must cost only its own bytes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from easylm import storage
from easylm.converters.tensors import BFLOAT16, TensorInfo, contiguous, files_and_size, refuse
from easylm.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # what the safetensors library accepts
_WRITE_BYTES = 64 << 20


@dataclass(frozen=True)
class Span:
    """One tensor in a file: what it is, and the file's byte where its data starts."""

    info: TensorInfo
    start: int


class SafetensorsSource:
    """A Hugging Face folder with `model.safetensors`, or with shards and their index.

    `folder` is local or gs://. A `TensorSource`; all headers are read and checked at once.

    Raises:
      InputError: no such file; or the list of all that is wrong in headers, index and sizes.
    """

    def __init__(self, folder: str, config: dict | None, config_path: str):
        self.folder, self.config, self.config_path = folder, config, config_path
        files = storage.list_files(folder)
        if SINGLE in files:
            shards, index = [SINGLE], None
        else:
            index = read_index(f"{folder}/{INDEX}")
            shards = sorted(set(index.values()))
        self._spans, problems = _read_shards(folder, shards, files)
        if index is not None:
            problems += check_index(INDEX, index, self.tensors, set(files))
        refuse(problems, folder)
        size = sum(files[shard] for shard in shards)
        self.kind = f"Hugging Face safetensors, {files_and_size(len(shards), size)}"

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """What the headers say, by name."""
        return {name: span.info for name, span in self._spans.items()}

    def read(self, name: str, start_row: int = 0, end_row: int | None = None) -> np.ndarray:
        """Rows `[start_row, end_row)` of a tensor, from only their bytes; all by default."""
        span = self._spans[name]
        return read_rows(f"{self.folder}/{span.info.where}", span, start_row, end_row)


def read_rows(path: str, span: Span, start_row: int, end_row: int | None) -> np.ndarray:
    """Rows of a tensor that lies in one piece, C order and little-endian, in a file."""
    shape, dtype = span.info.shape, span.info.dtype
    if not shape:
        out = np.empty((), dtype)
        storage.read_into(path, span.start, out.reshape(1).view(np.uint8))
        return out
    start_row, end_row, _ = slice(start_row, end_row).indices(shape[0])
    out = np.empty((max(end_row - start_row, 0), *shape[1:]), dtype)
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    storage.read_into(path, span.start + start_row * row_bytes, out.reshape(-1).view(np.uint8))
    return out


def read_index(path: str) -> dict[str, str]:
    """The `weight_map` of an index file: tensor name → shard file name."""
    try:
        weight_map = json.loads(storage.read_bytes(path))["weight_map"]
        valid = all(isinstance(text, str) for item in weight_map.items() for text in item)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid or not weight_map:
        raise InputError(
            f"{path}: not an index of shards; wanted a JSON object with weight_map: "
            '{"tensor name": "shard file name"}'
        )
    return weight_map


def check_index(
    index_file: str, index: Mapping[str, str], found: Mapping[str, TensorInfo], files: set[str]
) -> list[str]:
    """What an index says that its shards, `found`, do not."""
    problems = []
    for shard in sorted(set(index.values()) - files):
        count = sum(1 for file in index.values() if file == shard)
        problems.append(f"{shard}: no such file; {index_file} wants it for {count} tensors")
    for name, shard in index.items():
        if shard in files and (name not in found or found[name].where != shard):
            place = f"it is in {found[name].where}" if name in found else "no shard has it"
            problems.append(f"{shard}: no tensor {name}, which {index_file} places there; {place}")
    problems += [
        f"{info.where}: tensor {name} is not in {index_file}"
        for name, info in found.items()
        if name not in index
    ]
    return problems


def _read_shards(
    folder: str, shards: Sequence[str], files: Mapping[str, int]
) -> tuple[dict[str, Span], list[str]]:
    """The tensors of all shards that exist, and what is wrong with them."""
    spans: dict[str, Span] = {}
    problems = []
    for shard in shards:
        if shard not in files:
            continue
        found, wrong = read_header(f"{folder}/{shard}", files[shard])
        problems += wrong
        for name, span in found.items():
            if name in spans:
                problems.append(f"{shard}: tensor {name} is in {spans[name].info.where} too")
            spans[name] = span
    return spans, problems


def read_header(path: str, size: int) -> tuple[dict[str, Span], list[str]]:
    """Reads and checks the header of one file of `size` bytes.

    Returns:
      The tensors, and all that is wrong with the file; the tensors count only if nothing is.
    """
    file = path.rpartition("/")[2]
    if size < 8:
        return {}, [f"{file}: {size} bytes; too short for a safetensors file; it is truncated"]
    length = int.from_bytes(storage.read_range(path, 0, 8), "little")
    if not 2 <= length <= _MAX_HEADER_BYTES:
        return {}, [f"{file}: not a safetensors file: its header would have {length} bytes"]
    data_start = 8 + length
    if data_start > size:
        return {}, [f"{file}: truncated in its header: {size} bytes; wanted at least {data_start}"]
    try:
        text = storage.read_range(path, 8, data_start).decode("utf-8")
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        return {}, [f"{file}: the safetensors header is not valid JSON: {error}"]
    if not isinstance(header, dict):
        return {}, [f"{file}: the safetensors header is not a JSON object"]
    header.pop("__metadata__", None)
    spans = {}
    problems = []
    for name, entry in header.items():
        problem = _wrong_entry(entry)
        if problem:
            problems.append(f"{file}: tensor {name}: {problem}")
            continue
        info = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]], file)
        spans[name] = Span(info, data_start + entry["data_offsets"][0])
    if not problems:
        problems = _wrong_layout(file, spans, data_start, size)
    return spans, problems


def _unique(pairs: list[tuple[str, object]]) -> dict:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{', '.join(twice)} twice")
    return dict(pairs)


def _wrong_entry(entry: object) -> str:
    """What is wrong with one tensor's entry in a header, or an empty string."""
    fields = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or not fields <= entry.keys():
        return f"found {entry!r}; wanted dtype, shape and data_offsets"
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        return f"dtype: found {entry['dtype']!r}; wanted one of {', '.join(DTYPES)}"
    shape, offsets = entry["shape"], entry["data_offsets"]
    for field, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or any(type(n) is not int or n < 0 for n in value):
            return f"{field}: found {value!r}; wanted a list of whole numbers"
        if len(value) > 64 or any(n >= 1 << 63 for n in value):
            found = str(value)[:40]
            return f"{field}: found {found}...; wanted at most 64 numbers of 63 bits"
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets: found {offsets}; wanted [start, end]"
    nbytes = math.prod(shape) * DTYPES[entry["dtype"]].itemsize
    if offsets[1] - offsets[0] != nbytes:
        return f"data_offsets {offsets} hold {offsets[1] - offsets[0]} bytes; {entry['dtype']} " + (
            f"{shape} wants {nbytes}"
        )
    return ""


def _wrong_layout(file: str, spans: Mapping[str, Span], data_start: int, size: int) -> list[str]:
    """Gaps and overlaps between the tensors, and data beyond the end of the file or after it."""
    problems = []
    expected = data_start
    before = "the header"
    # Where an empty tensor and another start at one byte, the empty one comes first.
    in_order = sorted(spans.items(), key=lambda item: (item[1].start, item[1].info.nbytes))
    for name, span in in_order:
        if span.start != expected:
            relation = "overlaps" if span.start < expected else "leaves a gap after"
            problems.append(
                f"{file}: tensor {name} starts at byte {span.start}, where it {relation} {before}; "
                f"wanted {expected}"
            )
        expected = span.start + span.info.nbytes
        before = name
    cut = [name for name, span in in_order if span.start + span.info.nbytes > size]
    if cut:
        more = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
        problems.append(
            f"{file}: truncated at tensor {cut[0]}{more}: the file has {size} bytes; wanted "
            f"{expected}"
        )
    elif expected < size:
        problems.append(
            f"{file}: {size - expected} bytes after the last tensor: the file has {size} bytes; "
            f"wanted {expected}"
        )
    return problems


class SafetensorsWriter:
    """Writes a model's tensors one at a time into `model.safetensors` or shards with an index.

    The shards are planned before the first byte, so nothing is kept in memory. Use it as a context
    manager inside `storage.write_folder`: it does not remove what it wrote when something fails.

    Args:
      folder: an existing folder, local or gs://.
      tensors: (name, shape, dtype) of every tensor, in the order they will be written.
      max_shard_bytes: of data in one file; a tensor larger than that has a file of its own.
      metadata: of each file, beside {"format": "pt"}, without which transformers refuses it.
    """

    def __init__(
        self,
        folder: str,
        tensors: Sequence[tuple[str, tuple[int, ...], np.dtype]],
        max_shard_bytes: float = 5e9,
        metadata: Mapping[str, str] | None = None,
    ):
        self._folder = folder
        self._metadata = {"format": "pt", **(metadata or {})}
        self._shards = plan_shards(tensors, max_shard_bytes)
        self._waiting = [
            (shard, name, info)
            for shard, content in self._shards.items()
            for name, info in content.items()
        ]
        if len(self._waiting) != len(tensors):
            raise ValueError("a tensor is planned twice")
        self._waiting.reverse()
        self._file: BinaryIO | None = None
        self._open_shard = ""

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes the next tensor of the plan; any strides, no full copy."""
        shard, planned, info = self._waiting.pop()
        if (name, array.shape, array.dtype) != (planned, info.shape, info.dtype):
            raise ValueError(
                f"wrote {name} {array.shape} {array.dtype}; the plan says {planned} {info.shape} "
                f"{info.dtype}"
            )
        with storage.explained(f"{self._folder}/{shard}"):
            if shard != self._open_shard:
                self._close_file()
                self._file = storage.open_to_write(f"{self._folder}/{shard}")
                self._open_shard = shard
                self._file.write(header_bytes(self._shards[shard], self._metadata))
            for block in _blocks(array):
                self._file.write(contiguous(block).reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Finishes the last file and writes the index, if there are several."""
        if self._waiting:
            missing = [name for _, name, _ in reversed(self._waiting)]
            raise ValueError(f"{len(missing)} planned tensors were not written: {missing[:5]}")
        with storage.explained(self._folder):
            self._close_file()
        if len(self._shards) > 1:
            content = {
                "metadata": {"total_size": sum(_size(shard) for shard in self._shards.values())},
                "weight_map": {
                    name: shard for shard, names in self._shards.items() for name in sorted(names)
                },
            }
            text = json.dumps(content, indent=2) + "\n"
            storage.write_bytes(f"{self._folder}/{INDEX}", text.encode())

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        with storage.explained(self._folder):
            self._close_file()


def plan_shards(
    tensors: Sequence[tuple[str, tuple[int, ...], np.dtype]], max_shard_bytes: float
) -> dict[str, dict[str, TensorInfo]]:
    """Which file holds which tensors: a new one begins where the next tensor does not fit."""
    shards: list[dict[str, TensorInfo]] = [{}]
    for name, shape, dtype in tensors:
        info = TensorInfo(tuple(shape), np.dtype(dtype), "")
        if shards[-1] and _size(shards[-1]) + info.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = info
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


def header_bytes(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The header of a file with these tensors in this order, padded so the data starts aligned."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, info in tensors.items():
        start, end = end, end + info.nbytes
        header[name] = {
            "dtype": _CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _size(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(info.nbytes for info in tensors.values())


def _blocks(array: np.ndarray) -> list[np.ndarray]:
    """Views of consecutive rows, each small enough to copy when it is not contiguous."""
    if array.ndim == 0 or array.size == 0 or array.flags.c_contiguous:
        return [array]
    rows = max(1, _WRITE_BYTES * len(array) // array.nbytes)
    return [array[start : start + rows] for start in range(0, len(array), rows)]
