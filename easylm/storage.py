"""Files and folders by name, on a disk (`/data/x`) or in a bucket (`gs://bucket/x`)."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from easylm.errors import InputError, UnavailableError

if TYPE_CHECKING:
    import fsspec

COMPLETE = "COMPLETE"
# One stream from a bucket is slow, so a large read is several requests at once. Together they
# bound the memory a read needs beside its result.
REQUEST_BYTES = 32 << 20
CONCURRENT_REQUESTS = 8
# Objects are uploaded in blocks of this size.
UPLOAD_BYTES = 32 << 20
# How often tensorstore, which reads and writes the arrays of checkpoints, asks a bucket again, each
# time after twice as long up to 32 s: in all about as long as the patience of easylm/bucket.py.
TENSORSTORE_RETRIES = 10
_MISSING = "; check the spelling, and that your credentials may see the bucket"


def is_bucket(path: str) -> bool:
    """Whether `path` names something in a bucket rather than on a disk."""
    return path.startswith("gs://")


def exists(path: str) -> bool:
    """Whether there is a file or folder of that name; in a bucket, any object below it."""
    if not is_bucket(path):
        return os.path.exists(os.path.expanduser(path))
    with explained(path):
        return _bucket().exists(path)


def missing_hint(path: str) -> str:
    """Why what is looked for in a bucket may not be found, to go on a message with."""
    return _MISSING if is_bucket(path) else ""


def is_folder(path: str) -> bool:
    """Whether `path` is a folder; in a bucket, whether objects lie below it."""
    if not is_bucket(path):
        return os.path.isdir(os.path.expanduser(path))
    with explained(path):
        try:  # not by `isdir`, which takes a refusal for a no
            return _bucket().info(path)["type"] == "directory"
        except FileNotFoundError:
            return False


def file_size(path: str) -> int:
    """Size in bytes. Raises InputError where there is no such file."""
    if is_folder(path):
        raise InputError(f"{path}: found a folder; wanted a file")
    with explained(path):
        return (
            _bucket().size(path) if is_bucket(path) else os.stat(os.path.expanduser(path)).st_size
        )


def list_files(folder: str) -> dict[str, int]:
    """The files directly in `folder`, as name → bytes, sorted by name; subfolders are left out."""
    with explained(folder):
        if is_bucket(folder):
            entries = [
                entry for entry in _bucket().ls(folder, detail=True) if entry["type"] == "file"
            ]
            files = {os.path.basename(entry["name"]): entry["size"] for entry in entries}
        else:
            # Links are followed: the cache of the Hugging Face hub is made of them.
            with os.scandir(os.path.expanduser(folder)) as scan:
                files = {entry.name: entry.stat().st_size for entry in scan if entry.is_file()}
    return dict(sorted(files.items()))


def list_folders(folder: str) -> list[str]:
    """The names of the folders directly in `folder`, sorted."""
    with explained(folder):
        if is_bucket(folder):
            entries = _bucket().ls(folder, detail=True)
            names = [
                os.path.basename(e["name"].rstrip("/")) for e in entries if e["type"] != "file"
            ]
        else:
            with os.scandir(os.path.expanduser(folder)) as scan:
                names = [entry.name for entry in scan if entry.is_dir()]
    return sorted(names)


def remove_folder(folder: str) -> None:
    """Deletes a folder and all that is in it."""
    with explained(folder):
        if is_bucket(folder):
            _bucket().rm(folder, recursive=True)
        else:
            shutil.rmtree(os.path.expanduser(folder))


def read_bytes(path: str) -> bytes:
    """The whole of a small file."""
    return read_range(path, 0, file_size(path))


def read_range(path: str, start: int, end: int) -> bytes:
    """Bytes `[start, end)` of a file, with one request where it lies in a bucket.

    Raises:
      InputError: the file cannot be read, or ends before `end`.
    """
    if not is_bucket(path):
        out = np.empty(end - start, np.uint8)
        read_into(path, start, out)
        return out.tobytes()
    with explained(path):
        data = _bucket().cat_file(path, start=start, end=end)
    if len(data) != end - start:
        raise _cut(path, start + len(data), end)
    return data


def read_into(path: str, start: int, out: np.ndarray) -> None:
    """Fills `out`, uint8 [bytes] and contiguous, with the file's bytes from `start` on.

    A memory map would be as fast, but its pages count as resident memory of the process.

    Raises:
      InputError: the file cannot be read, or ends too soon.
    """
    end = start + len(out)
    with explained(path):
        if not is_bucket(path):
            read = _pread(os.path.expanduser(path), start, memoryview(out))
            if read != len(out):
                raise _cut(path, start + read, end)
            return
        window = REQUEST_BYTES * CONCURRENT_REQUESTS
        for first in range(start, end, window):
            starts = list(range(first, min(first + window, end), REQUEST_BYTES))
            ends = [min(s + REQUEST_BYTES, end) for s in starts]
            parts = _bucket().cat_ranges([path] * len(starts), starts, ends)
            for s, e, part in zip(starts, ends, parts, strict=True):
                if isinstance(part, Exception):
                    raise part
                if len(part) != e - s:
                    raise _cut(path, s + len(part), end)
                out[s - start : e - start] = np.frombuffer(part, np.uint8)


def _pread(path: str, start: int, out: memoryview) -> int:
    """Reads until `out` is full or the file ends; returns the bytes read."""
    done = 0
    file = os.open(path, os.O_RDONLY)
    try:
        # The kernel stops one call at 2 GiB.
        while done < len(out) and (count := os.preadv(file, [out[done:]], start + done)):
            done += count
    finally:
        os.close(file)
    return done


def _cut(path: str, found: int, wanted: int) -> InputError:
    return InputError(f"{path}: ends at byte {found}; wanted bytes up to {wanted}; it is truncated")


def copy_to_disk(path: str, local: str) -> None:
    """Copies a file of a bucket to the local file `local`."""
    size = file_size(path)
    window = REQUEST_BYTES * CONCURRENT_REQUESTS
    with explained(local), open(local, "wb") as file:
        for start in range(0, size, window):
            block = np.empty(min(window, size - start), np.uint8)
            read_into(path, start, block)
            file.write(block.data)


def checksum(path: str) -> str:
    """What the bucket keeps of an object's content: its size, CRC-32C and, where known, MD5."""
    with explained(path):
        about = _bucket().info(path)
    kept = {name: about.get(name) for name in ("size", "crc32c", "md5Hash")}
    return " ".join(f"{name}={value}" for name, value in kept.items() if value is not None)


