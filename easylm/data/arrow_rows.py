"""Rows of Arrow data: parquet files, and the Arrow files in which Hugging Face keeps datasets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from easylm import storage
from easylm.data.plain import not_text, plain_row
from easylm.data.turns import Problem, Values
from easylm.errors import InputError

if TYPE_CHECKING:
    import pyarrow

# Rows turned into Python at once; they are small beside the row group they come from.
_BATCH_ROWS = 1024


def read_parquet(path: str) -> Values:
    """Reads the rows of a parquet file, one row group in memory at a time, also from a bucket.

    `where` is `path:row N`, N from 1.

    Raises:
        InputError: the file cannot be read or is damaged, or has two columns of one name.
    """
    return _values(_parquet_batches(path), path)


def read_arrow(files: list[str], path: str) -> Values:
    """Reads the rows of Arrow files, local or in a bucket, one after the other.

    `where` is `path:row N`, N from 1 over all the files: `path` is what the user calls them.

    Raises:
        InputError: a file is missing or damaged, or has two columns of one name.
    """
    return _values((batch for file in files for batch in _arrow_batches(file)), path)


def _parquet_batches(path: str) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow
    from pyarrow import parquet

    with storage.explained(path), storage.open_to_read(path) as file:
        try:
            yield from parquet.ParquetFile(file).iter_batches(_BATCH_ROWS)
        except (pyarrow.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error


def _arrow_batches(path: str) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow

    with storage.explained(path), storage.open_to_read(path) as file:
        try:
            with pyarrow.ipc.open_stream(file) as stream:
                yield from stream
        except (pyarrow.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> InputError:
    cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return InputError(f"{path}: cannot be read ({cause}); if it is damaged or cut, copy it again")


def _values(batches: Iterator[pyarrow.RecordBatch], path: str) -> Values:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            for value, problem in _rows(batch.slice(start, _BATCH_ROWS), path):
                number += 1
                if value is not None:
                    value, problem = plain_row(value)
                yield f"{path}:row {number}", value, problem


def _rows(
    batch: pyarrow.RecordBatch, path: str
) -> Iterator[tuple[dict[str, Any] | None, Problem | None]]:
    twice = [name for name, count in Counter(batch.schema.names).items() if count > 1]
    if twice:
        raise InputError(f"{path}: found two columns {twice[0]!r}; wanted every name once")
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):
        # Some value has no Python counterpart: find the rows that hold such.
        for i in range(batch.num_rows):
            yield _row(batch, i)
        return
    for row in rows:
        yield row, None


def _row(batch: pyarrow.RecordBatch, i: int) -> tuple[dict[str, Any] | None, Problem | None]:
    row = {}
    for field, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[field] = column[i].as_py()
        except UnicodeDecodeError as error:
            return None, not_text(field, error)
        except (ValueError, OverflowError) as error:
            found = str(error).splitlines()[0]
            return None, Problem("unreadable value", field, found, "text")
    return row, None
