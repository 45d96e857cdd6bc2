"""A bucket for tests: gcp-storage-emulator in memory, behind the URL that gcsfs is told.

What the emulator lacks of Google's storage and clients rely on is added: generations of objects and
conditions on them (Orbax's writes through tensorstore), and uploads of which parts are sent twice.
"""

import contextlib
import functools
import http.server
import os
import re
import socket
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator

import fsspec
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

BUCKET = "tests"
# Of https://cloud.google.com/storage/docs/request-preconditions: what is answered unless it holds.
_CONDITIONS = {"ifGenerationMatch": 412, "ifGenerationNotMatch": 304}


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def settings(port: int) -> dict[str, str]:
    """The environment in which gcsfs, tensorstore and Orbax take `port` for Google's storage."""
    url = f"http://localhost:{port}"
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


@contextlib.contextmanager
def environment(port: int) -> Iterator[None]:
    """Points this process's gs:// paths at `port`, and back."""
    before = dict(os.environ)
    os.environ.update(settings(port))
    _forget_connections()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        _forget_connections()


def _forget_connections() -> None:
    # fsspec keeps one object a protocol, and gcsfs reads the URL when that object is made.
    fsspec.get_filesystem_class("gs").clear_instance_cache()


@contextlib.contextmanager
def running_bucket() -> Iterator[str]:
    """Starts the emulator and yields `gs://tests`, empty."""
    storage = _Storage(use_memory_fs=True)
    create_bucket(BUCKET, storage)
    handler = functools.partial(_Handler, storage)
    with _Server(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with environment(server.server_port):
            yield f"gs://{BUCKET}"
        server.shutdown()


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients may leave
            super().handle_error(request, client_address)


class _Storage(Storage):
    """Takes parts of an upload that it has already, also after the last one, as Google does."""

    def add_to_resumable_upload(self, file_id, content, total_size=None, expected_start=None):
        if expected_start is not None:
            known = max(0, self.get_resumable_byte_count(file_id) - expected_start)
            content, expected_start = (content or b"")[known:], expected_start + known
        return super().add_to_resumable_upload(file_id, content, total_size, expected_start)

    def create_file(self, bucket_name, file_name, content, file_obj, file_id=None):
        # Told no `file_id`, it does not forget the upload.
        super().create_file(bucket_name, file_name, content, file_obj)

    def _write_config_to_file(self):
        pass  # in memory nobody reads it, and with many objects it takes long


class _Handler(RequestHandler):
    """One request at a time: the emulator's answer, if the conditions on the generation hold."""

    _turn = threading.Lock()

    def do_GET(self):
        self._answer(super().do_GET)

    def do_POST(self):
        self._answer(super().do_POST)

    def do_PUT(self):
        self._answer(super().do_PUT)

    def do_DELETE(self):
        self._answer(super().do_DELETE)

    def _answer(self, answer: Callable[[], None]) -> None:
        with self._turn:
            url = urllib.parse.urlparse(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            self._generation = self._find_generation(url.path, query)
            for name, status in _CONDITIONS.items():
                matches = query.get(name) == (self._generation or "0")
                if name in query and matches != (name == "ifGenerationMatch"):
                    self.rfile.read(int(self.headers.get("Content-Length", 0)))
                    self.send_response(status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
            answer()

    def _find_generation(self, path: str, query: dict[str, str]) -> str | None:
        """Of the object that is asked for, if there is one."""
        place = re.fullmatch(r"(?:/upload|/download)?(?:/storage/v1)?/b/([^/]+)/o(?:/(.+))?", path)
        if not place:
            return None
        name = urllib.parse.unquote(place[2] or "") or query.get("name", "")
        try:
            return self.storage.get_file_obj(place[1], name)["generation"]
        except NotFound:
            return None

    def end_headers(self):
        if self.command == "GET" and self._generation:
            self.send_header("x-goog-generation", self._generation)
        super().end_headers()
