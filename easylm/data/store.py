"""Arrays kept in a folder named by what they are made of: made once, memory-mapped ever after."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from easylm import storage
from easylm.command import say
from easylm.errors import InputError

# Where arrays of a bucket are kept on this machine, and what a disk is told to keep by default.
LOCAL_CACHE = "~/.cache/easylm/prepared"
_MANIFEST = "manifest.json"
_COPY_BYTES = storage.REQUEST_BYTES * storage.CONCURRENT_REQUESTS


@dataclass(frozen=True)
class Stored:
    """Arrays on this machine's disk, and what was said about them when they were made.

    Attributes:
        folder: where they are.
        arrays: by name, memory-mapped and read-only.
        manifest: what `fill` of `open_or_make` returned.
        fingerprint: SHA-256 over names, types and contents of the arrays, in hexadecimal.
        reused: whether they were there already.
    """

    folder: str
    arrays: dict[str, np.ndarray]
    manifest: dict[str, Any]
    fingerprint: str
    reused: bool


def content_key(parts: Any) -> str:
    """A name for whatever JSON can write: the same parts give the same 32 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def open_or_make(
    cache: str, name: str, fill: Callable[[ArrayWriter], Mapping[str, Any]], progress: bool = True
) -> Stored:
    """Opens the arrays called `name`, made first where they are not there.

    A folder is whole or absent: several processes may make the same one at once, and each gets a
    whole one. In a bucket the folder is mirrored below `LOCAL_CACHE`; what is made here is put into
    the bucket too.

    Args:
        cache: a folder, local or gs://.
        name: of a folder below it; may have several parts, `a/b`. Whoever asks for one name must
            make the same arrays.
        fill: appends to the arrays, and returns what is kept beside them in manifest.json; JSON.
        progress: whether to show progress bars on stderr.

    Raises:
        InputError: the disk or the bucket refuses, or a folder is damaged.
    """
    folder, remote = _places(cache, name)
    reused = True
    if not _is_whole(folder):
        if remote and _is_whole(remote):
            _download(remote, folder, progress)
        else:
            storage.check_writable(remote or folder)
            _make(folder, fill)
            reused = False
    stored = _open(folder, reused)
    if remote and not _is_whole(remote):
        _upload(folder, remote, progress)
    return stored


def holds_any(cache: str, name: str) -> bool:
    """Whether the cache holds whole arrays in a folder directly below `name`."""
    return any(
        _is_whole(f"{place}/{below}")
        for place in _places(cache, name)
        if place and storage.is_folder(place)
        for below in storage.list_folders(place)
        if not below.startswith(".")
    )


class ArrayWriter:
    """Writes arrays that grow along their first axis, as .npy files of a folder.

    Args:
        folder: an existing one, on a disk.
        files: closes the files if the arrays are given up.
    """

    def __init__(self, folder: str, files: contextlib.ExitStack):
        self._folder = folder
        self._open = files
        self._arrays: dict[str, _GrowingArray] = {}

    def append(self, **arrays: np.ndarray) -> None:
        """Adds to each array named; the first call decides on type and further axes."""
        with storage.explained(self._folder):
            for name, array in arrays.items():
                if name not in self._arrays:
                    file = storage.open_to_write(f"{self._folder}/{name}.npy")
                    self._open.enter_context(file)
                    self._arrays[name] = _GrowingArray(file, array.dtype, array.shape[1:])
                self._arrays[name].append(array)

    def close(self) -> dict[str, dict[str, Any]]:
        """Finishes the files, and describes each array: dtype, shape and SHA-256."""
        with storage.explained(self._folder):
            return {name: array.close() for name, array in self._arrays.items()}


