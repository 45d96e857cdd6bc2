"""The parent of a process that trains on one of several hosts: it sees to it that all end together.

jax ends a process on the spot, with a stack trace, when the first host is gone, and collectives
wait for ever for a host that has raised an error. So each host's command starts itself once more as
a child, and does nothing but watch it. The parents of all hosts are connected (easylm/hosts/hub.py)
and end with one message and one exit code.
"""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from easylm.command import (
    FAULT_CODE,
    HOST_LOST_CODE,
    INTERRUPTED_CODE,
    PREEMPTED_CODE,
    say,
)
from easylm.hosts.hub import HEARTBEAT_SECONDS, SILENCE_SECONDS, Hub, Verdict, lost_message
from easylm.hosts.link import HUB, LINK
from easylm.hosts.wire import Wire

_CONNECT_SECONDS = 30
# An end without a reason may be the consequence of another host's; seconds to hear of that.
_GRACE = 3.0


class _Event(NamedTuple):
    """Something heard: from the "child", the "hub" or as a "signal"; None: it is gone."""

    source: str
    message: dict | None


def supervise(command: Sequence[str]) -> Verdict:
    """Runs a command as a child, one of those of a run, to its end or that of the run.

    Args:
      command: the program and its arguments; the same on all hosts.
    Returns:
      How it ended; the code is never None.
    """
    supervisor = _Supervisor()
    with supervisor.signals_noted():
        supervisor.start(command)
        try:
            return supervisor.watch()
        finally:
            supervisor.leave()


class _Supervisor:
    """One child, and the line to the first host's parent, where all meet."""

    def __init__(self):
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()  # signals may put, too
        self._hub = Hub()  # of use on the first host
        self._line: Wire | None = None  # until the hosts have found each other
        self._heard = 0.0  # when the hub last said something
        self._count, self._index = 1, 0
        self._step = self._first_step = 0  # last finished steps: this host's, the first one's
        self._result: int | None = None  # exit code that the child means to have
        self._signals = 0

    def start(self, command: Sequence[str]) -> None:
        """Starts the child."""
        ours, theirs = socket.socketpair()
        # Ctrl-C reaches every process of a terminal: this one hears it, and tells the child.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            known = {LINK: str(theirs.fileno()), HUB: self._hub.address}
            self._child = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env={**os.environ, **known}
            )
        finally:
            signal.signal(signal.SIGINT, before)
        theirs.close()
        self._to_child = Wire(ours)
        self._listen("child", self._to_child)

    def _listen(self, source: str, wire: Wire) -> None:
        """Makes events of what is heard there, in a thread."""

        def listen() -> None:
            for message in wire:
                self._events.put(_Event(source, message))
            self._events.put(_Event(source, None))

        threading.Thread(target=listen, daemon=True).start()

    @contextlib.contextmanager
    def signals_noted(self) -> Iterator[None]:
        """Within the block SIGTERM and Ctrl-C become events."""

        def note(number, frame):
            self._events.put(_Event("signal", {"number": number}))

        before = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def watch(self) -> Verdict:
        """Waits for the end of the run."""
        hear = {"child": self._hear_child, "hub": self._hear_hub, "signal": self._hear_signal}
        beat, verdict = time.monotonic(), None
        while verdict is None:
            with contextlib.suppress(queue.Empty):
                source, message = self._events.get(timeout=0.5)
                verdict = hear[source](message)
            now = time.monotonic()
            if self._line is not None and now - beat > HEARTBEAT_SECONDS:
                beat = now
                self._line.send(step=self._step)
            if verdict is None and self._line is not None and now - self._heard > SILENCE_SECONDS:
                verdict = self._first_lost(f"nothing was heard of it for {SILENCE_SECONDS:.0f} s")
        return verdict if verdict.code is not None else verdict._replace(code=self._result)

    def leave(self) -> None:
        """Ends the child, and tells the others by hanging up."""
        self._child.kill()
        self._child.wait()
        if self._line is not None:
            self._line.close()
        self._hub.farewell()

    def _hear_child(self, message: dict | None) -> Verdict | None:
        if message is None:
            return self._child_gone()
        if "joined" in message:
            self._index, self._count = message["joined"]
            return self._meet(message["hub"])
        if "step" in message:
            self._step = message["step"]
        elif "ended" in message:
            self._result = message["ended"]  # it counts when the process is gone too
        else:
            return self._report(**message)
        return None

    def _child_gone(self) -> Verdict | None:
        """The child has ended; fine if it said so before."""
        code = self._child.wait()
        if self._result is not None and code == self._result:
            return self._report(ended=code) if self._line else Verdict("", code)
        if self._signals:
            message = "told to stop before there was anything to save"
            return self._report(failed=message, code=PREEMPTED_CODE, grace=0)
        if code >= 0:
            message = f"the process ended with exit code {code}, without a word"
            return self._report(failed=message, code=code or FAULT_CODE, grace=_GRACE)
        message = f"the process was ended by {signal.Signals(-code).name} after step {self._step}"
        if code == -signal.SIGKILL:
            message = f"lost: {message}, often because memory ran out"
            return self._report(failed=message, code=HOST_LOST_CODE, grace=0)
        # When the first host's process is killed, jax aborts all others.
        lost = code == -signal.SIGABRT
        return self._report(
            failed=message, code=HOST_LOST_CODE if lost else FAULT_CODE, grace=_GRACE
        )

    def _report(self, **message) -> Verdict | None:
        """Tells the hub what became of this host; without one, that is how it ends."""
        if self._line is None:
            return Verdict(message["failed"], message["code"])
        self._line.send(**message)
        return None

    def _meet(self, address: str) -> Verdict | None:
        """Goes to the first host's parent, now that the children have found each other."""
        if self._index == 0:
            self._hub.expect(self._count)
        host, port, token = address.split(":")
        self._heard = time.monotonic()
        try:
            connection = socket.create_connection((host, int(port)), _CONNECT_SECONDS)
        except OSError as error:
            return self._first_lost(f"its parent process does not answer at {host}:{port}: {error}")
        connection.settimeout(None)
        self._line = Wire(connection)
        self._line.send(token=token, host=self._index, name=socket.gethostname())
        self._listen("hub", self._line)
        return None

    def _hear_hub(self, message: dict | None) -> Verdict | None:
        if message is None:
            return self._first_lost("its connection ended")
        self._heard = time.monotonic()
        if "verdict" in message:
            return Verdict(message["verdict"], message["code"])
        self._first_step = message["steps"]["0"]
        self._to_child.send(steps=message["steps"])
        return None

    def _first_lost(self, why: str) -> Verdict:
        message = lost_message(f"host 0 of {self._count}", self._first_step, why)
        return Verdict(message, HOST_LOST_CODE)

    def _hear_signal(self, message: dict) -> Verdict | None:
        """Tells the child to stop, at the same step as all others; the second time, at once."""
        number = message["number"]
        self._signals += 1
        if self._signals > 1:
            return Verdict("", INTERRUPTED_CODE if number == signal.SIGINT else 128 + number)
        if number == signal.SIGINT:
            say("\nsaving after this step; Ctrl-C again to stop at once")
        self._child.send_signal(signal.SIGTERM)
        return None
