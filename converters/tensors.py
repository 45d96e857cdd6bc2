"""What every place that tensors come from has in common, whatever its format."""

from dataclasses import dataclass
from typing import Protocol

import ml_dtypes
import numpy as np

from easylm.errors import InputError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a source, before its data is read.

    Attributes:
      shape: as `TensorSource.read` returns it.
      dtype: numpy's, or ml_dtypes' bfloat16.
      where: the file that holds it, for messages.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    where: str

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


class TensorSource(Protocol):
    """Tensors under Hugging Face's names and in its layout, read one at a time.

    Attributes:
      kind: what was found, in one line: "Hugging Face safetensors, 3 files, 13.5 GB".
      tensors: all of them by name. Their headers are checked; their data is not read yet.
      config: the Hugging Face config.json that goes with them, if there is one.
      config_path: where that came from, for messages.
      folder: where tokenizer files would lie.
    """

    kind: str
    tensors: dict[str, TensorInfo]
    config: dict | None
    config_path: str
    folder: str

    def read(self, name: str, start_row: int = 0, end_row: int | None = None) -> np.ndarray:
        """Rows `[start_row, end_row)` of axis 0; all rows by default, and for a scalar."""


def files_and_size(files: int, nbytes: float) -> str:
    """The end of `TensorSource.kind`: "3 files, 13.5 GB"."""
    units = iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while nbytes >= 1000 and unit != "TB":
        nbytes, unit = nbytes / 1000, next(units)
    return (
        f"{files} file{'s' if files != 1 else ''}, {nbytes:.{0 if unit == 'bytes' else 1}f} {unit}"
    )


def refuse(problems: list[str], where: str) -> None:
    """Raises one InputError that lists all problems (the first 20, and the count of the rest)."""
    if not problems:
        return
    if len(problems) == 1:
        raise InputError(f"{where}: {problems[0]}")
    shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN_PROBLEMS])
    hidden = len(problems) - _SHOWN_PROBLEMS
    more = f"\n  and {hidden} more" if hidden > 0 else ""
    raise InputError(f"{where}: {len(problems)} problems:{shown}{more}")


_FLOAT32 = np.dtype(np.float32)
_FLOAT64 = np.dtype(np.float64)
# Bits without the sign from which on a float is an infinity or not a number.
_NONFINITE = {
    BFLOAT16: 0x7F80,
    np.dtype(np.float16): 0x7C00,
    _FLOAT32: 0x7F800000,
    _FLOAT64: 0x7FF0000000000000,
}
# Bits without the sign from which on (dtype, rounded to dtype) is infinite: half a unit in the
# last place beyond the largest number.
_OVERFLOWS = {
    (_FLOAT32, BFLOAT16): 0x7F7F8000,
    (_FLOAT64, BFLOAT16): 0x47EFF00000000000,
    (_FLOAT64, _FLOAT32): 0x47EFFFFFF0000000,
}


def has_nonfinite(array: np.ndarray, dtype: np.dtype | None = None) -> bool:
    """Whether any element is an infinity or not a number; False for integers and booleans.

    Integer instructions see it faster than `np.isfinite` does, for bfloat16 above all. Looks at
    blocks that stay in the cache, in the order of memory, so a transposed view costs no copy.

    Args:
      array: of any dtype.
      dtype: whether any element is one when rounded to this float; its own where not given.
    """
    if array.dtype not in _NONFINITE:
        return False
    unsigned = _UNSIGNED[array.itemsize]
    limit = _OVERFLOWS.get((array.dtype, dtype), _NONFINITE[array.dtype])
    blocks = np.nditer(
        array.view(unsigned),
        ["external_loop", "buffered", "zerosize_ok"],
        order="K",
        buffersize=1 << 16,
    )
    sign = 1 << (8 * array.itemsize - 1)
    return any((block & (sign - 1)).max() >= limit for block in blocks if block.size)


_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_TILE = 128


def contiguous(array: np.ndarray) -> np.ndarray:
    """`array` in C order, copied only if it is not.

    Copies as integers, which numpy does four times as fast as bfloat16, and a transposed matrix in
    tiles that stay in the cache, which is four times as fast again.
    """
    if array.flags.c_contiguous:
        return array
    source = array.view(_UNSIGNED[array.itemsize])
    if source.ndim != 2 or source.strides[0] > source.strides[1]:
        return np.ascontiguousarray(source).view(array.dtype)
    out = np.empty(source.shape, source.dtype)
    for row in range(0, len(out), _TILE):
        for column in range(0, out.shape[1], _TILE):
            tile = np.s_[row : row + _TILE, column : column + _TILE]
            out[tile] = source[tile]
    return out.view(array.dtype)