def open_to_read(path: str) -> BinaryIO:
    """Opens a file for bytes at any place; one in a bucket is read ahead in blocks.

    Wrap what reads from it in `explained`.
    """
    with explained(path):
        if is_bucket(path):
            return _bucket().open(path, "rb")
        return open(os.path.expanduser(path), "rb")


def open_to_write(path: str) -> BinaryIO:
    """Opens a new file for bytes; one in a bucket appears whole, when it is closed.

    It does not appear where the `with` block of the file raises, or if it is never closed. Wrap
    what writes to it in `explained`: a full disk or a refusing bucket shows only then.
    """
    with explained(path):
        if is_bucket(path):
            from easylm.bucket import Upload

            return Upload(_bucket(), path, UPLOAD_BYTES)
        return open(os.path.expanduser(path), "wb")


def write_bytes(path: str, data: bytes) -> None:
    """Writes a small file; in a bucket, with one request: it is there whole or as it was."""
    if is_bucket(path):
        with explained(path):
            _bucket().pipe_file(path, data)
        return
    with explained(path), open_to_write(path) as file:
        file.write(data)


def check_writable(folder: str) -> None:
    """Writes and deletes an object below `folder`, if that is in a bucket: before the long work.

    Raises:
      InputError: the bucket is missing or refuses.
    """
    if is_bucket(folder):
        probe = f"{folder.rstrip('/')}/.writable-{secrets.token_hex(4)}"
        with explained(folder):
            _bucket().pipe_file(probe, b"")
            _bucket().rm_file(probe)


