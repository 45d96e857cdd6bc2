"""A hash of what files hold, whatever their names."""

from __future__ import annotations

import concurrent.futures
import hashlib

from easylm import storage

# hashlib lets go of the interpreter, so files are hashed side by side.
_THREADS = 4


def digest_files(files: list[str]) -> str:
    """SHA-256, in hex, of the contents of files in order.

    Of one local file it is what `sha256sum` prints; of several, the hash of their hashes. An object
    in a bucket is not read: its hash is that of the checksums the bucket keeps, so it differs from
    that of the same file on a disk.

    Raises:
        InputError: a file cannot be read.
    """
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        hashes = list(threads.map(_digest_file, files))
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _digest_file(path: str) -> str:
    if storage.is_bucket(path):
        return hashlib.sha256(storage.checksum(path).encode()).hexdigest()
    with storage.explained(path), storage.open_to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
