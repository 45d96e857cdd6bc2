"""A bucket for tests: gcp-storage-emulator in memory, behind the URL that gcsfs is told."""

import contextlib
import os
import socket
from collections.abc import Iterator

import fsspec
from gcp_storage_emulator.server import create_server

BUCKET = "tests"


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
    port = free_port()
    server = create_server("localhost", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    try:
        with environment(port):
            yield f"gs://{BUCKET}"
    finally:
        server.stop()
