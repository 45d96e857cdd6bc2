"""The notice that Google Cloud gives a machine before it is taken away.

Each machine there can ask a metadata server about itself:
cloud.google.com/compute/docs/metadata/getting-live-migration-notice for the keys and values below,
cloud.google.com/compute/docs/metadata/querying-metadata for requests that wait for a change.
"""

import contextlib
import http.client
import os
import threading
import time
import urllib.parse
from collections.abc import Callable

# Key -> (the value that means the end, what it means). A machine that was never asked about
# maintenance is given no time before it; one that moves elsewhere while it runs is left alone.
_NOTICES = {
    "preempted": ("TRUE", "Google Cloud is taking this machine back (preemption)"),
    "maintenance-event": (
        "TERMINATE_ON_HOST_MAINTENANCE",
        "Google Cloud is stopping this machine for maintenance",
    ),
}
# The server answers after so long even if nothing has changed.
WAIT_SECONDS = 300
# Beyond that, for the answer to arrive.
_GRACE_SECONDS = 30
# Between requests; where there is no server, doubled each time up to the last.
FIRST_PAUSE, LAST_PAUSE = 1.0, 60.0


def watch_for_notice(tell: Callable[[str], None]) -> None:
    """Calls `tell(reason)` once, in a thread, when this machine is about to be taken away.

    Returns at once, and raises nothing. Where no metadata server answers, as outside Google
    Cloud, it is tried again now and then. GCE_METADATA_HOST or GCE_METADATA_IP (HOST[:PORT]) name
    another server, as for Google's own libraries and jax.
    """
    told = threading.Lock()

    def watch(key: str, last: str, reason: str) -> None:
        _wait_until(key, last)
        if told.acquire(blocking=False):
            tell(reason)

    for key, (last, reason) in _NOTICES.items():
        threading.Thread(
            target=watch, args=(key, last, reason), daemon=True, name=f"notice of {key}"
        ).start()


def _wait_until(key: str, wanted: str) -> None:
    """Returns when the machine's `key` has the value `wanted`."""
    etag, pause = "", FIRST_PAUSE
    while True:
        answer = None
        with contextlib.suppress(OSError, http.client.HTTPException):
            answer = _ask(key, etag)
        if answer is None:
            etag, pause = "", min(2 * pause, LAST_PAUSE)
        else:
            value, etag = answer
            if value == wanted:
                return
            pause = FIRST_PAUSE
        time.sleep(pause)


def _ask(key: str, etag: str) -> tuple[str, str] | None:
    """(value, its etag) of a key; None where the server does not know it.

    Args:
      key: below instance/.
      etag: of the value that is known: then the answer comes when it has changed. Or nothing.
    """
    default = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    server = os.environ.get("GCE_METADATA_HOST", default)
    path = f"/computeMetadata/v1/instance/{key}"
    if etag:
        wait = {"wait_for_change": "true", "last_etag": etag, "timeout_sec": WAIT_SECONDS}
        path += "?" + urllib.parse.urlencode(wait)
    # Without urllib.request: a proxy that the environment names is not for this server.
    connection = http.client.HTTPConnection(server, timeout=WAIT_SECONDS + _GRACE_SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"Metadata-Flavor": "Google"})
        response = connection.getresponse()
        value = response.read().decode("ascii", "replace").strip()
        # Something else that listens there would not say so.
        if response.status != 200 or response.headers["Metadata-Flavor"] != "Google":
            return None
        return value, response.headers["ETag"] or ""
