"""A second run in a workdir is refused while the first is alive, and only then."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from easylm import lock, storage
from easylm.errors import InputError
from easylm.lock import alone_in
from tests import bucket

HOLD = """\
import os, sys, time
from easylm.lock import alone_in

with alone_in(sys.argv[1]):
    if os.fork() == 0:  # it outlives this process, and must not keep the lock
        time.sleep(30)
    print("held", os.getpid(), flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(workdir):
    """A process that has the lock, until its stdin ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, workdir],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == f"held {process.pid}\n"
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def refused(workdir) -> str:
    with pytest.raises(InputError) as error, alone_in(workdir):
        pass
    return str(error.value)


def test_on_a_disk_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
    workdir = str(tmp_path / "new" / "run")
    with holder(workdir) as first:
        said = refused(workdir)
        assert said.startswith(f"{workdir}: another run is alive there: process {first.pid} on ")
        assert "wanted a folder in which none is" in said
        first.kill()
        first.wait()
        with alone_in(workdir):
            assert os.listdir(workdir) == [".running"]
        assert os.listdir(workdir) == []


def test_on_a_disk_a_run_that_ends_leaves_nothing(tmp_path):
    for error in (None, InputError):
        with contextlib.suppress(InputError), alone_in(str(tmp_path)):
            assert os.listdir(tmp_path) == [".running"]
            if error:
                raise error
        assert os.listdir(tmp_path) == []


def test_a_workdir_in_which_nothing_can_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert (
        refused(f"{tmp_path}/file/run")
        == f"{tmp_path}/file/run: found a file where a folder is wanted"
    )


@pytest.fixture
def workdir(monkeypatch):
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.2)
    with bucket.running_bucket() as root:
        yield f"{root}/run"


def left_behind(workdir: str, **changes) -> None:
    """What a run that was killed a moment ago has left in a bucket."""
    found = {**lock._holder(), "renewed": time.time(), **changes}
    storage.write_bytes(f"{workdir}/.running", json.dumps(found).encode())


def test_in_a_bucket_a_second_run_is_refused_while_the_first_renews_its_lock(workdir, capsys):
    with alone_in(workdir):
        said = refused(workdir)
        assert said.startswith(f"{workdir}: another run is alive there: process {os.getpid()} on ")
        assert "another run was alive there a moment ago" in capsys.readouterr().err
    assert not storage.exists(f"{workdir}/.running")
    with alone_in(workdir):
        pass


def test_in_a_bucket_the_lock_of_a_killed_run_passes(workdir, capsys, monkeypatch):
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 2.0)
    left_behind(workdir, host="another")
    started = time.monotonic()
    with alone_in(workdir):
        assert time.monotonic() - started > 1.5
    assert "process " in capsys.readouterr().err


def test_in_a_bucket_the_lock_of_a_run_killed_on_this_machine_is_gone_with_it(workdir, capsys):
    process = subprocess.Popen(["true"])
    process.wait()
    left_behind(workdir, process=process.pid)
    with alone_in(workdir):
        assert capsys.readouterr().err == ""
