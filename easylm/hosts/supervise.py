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
    wrap,
)
from easylm.hosts.flags import has_tpu
from easylm.hosts.hub import HEARTBEAT_SECONDS, SILENCE_SECONDS, Hub, Verdict, lost_message
from easylm.hosts.link import HUB, LINK
from easylm.hosts.notice import watch_for_notice
from easylm.hosts.wire import Wire

# All hosts are told to start at about the same time, but not by one clock.
JOIN_SECONDS = 300
_CONNECT_SECONDS = 30
# An end without a reason may be the consequence of another host's; seconds to hear of that.
_GRACE = 3.0


class _Event(NamedTuple):
    """Something heard: from the "child", the "hub", as a "signal" or "notice"; None: it is gone."""

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
        self._child_heard = time.monotonic()
        self._joining: tuple[float, str] | None = None  # until when the child may, and where
        self._count, self._index = 1, 0
        self._step = self._first_step = 0  # last finished steps: this host's, the first one's
        self._result: dict | None = None  # what the child said when it was done
        self._signals = 0
        self._is_told = False  # the child, to stop
        self._said = ""  # why the child will end, where that was said at once

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
        if has_tpu():
            watch_for_notice(lambda why: self._events.put(_Event("notice", {"reason": why})))

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
        hear = {
            "child": self._hear_child,
            "hub": self._hear_hub,
            "signal": self._hear_signal,
            "notice": self._hear_notice,
        }
        beat, verdict = time.monotonic(), None
        while verdict is None:
            with contextlib.suppress(queue.Empty):
                source, message = self._events.get(timeout=0.5)
                verdict = hear[source](message)
            if self._line is not None and time.monotonic() - beat > HEARTBEAT_SECONDS:
                beat = time.monotonic()
                self._line.send(step=self._step, silent=beat - self._child_heard)
            verdict = verdict or self._waited_too_long()
        if self._said and verdict.message.endswith(self._said):
            verdict = verdict._replace(message="")
        if verdict.message and self._step:
            verdict = verdict._replace(message=f"\n{verdict.message}")  # there is a progress bar
        return verdict if verdict.code is not None else verdict._replace(code=self._result["ended"])

    def _waited_too_long(self) -> Verdict | None:
        now = time.monotonic()
        if self._joining is not None and now > self._joining[0]:
            message = (
                f"some hosts did not come to {self._joining[1]}, within {JOIN_SECONDS} s; wanted "
                "the same command on every host, and machines that reach each other"
            )
            return Verdict(message, HOST_LOST_CODE)
        if self._line is not None and now - self._heard > SILENCE_SECONDS:
            return self._first_lost(f"nothing was heard of it for {SILENCE_SECONDS:.0f} s")
        return None

    def leave(self) -> None:
        """Ends the child, and tells the others by hanging up."""
        self._child.kill()
        self._child.wait()
        if self._line is not None:
            self._line.close()
        self._hub.farewell()

    def _hear_child(self, message: dict | None) -> Verdict | None:
        self._child_heard = time.monotonic()
        if message is None:
            return self._child_gone()
        if "joining" in message:
            say(f"meeting the other hosts at {message['joining']}")
            self._joining = time.monotonic() + JOIN_SECONDS, message["joining"]
        elif "reason" in message:
            self._said = message["reason"]
            say(wrap(self._said))
        elif "alone" in message:
            self._joining = None
        elif "joined" in message:
            self._joining = None
            self._index, self._count = message["joined"]
            return self._meet(message["hub"])
        elif "step" in message:
            self._step = message["step"]
        elif "ended" in message:
            self._result = message  # it counts when the process is gone too
        elif "failed" in message:
            return self._report(**message)
        return None

    def _child_gone(self) -> Verdict | None:
        """The child has ended; fine if it said so before."""
        code = self._child.wait()
        if self._result is not None and code == self._result["ended"]:
            return self._report(**self._result)
        if self._is_told and code == -signal.SIGTERM:  # jax or Python would have noted it
            message = "told to stop before there was anything to save"
            return self._report(failed=message, code=PREEMPTED_CODE, grace=0)
        if code >= 0:
            message = f"the process ended with exit code {code}, without a word"
            return self._report(failed=message, code=code or FAULT_CODE, grace=_GRACE)
        message = f"the process was ended by {signal.Signals(-code).name} after step {self._step}"
        if code == -signal.SIGKILL:
            message = f"lost: {message}, often because memory ran out"
            return self._report(failed=message, code=HOST_LOST_CODE, grace=0)
        if self._joining is not None:
            message = (
                f"the hosts could not meet at {self._joining[1]}: two may have the same --process, "
                "or another run may be using that port"
            )
            return self._report(failed=message, code=FAULT_CODE, grace=0)
        # When the first host's process is killed, jax aborts all others.
        lost = code == -signal.SIGABRT
        return self._report(
            failed=message, code=HOST_LOST_CODE if lost else FAULT_CODE, grace=_GRACE
        )

    def _report(self, **message) -> Verdict | None:
        """Tells the hub what became of this host; without one, that is how it ends."""
        if self._line is None and "ended" in message:
            return Verdict(message["message"], message["ended"])
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
        """Tells the child to stop; the second time, it ends at once."""
        number = message["number"]
        self._signals += 1
        if self._signals > 1:
            return Verdict("", INTERRUPTED_CODE if number == signal.SIGINT else 128 + number)
        if number == signal.SIGINT:
            say("\nsaving after this step; Ctrl-C again to stop at once")
        self._tell_to_stop()
        return None

    def _hear_notice(self, message: dict) -> None:
        say(f"\n{message['reason']}: saving after this step")
        self._tell_to_stop()

    def _tell_to_stop(self) -> None:
        """jax hears SIGTERM in the child, and finds a step after which all hosts can stop."""
        if not self._is_told:
            self._child.send_signal(signal.SIGTERM)
        self._is_told = True
