"""Values of Arrow and TFDS as the plain Python that JSON gives."""

from __future__ import annotations

from typing import Any

import numpy as np

from easylm.data.turns import Problem


def plain_row(row: dict[str, Any]) -> tuple[dict[str, Any] | None, Problem | None]:
    """A row of str, int, float, bool, None, list and dict alone, or what is wrong with it.

    Bytes are read as UTF-8 text. A field that holds a struct of lists, which is how TFDS and older
    Hugging Face datasets keep a list of structs, becomes the list of structs again.
    """
    plain = {}
    for field, value in row.items():
        try:
            value = _plain(value)
        except UnicodeDecodeError as error:
            return None, not_text(field, error)
        plain[field] = _list_of_structs(value) if isinstance(value, dict) else value
    return plain, None


def _list_of_structs(value: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
    columns = value.values()
    lengths = {len(column) if isinstance(column, list) else None for column in columns}
    if len(lengths) != 1 or None in lengths:
        return value
    return [dict(zip(value, parts, strict=True)) for parts in zip(*columns, strict=True)]


def not_text(field: str, error: UnicodeDecodeError) -> Problem:
    """The problem of a field whose bytes are not UTF-8."""
    found = f"byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of a text"
    return Problem("not UTF-8", field, found, "UTF-8 text")


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
