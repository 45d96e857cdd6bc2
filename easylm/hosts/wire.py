"""JSON lines over a socket."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator


class Wire:
    """One end of a connection; each message is a JSON object on a line.

    Args:
      connection: is closed with it.
    """

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, **message) -> bool:
        """Sends one message; whether the other end could still be told."""
        data = (json.dumps(message) + "\n").encode()
        with self._lock, contextlib.suppress(OSError):
            self._connection.sendall(data)
            return True
        return False

    def __iter__(self) -> Iterator[dict]:
        """What the other end says, until it is gone, or says something else."""
        lines = self._connection.makefile("r", encoding="utf-8")
        with contextlib.suppress(OSError, ValueError), lines:
            for line in lines:
                if line.endswith("\n"):  # else it was cut off
                    yield json.loads(line)

    def close(self) -> None:
        """Ends the connection; the other end sees that at once."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
