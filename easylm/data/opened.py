"""Finds out by looking what the name of a source stands for."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from typing import NamedTuple

from easylm import storage
from easylm.data.arrow_rows import read_arrow, read_parquet
from easylm.data.hub import SAVED, hub_files, is_file_name, is_hub_name, saved_files
from easylm.data.json_rows import read_json
from easylm.data.splits import split_off
from easylm.data.tfds_rows import DESCRIPTION, find_builder, read_tfds, tfds_files
from easylm.data.turns import Values
from easylm.errors import InputError

_WANTED = (
    "wanted a file of JSON Lines, a JSON array (either may be .gz) or parquet; a folder that "
    "save_to_disk or TFDS wrote; or owner/name of a dataset on the Hugging Face hub"
)


class Opened(NamedTuple):
    """A source that was found: the files that hold its rows, and the rows, not yet read."""

    files: list[str]
    values: Values


def open_path(path: str) -> Opened:
    """Finds a source of any kind; of the hub, it is downloaded where it is not yet.

    Raises:
        InputError: there is nothing of that name, or nothing that holds rows.
    """
    if path.startswith("tfds:"):
        folder, split = find_builder(path)
        return Opened(tfds_files(folder, split), read_tfds(folder, split, path))
    place, split = split_off(path)
    if storage.is_folder(place):
        return _open_folder(place, split, path)
    if storage.exists(place):
        return _open_file(place, split)
    if not is_hub_name(place):
        raise _missing(place)
    files = hub_files(place, split)
    return Opened(files, read_arrow(files, path))


def _open_folder(folder: str, split: str | None, path: str) -> Opened:
    names = storage.list_files(folder)
    if names.keys() >= DESCRIPTION:
        return Opened(tfds_files(folder, split), read_tfds(folder, split, path))
    if names.keys() & SAVED:
        files = saved_files(folder, split)
        return Opened(files, read_arrow(files, path))
    # A text file may hold rows, but in a folder it is most often a note.
    data = [name for name in names if is_file_name(name) and not name.endswith(".txt")]
    if data:
        files = ",".join(f"{folder}/{name}" for name in data[:2]) + ",..." * (len(data) > 2)
        raise InputError(f"{folder}: is a folder with files of rows; name the files: {files}")
    found = _some([*names, *(f"{name}/" for name in storage.list_folders(folder))])
    raise InputError(f"{folder}: is a folder without rows (it holds {found}); {_WANTED}")


def _open_file(path: str, split: str | None) -> Opened:
    if split:
        raise InputError(f"{path}: is a file, and has no split {split!r}; write {path}")
    size = storage.file_size(path)
    if not size:
        raise InputError(f"{path}: is empty; {_WANTED}")
    is_parquet = storage.read_range(path, 0, min(4, size)) == b"PAR1"
    return Opened([path], read_parquet(path) if is_parquet else read_json(path))


def _missing(path: str) -> InputError:
    folder, _, name = path.rpartition("/")
    folder = folder or ("/" if path.startswith("/") else ".")
    if not storage.is_folder(folder):
        hint = storage.missing_hint(path)
        return InputError(f"{path}: no such file; nor is there a folder {folder}{hint}; {_WANTED}")
    names = [*storage.list_files(folder), *storage.list_folders(folder)]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"its folder holds {_some(names)}."
    if close:
        hint = f"did you mean {os.path.join(folder, close[0])}?"
    return InputError(f"{path}: no such file; {hint} {_WANTED[0].upper()}{_WANTED[1:]}")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5) if names else "nothing"