@contextlib.contextmanager
def write_folder(target: str) -> Iterator[str]:
    """Makes the folder `target` whole or not at all.

    Yields the folder to write into. On a disk it is a hidden one beside the target, renamed when
    the block ends. A bucket has no rename, so there it is the target itself, and what tells a whole
    folder is the empty object COMPLETE, written last (and present in both kinds). If the block
    raises, what it wrote is deleted.

    Raises:
      InputError: the target exists, or cannot be written.
    """
    target = target.rstrip("/")
    if exists(target):
        unfinished = is_bucket(target) and not exists(f"{target}/{COMPLETE}")
        why = f" (it has no {COMPLETE}, so whatever wrote it did not finish)" if unfinished else ""
        raise InputError(
            f"{target}: exists already{why}; wanted a new folder. Name another, or delete it first"
        )
    if is_bucket(target):
        yield from _write_in_place(target)
    else:
        yield from _write_and_rename(os.path.expanduser(target))


def _write_in_place(target: str) -> Iterator[str]:
    try:
        yield target
        write_bytes(f"{target}/{COMPLETE}", b"")
    except BaseException:
        # What the bucket does not let go lacks COMPLETE; the first error says more than the second.
        with contextlib.suppress(InputError, UnavailableError):
            if exists(target):
                remove_folder(target)
        raise


def _write_and_rename(target: str) -> Iterator[str]:
    parent, name = os.path.split(os.path.abspath(target))
    beside = os.path.join(parent, f".{name}.{secrets.token_hex(4)}.incomplete")
    with explained(target):
        os.makedirs(parent, exist_ok=True)
        os.mkdir(beside)
    try:
        yield beside
        write_bytes(os.path.join(beside, COMPLETE), b"")
        with explained(target):
            os.rename(beside, target)
    except BaseException:
        shutil.rmtree(beside)
        raise


def _bucket() -> "fsspec.AbstractFileSystem":
    # Only a path in a bucket needs to wait for these imports.
    import fsspec

    import easylm.bucket  # noqa: F401  (fsspec takes gs:// from there)

    # Listings are not cached: another process, or Orbax, may have written since.
    return fsspec.filesystem("gs", use_listings_cache=False)


_LOCAL_CAUSES = {
    errno.ENOENT: "no such file or folder",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "the file system is read-only",
    errno.EISDIR: "found a folder; wanted a file",
    errno.ENOTDIR: "found a file where a folder is wanted",
    errno.ENOTEMPTY: "something else made this folder meanwhile",
    errno.EEXIST: "exists already",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
}


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Turns what the file systems raise into an InputError that names `path` and the cause."""
    if not is_bucket(path):
        try:
            yield
        except OSError as error:
            if error.errno not in _LOCAL_CAUSES:
                raise
            raise InputError(f"{path}: {_LOCAL_CAUSES[error.errno]}") from error
        return
    # They come with gcsfs, and only a path in a bucket needs to wait for their import.
    from aiohttp import ClientError
    from gcsfs.retry import HttpError
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such object or bucket{_MISSING}") from error
    except (OSError, ValueError, HttpError, ClientError, GoogleAuthError) as error:
        # gcsfs raises ValueError for a request that the bucket calls malformed.
        if isinstance(error, ValueError) and not str(error).startswith(("Bad Req", "Bucket is")):
            raise
        raise _explanation(path, error) from error


def _explanation(path: str, error: Exception) -> InputError | UnavailableError:
    """What to say of an error that gcsfs raised."""
    from easylm.bucket import PATIENCE_SECONDS, describe, is_refusal, may_pass

    if may_pass(error) and not is_refusal(error):
        return UnavailableError(
            f"{path}: the bucket did not answer as it should for {PATIENCE_SECONDS / 60:.0f} "
            f"minutes (last: {describe(error)}). Usual causes: the network, an outage, a region "
            "this machine may not reach. The same command goes on from what is saved"
        )
    return InputError(
        f"{path}: the bucket refused ({describe(error)}); usual causes: no credentials (`gcloud "
        "auth application-default login`), a service account without the role Storage Object "
        "Admin on this bucket, a misspelled name that is another's, a bucket or region this "
        "machine may not reach"
    )
