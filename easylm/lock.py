"""One run at a time in a workdir."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator

from easylm import storage
from easylm.command import say
from easylm.errors import InputError, UnavailableError

NAME = ".running"
# Of the lock of a run in a bucket: how often it says that it is alive, and after what silence it
# is taken for dead. Clocks of cloud machines agree to well within a second.
RENEW_SECONDS = 15.0
SILENCE_SECONDS = 60.0
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextlib.contextmanager
def alone_in(workdir: str) -> Iterator[None]:
    """Within the block this process is the only one that runs in `workdir`.

    On a disk the kernel keeps the lock, on WORKDIR/.running, and frees it when the process ends,
    however it does. A bucket has no such thing: there the object WORKDIR/.running is renewed as
    long as the run lives, and a killed run's keeps another from starting for up to SILENCE_SECONDS,
    unless that starts on the same machine. Two that start in a bucket in the same second may both
    get it. Of a run on several hosts, one takes it for all.

    Args:
      workdir: is made where it is missing, on a disk.
    Raises:
      InputError: another run is alive there, or nothing can be written there.
    """
    with _leased(workdir) if storage.is_bucket(workdir) else _locked(workdir):
        yield


@contextlib.contextmanager
def _locked(workdir: str) -> Iterator[None]:
    folder = os.path.expanduser(workdir)
    path, is_new = os.path.join(folder, NAME), not os.path.exists(folder)
    with storage.explained(workdir):
        os.makedirs(folder, exist_ok=True)
        file = _open_locked(path, workdir)
        os.truncate(file, 0)
        os.write(file, json.dumps(_holder()).encode())
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):  # whoever removes the workdir has its reasons
            os.unlink(path)
        if is_new:
            with contextlib.suppress(OSError):  # of a run that has left something
                os.rmdir(folder)
        os.close(file)


def _open_locked(path: str, workdir: str) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # Not flock, which children that are forked would inherit, and outlive us with.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _refusal(workdir, _parsed(os.read(file, 4096))) from None
            if error.errno not in _NO_LOCKS:
                raise
            say(f"{workdir}: this file system has no locks; another run there would go unnoticed")
        # The run that had it may have removed it just now, for a third to make it again.
        if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
            return file
        os.close(file)


@contextlib.contextmanager
def _leased(workdir: str) -> Iterator[None]:
    path, mine, ended = f"{workdir}/{NAME}", _holder(), threading.Event()
    _wait_until_free(workdir, path)
    _renew(path, mine)

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            # A bucket that does not answer keeps others out as well.
            with contextlib.suppress(InputError, UnavailableError):
                _renew(path, mine)

    thread = threading.Thread(target=renew, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(InputError, UnavailableError):  # it passes by itself
            storage.remove_folder(path)


def _renew(path: str, mine: dict) -> None:
    storage.write_bytes(path, json.dumps({**mine, "renewed": time.time()}).encode())


def _wait_until_free(workdir: str, path: str) -> None:
    first = found = _read(path)
    while found is not None and not _is_dead(found):
        if found["renewed"] != first["renewed"] or found["id"] != first["id"]:
            raise _refusal(workdir, found)
        if found is first:
            say(
                f"{workdir}: another run was alive there a moment ago ({_described(found)}); "
                f"waiting up to {SILENCE_SECONDS:.0f} s to see whether it still is"
            )
        time.sleep(RENEW_SECONDS / 4)
        found = _read(path)


def _is_dead(holder: dict) -> bool:
    if time.time() - holder["renewed"] > SILENCE_SECONDS:
        return True
    # Containers of one machine have names of their own, and do not see each other's processes.
    is_here = (holder["host"], holder["boot"]) == (socket.gethostname(), _boot())
    return is_here and not _is_process(holder["process"])


def _is_process(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _read(path: str) -> dict | None:
    return _parsed(storage.read_bytes(path)) if storage.exists(path) else None


def _parsed(data: bytes) -> dict:
    return json.loads(data or b"{}")


def _holder() -> dict:
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "process": os.getpid(),
        "id": secrets.token_hex(8),
    }


def _boot() -> str:
    """What tells this machine, since it was started, from all others."""
    path = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else socket.gethostname()


def _described(holder: dict) -> str:
    if not holder:  # it has not yet said
        return "a process"
    return f"process {holder['process']} on {holder['host']}"


def _refusal(workdir: str, holder: dict) -> InputError:
    return InputError(
        f"{workdir}: another run is alive there: {_described(holder)}; wanted a folder in which "
        "none is. Wait for its end, end it, or name another --workdir"
    )
