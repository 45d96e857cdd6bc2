"""Google's buckets for fsspec, asked again for minutes where gcsfs gives up within seconds.

Whoever opens gs:// through fsspec after this module is imported gets it: this package, epath, and
with it Orbax. gcsfs has a second kind of its own, for zonal buckets and folders that can be
renamed, that asks by gRPC what kind of bucket it has; it is not used: what runs is what is tested.
"""

import asyncio
import os
import random
import time
from typing import Any

import aiohttp
import fsspec
from fsspec import asyn
from gcsfs.core import GCSFileSystem, initiate_upload
from gcsfs.retry import ChecksumError, HttpError, is_retriable
from google.auth.exceptions import GoogleAuthError, TransportError

from easylm.command import say

# A bucket that is busy, or moves, is back within minutes; a run on a pod should not die of it.
PATIENCE_SECONDS = 300.0
# Credentials may have run out this moment; wrong ones do not become right.
REFUSED_PATIENCE_SECONDS = 5.0
# Without a byte for so long, a request is asked again. aiohttp would wait for five minutes, and
# tensorstore, which writes and reads the arrays of checkpoints, forever.
SILENCE_SECONDS = 60.0
SAID_AFTER_SECONDS = 15.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0

os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", f"{SILENCE_SECONDS:.0f}")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", f"{SILENCE_SECONDS:.0f}")


class PatientBucket(GCSFileSystem):
    """gcsfs, which repeats what may succeed later until PATIENCE_SECONDS are over."""

    def __init__(self, *args: Any, **options: Any):
        # No listing is kept: other processes write, and tensorstore in this one.
        super().__init__(*args, **{**options, "use_listings_cache": False})
        self.requests_timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS
        )

    async def _request(self, method: str, path: str, *args: Any, **options: Any):
        # All that gcsfs asks for goes through here.
        started, asked_before, said, pause = time.monotonic(), False, False, _FIRST_PAUSE
        while True:
            try:
                return await _ask_once(self, method, path, *args, **options)
            except (OSError, HttpError, ChecksumError, aiohttp.ClientError, GoogleAuthError) as e:
                if asked_before and method == "DELETE" and isinstance(e, FileNotFoundError):
                    return 204, {}, None, b""  # the bucket did it, and the answer was lost
                asked_before = True
                waited = time.monotonic() - started
                if waited > _patience(e):
                    raise
                if waited > SAID_AFTER_SECONDS and not said:
                    said = True
                    say(
                        f"the bucket does not answer as it should ({describe(e)}); asking again "
                        f"for up to {PATIENCE_SECONDS / 60:.0f} minutes"
                    )
            # Not all hosts of a pod at the same moment.
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, _LONGEST_PAUSE)


class Upload:
    """An object that is being written: it is there when this is closed, and not before.

    The file of gcsfs makes an object of what it has got when an error leaves its block, or when it
    is forgotten. And where a request fails, it leaves views of its buffer to the garbage collector,
    by which Python before 3.12.7 crashes (gh-77894).

    Args:
      filesystem: of the bucket.
      path: of the object.
      block_size: bytes sent at once, a multiple of 256 KiB; a smaller object is one request.
    """

    def __init__(self, filesystem: GCSFileSystem, path: str, block_size: int):
        self._filesystem, self._path, self._block_size = filesystem, path, block_size
        self._waiting = bytearray()
        self._sent = 0
        self._session = ""

    def write(self, data: Any) -> int:
        """Adds bytes, or what has them."""
        before = len(self._waiting)
        self._waiting += data
        added = len(self._waiting) - before
        while len(self._waiting) > self._block_size:
            self._send(self._block_size, "*")
        return added

    def close(self) -> None:
        """Sends the rest."""
        if not self._session:
            self._filesystem.pipe_file(self._path, bytes(self._waiting))
            return
        total = self._sent + len(self._waiting)
        while self._waiting:
            self._send(len(self._waiting), str(total))

    def _send(self, size: int, total: str) -> None:
        # https://cloud.google.com/storage/docs/performing-resumable-uploads
        if not self._session:
            bucket, name, _ = self._filesystem.split_path(self._path)
            self._session = asyn.sync(
                self._filesystem.loop, initiate_upload, self._filesystem, bucket, name
            )
        headers, answer = self._filesystem.call(
            "PUT",
            self._session,
            headers={"Content-Range": f"bytes {self._sent}-{self._sent + size - 1}/{total}"},
            data=bytes(self._waiting[:size]),
        )
        kept = self._sent + size
        if not answer:  # which describes an object that is whole; until then there is this header
            kept = int(headers["Range"].rpartition("-")[2]) + 1 if "Range" in headers else 0
        if kept <= self._sent:
            raise OSError(f"the bucket has forgotten what was sent after byte {kept}")
        del self._waiting[: kept - self._sent]
        self._sent = kept

    def __enter__(self) -> "Upload":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Google forgets what has come of an upload that is not finished after a week.
        if kind is None:
            self.close()


# Without the repetitions of gcsfs, of which there are six.
_ask_once = GCSFileSystem._request.__wrapped__


def _patience(error: Exception) -> float:
    """How long to repeat what ended with `error`, in seconds; below 0: not at all."""
    if is_refusal(error):
        return REFUSED_PATIENCE_SECONDS if is_retriable(error) else -1
    return PATIENCE_SECONDS if may_pass(error) else -1


def is_refusal(error: Exception) -> bool:
    """Whether the credentials are missing, wrong, or not enough."""
    if isinstance(error, GoogleAuthError):
        return not may_pass(error)
    is_code = isinstance(error, HttpError) and error.code in (401, 403, "401", "403")
    return is_code or str(error).startswith("Forbidden")


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, GoogleAuthError):
        return error.retryable or isinstance(error, TransportError)
    return isinstance(error, TimeoutError) or is_retriable(error)


def describe(error: Exception) -> str:
    """The first line of what an error says, or its kind."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


for _protocol in ("gs", "gcs"):
    fsspec.register_implementation(_protocol, PatientBucket, clobber=True)