class _GrowingArray:
    """One .npy file that is being written."""

    def __init__(self, file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]):
        self._file, self._dtype, self._shape = file, dtype, shape
        self._length = 0
        self._digest = hashlib.sha256()
        self._write_header()

    def append(self, array: np.ndarray) -> None:
        if (array.dtype, array.shape[1:]) != (self._dtype, self._shape):
            raise ValueError(
                f"{array.dtype}{array.shape[1:]} after {self._dtype}{self._shape} in one array"
            )
        data = np.ascontiguousarray(array).data
        self._digest.update(data)
        self._file.write(data)
        self._length += len(array)

    def close(self) -> dict[str, Any]:
        self._file.seek(0)
        self._write_header()  # as long as the first: numpy leaves room for any length
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        shape = [self._length, *self._shape]
        return {"dtype": self._dtype.str, "shape": shape, "sha256": self._digest.hexdigest()}

    def _write_header(self) -> None:
        header = {
            "descr": self._dtype.str,
            "fortran_order": False,
            "shape": (self._length, *self._shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


def _places(cache: str, name: str) -> tuple[str, str | None]:
    """The folder on this machine, and the one in a bucket that it mirrors, if it does."""
    if storage.is_bucket(cache):
        return os.path.expanduser(f"{LOCAL_CACHE}/{name}"), f"{cache.rstrip('/')}/{name}"
    return os.path.expanduser(os.path.join(cache, name)), None


def _is_whole(folder: str) -> bool:
    return storage.exists(f"{folder}/{storage.COMPLETE}")


def _make(folder: str, fill: Callable[[ArrayWriter], Mapping[str, Any]]) -> None:
    filled = False
    _remove_abandoned(folder)
    try:
        with (
            storage.write_folder(folder) as unfinished,
            _locked(unfinished),
            contextlib.ExitStack() as files,
        ):
            writer = ArrayWriter(unfinished, files)
            manifest = fill(writer)
            whole = {"arrays": writer.close(), **manifest}
            text = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
            storage.write_bytes(f"{unfinished}/{_MANIFEST}", text.encode())
            filled = True
    except InputError:
        # Another process may have made the same folder meanwhile: one is as good as the other.
        if not (filled and _is_whole(folder)):
            raise


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Holds a lock that ends with this process, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _remove_abandoned(folder: str) -> None:
    """Deletes what processes that were killed have written of a folder."""
    parent, name = os.path.split(folder)
    for left in glob.glob(f"{glob.escape(parent)}/.{name}.*.incomplete"):
        # One that is younger may be about to be locked.
        with contextlib.suppress(OSError):
            if time.time() - os.stat(left).st_mtime > 60:
                with _locked(left):
                    shutil.rmtree(left)


def _open(folder: str, reused: bool) -> Stored:
    try:
        manifest = json.loads(storage.read_bytes(f"{folder}/{_MANIFEST}"))
        described = manifest.pop("arrays")
        arrays = {
            name: np.load(f"{folder}/{name}.npy", mmap_mode="r").view(np.ndarray)
            for name in described
        }
        for name, array in arrays.items():
            if (array.dtype.str, list(array.shape)) != (
                described[name]["dtype"],
                described[name]["shape"],
            ):
                raise ValueError(f"{name}.npy is not what {_MANIFEST} says")
    except (InputError, OSError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder}: the prepared data is damaged ({error}); delete this folder, and it is made "
            "again"
        ) from error
    fingerprint = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    return Stored(folder, arrays, manifest, fingerprint, reused)


def _download(source: str, folder: str, progress: bool) -> None:
    files = storage.list_files(source)
    total = sum(files.values())
    say(f"copying {total / 1e9:.2f} GB of prepared data from {source} to {folder}")
    _require_room(folder, total)
    copied = False
    try:
        with storage.write_folder(folder) as unfinished, _bar("copy", total, progress) as bar:
            for name, size in files.items():
                if name != storage.COMPLETE:
                    _copy(f"{source}/{name}", f"{unfinished}/{name}", size, bar)
            copied = True
    except InputError:
        if not (copied and _is_whole(folder)):
            raise


def _upload(folder: str, target: str, progress: bool) -> None:
    """Puts a whole folder into a bucket, COMPLETE last.

    Nothing is deleted if it breaks off: another process may be writing the same objects.
    """
    files = storage.list_files(folder)
    total = sum(files.values())
    say(f"copying {total / 1e9:.2f} GB of prepared data from {folder} to {target}")
    with _bar("upload", total, progress) as bar:
        for name, size in files.items():
            if name != storage.COMPLETE:
                _copy(f"{folder}/{name}", f"{target}/{name}", size, bar)
        storage.write_bytes(f"{target}/{storage.COMPLETE}", b"")


def _copy(source: str, target: str, size: int, bar: tqdm) -> None:
    with storage.explained(target), storage.open_to_write(target) as file:
        for start in range(0, size, _COPY_BYTES):
            block = np.empty(min(_COPY_BYTES, size - start), np.uint8)
            storage.read_into(source, start, block)
            file.write(block.data)
            bar.update(len(block))


def _bar(what: str, total: int, progress: bool) -> tqdm:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not progress)


def _require_room(folder: str, size: int) -> None:
    parent = folder
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    free = shutil.disk_usage(parent).free
    if size > free:
        raise InputError(
            f"{folder}: {size / 1e9:.2f} GB of prepared data do not fit; found {free / 1e9:.2f} GB "
            "free. Make room, or link the folder to a larger disk"
        )
