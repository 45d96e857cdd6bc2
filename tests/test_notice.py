"""The notice of Google Cloud, from a server on this machine that answers as its own does."""

import contextlib
import http.server
import json
import os
import queue
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest

from tests.bucket import free_port

PROGRAM = """
import sys, time
from easylm.hosts import notice
notice.FIRST_PAUSE = 0.2
print("watching", "jax" in sys.modules, flush=True)
notice.watch_for_notice(lambda reason: print(reason, flush=True))
sys.stdin.read()
"""


class MetadataServer(http.server.ThreadingHTTPServer):
    """Values by key, answered at once, or when they have changed."""

    def __init__(self, port=0):
        self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.changed = threading.Condition()
        self.asked = []
        super().__init__(("localhost", port), Handler)

    def set(self, key, value):
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def wait_until_asked(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.asked) >= count, timeout=30)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        folder, _, key = url.path.rpartition("/")
        server = self.server
        with server.changed:
            server.asked.append((key, query))
            server.changed.notify_all()
            known = folder == "/computeMetadata/v1/instance" and key in server.values
            if known and query.get("wait_for_change") == "true":
                server.changed.wait_for(
                    lambda: server.values[key] != query["last_etag"],
                    timeout=float(query["timeout_sec"]),
                )
            value = server.values[key] if known else ""
        allowed = self.headers["Metadata-Flavor"] == "Google"
        self.send_response(200 if known and allowed else 404 if allowed else 403)
        self.send_header("Metadata-Flavor", "Google")
        self.send_header("ETag", value)
        self.end_headers()
        self.wfile.write(value.encode())

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(port=0):
    server = MetadataServer(port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def watcher(port, variable="GCE_METADATA_HOST"):
    """A process that watches; yields the lines it prints, which must be all read."""
    environment = {**os.environ, variable: f"localhost:{port}", "http_proxy": "http://nowhere:1"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    lines = queue.Queue()
    reader = threading.Thread(target=lambda: [lines.put(line) for line in process.stdout])
    reader.start()
    try:
        assert lines.get(timeout=30) == "watching False\n"
        yield lines
    finally:
        process.stdin.close()
        assert process.wait(timeout=30) == 0
        reader.join()
        process.stdout.close()
    assert lines.empty()


@pytest.mark.parametrize(
    "key, value, variable, reason",
    [
        (
            "preempted",
            "TRUE",
            "GCE_METADATA_HOST",
            "Google Cloud is taking this machine back (preemption)",
        ),
        (
            "maintenance-event",
            "TERMINATE_ON_HOST_MAINTENANCE",
            "GCE_METADATA_IP",
            "Google Cloud is stopping this machine for maintenance",
        ),
    ],
)
def test_a_notice_is_told_at_once_and_once(key, value, variable, reason):
    with serving() as server, watcher(server.server_port, variable) as lines:
        server.wait_until_asked(4)  # both keys, and both to wait for a change
        server.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
        server.wait_until_asked(5)
        started = time.monotonic()
        server.set(key, value)
        assert lines.get(timeout=30) == f"{reason}\n"
        assert time.monotonic() - started < 5
        for both in (("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")):
            server.set(*both)
        time.sleep(0.7)  # a second line would be found at the end
    assert json.dumps(server.asked).count("wait_for_change") == len(server.asked) - 2


def test_a_machine_that_is_already_told_is_told_at_the_start():
    with serving() as server:
        server.set("preempted", "TRUE")
        with watcher(server.server_port) as lines:
            assert "preemption" in lines.get(timeout=30)


def test_a_server_that_comes_late_is_found():
    port = free_port()
    with watcher(port) as lines:
        time.sleep(0.5)
        with serving(port) as server:
            server.set("preempted", "TRUE")
            assert "preemption" in lines.get(timeout=30)


def test_other_machines_are_left_alone_and_asked_less_and_less():
    with serving() as server:
        server.values.clear()  # as where the keys are not known
        with watcher(server.server_port):
            server.wait_until_asked(6)
            started = time.monotonic()
            server.wait_until_asked(8)
            assert time.monotonic() - started > 1.2  # at first they are 0.4 apart
