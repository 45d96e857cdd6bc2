"""A bucket that misbehaves: a proxy in front of the emulator of tests/bucket.py.

It stands between all clients and the emulator, which makes the URLs it answers with of the Host
header: they lead back here.
"""

import asyncio
import contextlib
import dataclasses
import os
import random
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Mapping

from tests import bucket

BUSY = (429, 500, 503)
# What a plan may name beside these statuses.
LOSE_REQUEST = "lose request"  # closes the connection; the bucket never hears of it
LOSE_ANSWER = "lose answer"  # closes it after half of the answer: what was asked is done
DELAY = "delay"  # answers late
HANG = "hang"  # never answers
DELAY_SECONDS = 0.3
MILD = {**dict.fromkeys(BUSY, 0.02), LOSE_REQUEST: 0.02, LOSE_ANSWER: 0.02, DELAY: 0.02}


@dataclasses.dataclass
class Proxy:
    """What a proxy does, and has done; a test may change `always` while it runs.

    Attributes:
        rates: fault -> probability, for each request by itself.
        random: draws the faults.
        always: a fault that all requests get from now on, or None.
        only: of requests whose method and path contain it.
        made: how often each fault was made.
        requests: (method, path) of all.
    """

    rates: Mapping[int | str, float]
    random: random.Random
    always: int | str | None = None
    only: str = ""
    made: Counter = dataclasses.field(default_factory=Counter)
    requests: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    port: int = 0

    def choose(self, method: str, path: str) -> int | str | None:
        """The fault of the next request, if any."""
        self.requests.append((method, path))
        drawn = self.random.random()
        if self.only not in f"{method} {path}":
            return None
        if self.always is not None:
            return self.always
        for fault, rate in self.rates.items():
            drawn -= rate
            if drawn < 0:
                self.made[fault] += 1
                return fault
        return None


@contextlib.contextmanager
def running_proxy(seed: int = 0, rates: Mapping[int | str, float] | None = None) -> Iterator[Proxy]:
    """Starts a proxy before the emulator that this process's gs:// paths name, and names it."""
    upstream = urllib.parse.urlparse(os.environ["STORAGE_EMULATOR_HOST"])
    proxy = Proxy(rates or {}, random.Random(seed))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ended = (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.suppress(*ended):
            while await _pass_on(proxy, upstream.port, reader, writer):
                pass
        writer.close()

    started = asyncio.start_server(serve, "localhost", 0, limit=1 << 20)
    server = asyncio.run_coroutine_threadsafe(started, loop).result()
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        with bucket.environment(proxy.port):
            yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(_stop(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _stop(server: asyncio.Server) -> None:
    server.close()
    serving = asyncio.all_tasks() - {asyncio.current_task()}
    for task in serving:
        task.cancel()
    await asyncio.gather(*serving, return_exceptions=True)


async def _pass_on(
    proxy: Proxy, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bool:
    """One request and its answer; returns whether the connection stays open for another."""
    head = await reader.readuntil(b"\r\n\r\n")
    body = await _read_body(reader, head, writer)
    method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
    fault = proxy.choose(method, path)
    if fault == HANG:
        await asyncio.Event().wait()
    if fault == LOSE_REQUEST:
        return False
    if isinstance(fault, int):
        writer.write(_error(fault))
        await writer.drain()
        return True
    if fault == DELAY:
        await asyncio.sleep(DELAY_SECONDS)
    answer = await _ask(port, head, body)
    writer.write(answer[: len(answer) // 2] if fault == LOSE_ANSWER else answer)
    await writer.drain()
    return False  # the emulator speaks HTTP/1.0


def _error(status: int) -> bytes:
    body = b'{"error": {"code": %d, "message": "the proxy says so"}}' % status
    head = b"HTTP/1.1 %d Fault\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % (status, len(body)) + body


async def _read_body(
    reader: asyncio.StreamReader, head: bytes, writer: asyncio.StreamWriter
) -> bytes:
    """The body as it was sent, chunks and all."""
    headers = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])
    }
    if headers.get(b"expect", b"").lower() == b"100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if headers.get(b"transfer-encoding", b"").lower() != b"chunked":
        return await reader.readexactly(int(headers.get(b"content-length", 0)))
    body = b""
    while not body.endswith(b"\r\n0\r\n\r\n") and body != b"0\r\n\r\n":
        size = await reader.readuntil(b"\r\n")
        body += size + await reader.readexactly(int(size, 16) + 2)
    return body


async def _ask(port: int, head: bytes, body: bytes) -> bytes:
    """The whole answer of the emulator."""
    reader, writer = await asyncio.open_connection("localhost", port)
    try:
        writer.write(head + body)
        await writer.drain()
        return await reader.read()
    finally:
        writer.close()
