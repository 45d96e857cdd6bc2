"""The hosts of a run: which of them this process is, and how they do things together.

A host is one process of a run. With one host nothing here waits for anything, and jax is not
loaded. Every host runs the same program, so all call the functions below in the same order.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from easylm import preemption
from easylm.command import say
from easylm.config import difference
from easylm.errors import InputError
from easylm.hosts.flags import Place
from easylm.hosts.link import parent

# Failures and lost hosts are noticed in seconds, elsewhere: this is for what nobody thought of.
BARRIER_SECONDS = 2 * 3600
# Longer than the parents wait (easylm/hosts/supervise.py), for jax ends with a stack trace.
JOIN_SECONDS = 400
# jax's own notice of a host that hangs; see easylm/hosts/supervise.py for those that die.
HEARTBEAT_SECONDS = 45
SAID_AFTER_SECONDS = 15

T = TypeVar("T")

_index, _count = 0, 1
_turns = itertools.count(1)


def index() -> int:
    """Which host this is, from 0."""
    return _index


def count() -> int:
    """How many there are."""
    return _count


def is_first() -> bool:
    """Whether this is the host that prints, and writes what is written once."""
    return _index == 0


def join(place: Place | None) -> bool:
    """Finds the other hosts of the run, if it may have others; before jax is used for anything.

    Args:
      place: what the command line says; None: on a TPU slice jax finds out, else there are none.
    Returns:
      Whether there are others; `meet` comes next then.
    Raises:
      RuntimeError: the others did not come.
    """
    global _index, _count
    if place is None and not parent.is_there:
        return False
    import jax

    known, where = {}, "the first host of this slice"
    if place is not None:
        if place.index == 0:
            _check_port(place.coordinator)
        where = f"{place.coordinator}, {place.count} hosts in all"
        known = {
            "coordinator_address": place.coordinator,
            "num_processes": place.count,
            "process_id": place.index,
        }
    parent.tell(joining=where)
    try:
        jax.distributed.initialize(
            **known,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
        _index, _count = jax.process_index(), jax.process_count()
    except ValueError:
        if place is not None:
            raise
        # jax knows of no slice around these chips.
    if _count == 1:
        parent.tell(alone=True)
    return _count > 1


def _check_port(coordinator: str) -> None:
    """Refuses a port that is taken, at which jax would end with a stack trace."""
    port = int(coordinator.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--coordinator: found {coordinator}, and the first host cannot listen at port {port} "
            f"({error}); wanted a free one, the same on all hosts"
        ) from error


def meet_to_fail(place: Place | None, error: InputError) -> None:
    """Lets the other hosts hear of an error from before the hosts have met; for the parent's child.

    All others have come, or come now: the same command is started everywhere.
    """
    if parent.is_there:
        parent.tell(reason=f"error: {error}")
        if join(place):
            meet()


def meet() -> None:
    """Brings the parents of all hosts together; from here on the first host speaks for all."""
    import jax

    parent.tell(joined=[_index, _count], hub=on_first("meeting", parent.hub))
    if is_first():
        say(f"{_count} hosts, {jax.device_count()} devices")
    else:
        # What goes wrong here reaches people through the parent.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def wait_for_all(what: str) -> None:
    """Returns when every host is here.

    Args:
      what: is being done until then, for messages.
    Raises:
      RuntimeError: some do not come for BARRIER_SECONDS.
    """
    if _count == 1:
        return
    from orbax.checkpoint import multihost

    reminder = threading.Timer(SAID_AFTER_SECONDS, say, [f"waiting for all {_count} hosts: {what}"])
    reminder.daemon = True
    reminder.start()
    try:
        # The coordinator's barrier has a timeout; one by the devices has none.
        multihost.get_barrier_sync_fn()(
            key=f"easylm {next(_turns)}", timeout_ms=BARRIER_SECONDS * 1000
        )
    finally:
        reminder.cancel()
    others = _from_first(what.encode()).decode()
    if others != what:
        raise RuntimeError(f"the hosts do different things: the first {others}, this one {what}")


def on_first(what: str, make: Callable[[], T]) -> T:
    """What `make` returns on the first host; the others do not call it.

    Args:
      what: it does, for messages.
      make: returns bytes, or a value of JSON.
    """
    if _count == 1:
        return make()
    data = b""
    if is_first():
        value = make()
        data = b"b" + value if isinstance(value, bytes) else b"j" + json.dumps(value).encode()
    wait_for_all(what)
    data = _from_first(data)
    return data[1:] if data[:1] == b"b" else json.loads(data[1:])


def _from_first(data: bytes) -> bytes:
    """The first host's bytes, on all."""
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    # Sizes are rounded up: each new one is another program to compile.
    buffer = np.zeros(1 << max(10, (size - 1).bit_length()), np.uint8)
    if is_first():
        buffer[:size] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer))[:size].tobytes()


@contextlib.contextmanager
def first_alone(what: str) -> Iterator[None]:
    """Within the block the first host is alone; the others follow, and find its work done."""
    if not is_first():
        wait_for_all(what)
    yield
    if is_first():
        wait_for_all(what)


def check_same(what: str, values: dict) -> None:
    """Refuses hosts that differ in what all must have alike.

    Args:
      what: they are.
      values: by name, of JSON.
    Raises:
      InputError: on a host that has others than the first one.
    """
    wanted = on_first(f"comparing {what}", lambda: values)
    found = json.loads(json.dumps(values))
    lines = difference(wanted, found, what, words=("on the first host", "here"))
    if lines:
        raise InputError(
            "all hosts of a run must have the same command, versions and files:\n"
            + "\n".join(f"  {line}" for line in lines)
        )


@contextlib.contextmanager
def stop_noticed() -> Iterator[Callable[[], bool]]:
    """Within the block a wish to stop is only noted; what is yielded says whether one came.

    All hosts ask equally often, and get the same answer each time.
    """
    if _count == 1:
        with preemption.stop_noticed() as stopped:
            yield stopped
        return
    from jax.experimental import multihost_utils

    # jax notes SIGTERM on any host, and names a call that none has reached yet.
    yield lambda: multihost_utils.reached_preemption_sync_point(next(_asked))


_asked = itertools.count(1)


def tell_step(step: int) -> None:
    """Lets the others know that this host has finished a step."""
    parent.tell(step=step)


def last_steps() -> dict[int, int]:
    """The last step that each host has finished, as of a few seconds ago."""
    return parent.last_steps
