"""Where the hosts of a run meet: the first one's parent hears all parents, and judges for all.

Parents alone talk here. A process that trains may be killed, hang or be aborted by its libraries,
and cannot be trusted to say so.
"""

import contextlib
import dataclasses
import queue
import secrets
import socket
import threading
import time
from typing import NamedTuple

from easylm.command import HOST_LOST_CODE
from easylm.hosts.wire import Wire

HEARTBEAT_SECONDS = 5.0
# Longer than that without a word, and a host is lost: its machine may have vanished.
SILENCE_SECONDS = 30.0
# So long the first host stays for the others to hear how the run ends.
FAREWELL_SECONDS = 10.0


class Verdict(NamedTuple):
    """How a run ends, on all hosts.

    Attributes:
      message: for people.
      code: exit code; None: each host's own, for all have done their part.
    """

    message: str
    code: int | None


@dataclasses.dataclass
class Host:
    """What is known of one host.

    Attributes:
      name: of the machine.
      heard: when it last said something, by this machine's monotonic clock.
      wire: to its parent; None until it comes.
      step: the last that it has finished.
      silent: seconds that its training process has said nothing to its parent.
      ended: whether its process has, as it should.
    """

    name: str
    heard: float
    wire: Wire | None = None
    step: int = 0
    silent: float = 0.0
    ended: bool = False


class _Event(NamedTuple):
    """A message of a host, or the end of its connection (None)."""

    host: int
    message: dict


class Hub:
    """Takes the connections of all parents; runs in threads of the first host's parent.

    Attributes:
      address: host:port:token, for whoever belongs here.
    """

    def __init__(self):
        self._listener = socket.create_server(("", 0))
        self._token = secrets.token_hex(16)
        self.address = f"{_own_address()}:{self._listener.getsockname()[1]}:{self._token}"
        self._events: queue.Queue[_Event] = queue.Queue()
        self._hosts: list[Host] = []
        self._expected = threading.Event()
        self._suspected: list[tuple[float, Verdict]] = []
        self._verdict: Verdict | None = None
        self._ending = ""  # what the first host says at its end
        self._open = 0
        self._counting = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def expect(self, count: int) -> None:
        """Says how many hosts there are, and begins to watch them."""
        self._hosts = [Host("", time.monotonic()) for _ in range(count)]
        self._expected.set()
        threading.Thread(target=self._watch, daemon=True).start()

    def farewell(self) -> None:
        """Waits until all others have come, heard how the run ends, and gone; or a while."""
        until = time.monotonic() + FAREWELL_SECONDS
        while time.monotonic() < until:
            if not self._open and all(host.wire is not None for host in self._hosts):
                return
            time.sleep(0.05)

    def _watch(self) -> None:
        """Judges, and says to all what came of it."""
        beat = 0.0
        verdict = None
        while verdict is None:
            with contextlib.suppress(queue.Empty):
                verdict = self._hear(*self._events.get(timeout=0.5))
            verdict = verdict or self._judge()
            if time.monotonic() - beat > HEARTBEAT_SECONDS:
                beat = time.monotonic()
                self._tell(steps=self._steps())
        self._verdict = verdict
        self._tell(verdict=verdict.message, code=verdict.code)

    def _hear(self, index: int, message: dict | None) -> Verdict | None:
        """Takes one event in; returns how the run ends, if it is clear now."""
        host = self._hosts[index]
        host.heard = time.monotonic()
        if message is None:
            return None if host.ended else self._lost(index, "its connection ended")
        host.step = message.get("step", host.step)
        host.silent = message.get("silent", 0.0)
        host.ended = host.ended or "ended" in message
        if "ended" in message and index == 0:
            self._ending = message["message"]
        if "failed" not in message:
            return None
        verdict = Verdict(f"{self._describe(index)}: {message['failed']}", message["code"])
        self._suspected.append((time.monotonic() + message["grace"], verdict))
        return None

    def _judge(self) -> Verdict | None:
        """How the run ends, if what was heard and the time that has passed make it clear."""
        now = time.monotonic()
        if self._suspected and now >= min(self._suspected)[0]:
            return self._blame(min(self._suspected)[1])
        for index, host in enumerate(self._hosts):
            if not host.ended and now - host.heard > SILENCE_SECONDS:
                silent = f"nothing was heard of it for {SILENCE_SECONDS:.0f} s"
                return self._lost(index, silent if host.wire else "it did not come")
        all_ended = all(host.ended for host in self._hosts)
        return Verdict(self._ending, None) if all_ended else None

    def _blame(self, verdict: Verdict) -> Verdict:
        """Names a host that hangs, where jax has ended others because of it."""
        silent, index = max((host.silent, index) for index, host in enumerate(self._hosts))
        if verdict.code != HOST_LOST_CODE or silent < SILENCE_SECONDS / 2:
            return verdict
        return self._lost(index, f"its process hangs, and has said nothing for {silent:.0f} s")

    def _lost(self, index: int, why: str) -> Verdict:
        message = lost_message(self._describe(index), self._hosts[index].step, why)
        return Verdict(message, HOST_LOST_CODE)

    def _describe(self, index: int) -> str:
        name = self._hosts[index].name
        return f"host {index} of {len(self._hosts)}" + (f" ({name})" if name else "")

    def _steps(self) -> dict[int, int]:
        return {index: host.step for index, host in enumerate(self._hosts)}

    def _tell(self, **message) -> None:
        for host in self._hosts:
            if host.wire is not None:
                host.wire.send(**message)

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._listen, args=[Wire(connection)], daemon=True).start()

    def _listen(self, wire: Wire) -> None:
        """Hands on what one parent says, once it has shown that it belongs here."""
        messages = iter(wire)
        hello = next(messages, {})
        if not isinstance(hello, dict) or hello.get("token") != self._token:
            wire.close()
            return
        self._expected.wait()  # another may be quicker than this host's own child
        host = self._hosts[hello["host"]]
        with self._counting:
            self._open += 1
        host.name, host.wire = hello["name"], wire
        wire.send(steps=self._steps())
        if self._verdict is not None:  # it comes too late to hear it with the others
            wire.send(verdict=self._verdict.message, code=self._verdict.code)
        for message in messages:
            self._events.put(_Event(hello["host"], message))
        with self._counting:
            self._open -= 1
        self._events.put(_Event(hello["host"], None))


def lost_message(described: str, step: int, why: str) -> str:
    """What people are told of a lost host; `step` is the last it finished, 0 for none."""
    when = f"last heard of at step {step}" if step else "before its first step"
    return (
        f"{described} was lost, {when}: {why}. All hosts stop; the same command on each goes on "
        "from the newest checkpoint"
    )


def _own_address() -> str:
    """The address of this machine that others of its network reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: this only asks by which address one would leave the machine.
            probe.connect(("192.0.2.1", 9))
        except OSError:  # there is no network
            return "127.0.0.1"
        return probe.getsockname()[0]
