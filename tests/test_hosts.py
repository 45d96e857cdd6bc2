"""Parents and their children: how the hosts of a run end together, whatever ends first.

The children here are small programs that talk to their parents as a training process does; runs of
jax itself are in test_hosts_faults.py.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from easylm.errors import InputError
from easylm.hosts import flags
from easylm.hosts.flags import parse_place

# Of host `index` of `count` hosts, which find each other by a file instead of through jax. `act`
# is what it does then.
CHILD = """
import json, os, pathlib, signal, sys, time
from easylm.errors import InputError, PreemptedError
from easylm.hosts import supervise
from easylm.hosts.command import run_on_hosts
from easylm.hosts.link import parent

supervise.JOIN_SECONDS = 1 if "miss" in sys.argv or "be alone" in sys.argv else 300

def main(argv):
    _, index, count, act = argv
    index, count, meeting = int(index), int(count), pathlib.Path(os.environ["MEETING"])
    if act == "refuse before joining":
        raise InputError("config.seed: found 'x'; wanted a number")
    if act == "abort in joining":
        parent.tell(joining="localhost:1, 2 hosts in all")
        os.abort()
    if act == "give the reason first":
        parent.tell(reason="error: config.seed: found 'x'; wanted a number")
    if act == "miss":
        parent.tell(joining="localhost:1, 2 hosts in all")
        time.sleep(100)
    if act == "be alone":
        parent.tell(joining="the first host of this slice")
        parent.tell(alone=True)
        time.sleep(2)
        return
    if index == 0:
        meeting.with_suffix(".tmp").write_text(parent.hub())
        meeting.with_suffix(".tmp").rename(meeting)
    while not meeting.exists():
        time.sleep(0.01)
    parent.tell(joined=[index, count], hub=meeting.read_text())
    parent.tell(step=7)
    while not parent.last_steps:  # the first parent has answered
        time.sleep(0.01)
    if act == "wait":
        (meeting.parent / f"waits{index}").write_text(str(os.getpid()))
        time.sleep(100)
    if act == "stop":
        signal.signal(signal.SIGTERM, lambda *_: None)
        (meeting.parent / f"waits{index}").write_text(str(os.getpid()))
        signal.pause()
        raise PreemptedError("stopped after step 7 of 9; the checkpoint is saved")
    for other in range(count):  # they are told to wait, if they are not told to work
        while act != "work" and other != index and not (meeting.parent / f"waits{other}").exists():
            time.sleep(0.01)
    if act == "give the reason first":
        raise InputError("config.seed: found 'x'; wanted a number")
    if act == "refuse":
        raise InputError("data.sources: found nothing; wanted " + "rows and " * 20)
    if act == "fail":
        raise ValueError("broken")
    if act == "overflow":
        raise FloatingPointError("step 8: loss is nan")
    if act == "abort":
        os.abort()
    if act == "leave":
        os._exit(3)
    (meeting.parent / f"steps{index}").write_text(json.dumps(parent.last_steps))

run_on_hosts(main)
"""


class Hosts:
    """Hosts that were told to do something each."""

    def __init__(self, folder: pathlib.Path, *acts: str):
        self.folder = folder
        self.started = time.monotonic()
        environment = {**os.environ, "MEETING": str(folder / "meeting")}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", CHILD, "--coordinator", str(index), str(len(acts)), act],
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                cwd=pathlib.Path(__file__).parent.parent,
            )
            for index, act in enumerate(acts)
        ]

    def child(self, index: int) -> int:
        """The process that waits below a parent, once it does."""
        path = self.folder / f"waits{index}"
        until = time.monotonic() + 50
        while not path.exists() or not path.read_text():
            assert time.monotonic() < until, self.processes[index].poll()
            time.sleep(0.01)
        return int(path.read_text())

    def ends(self) -> list[tuple[int, str]]:
        """(exit code, all that was printed in one line) of each."""
        printed = [process.communicate(timeout=50)[1] for process in self.processes]
        self.seconds = time.monotonic() - self.started
        return [
            (process.returncode, " ".join(text.split()))
            for process, text in zip(self.processes, printed, strict=True)
        ]


def state(process: int) -> str:
    """R, S, D: it runs; T: it is stopped; Z: it has ended."""
    path = pathlib.Path(f"/proc/{process}/stat")
    return path.read_text().rpartition(")")[2].split()[0] if path.exists() else "Z"


def is_alive(process: int) -> bool:
    return state(process) != "Z"


def test_hosts_that_do_their_part_end_well_and_know_each_others_steps(tmp_path):
    assert Hosts(tmp_path, *["work"] * 3).ends() == [(0, "")] * 3
    for index in range(3):
        assert set(json.loads((tmp_path / f"steps{index}").read_text())) == {"0", "1", "2"}


def test_hosts_that_others_wait_for_in_vain_are_asked_for(tmp_path):
    ((code, printed),) = Hosts(tmp_path, "miss").ends()
    assert code == 76
    assert "some hosts did not come to localhost:1, 2 hosts in all, within 1 s" in printed


def test_hosts_that_cannot_meet_are_told_why(tmp_path):
    ((code, printed),) = Hosts(tmp_path, "abort in joining").ends()
    assert code == 1
    assert "the hosts could not meet at localhost:1, 2 hosts in all: two may have" in printed


def test_an_error_from_before_the_hosts_met_is_said_at_once_and_heard_by_all(tmp_path):
    message = "error: config.seed: found 'x'; wanted a number"
    found = Hosts(tmp_path, "wait", "give the reason first").ends()
    assert found[1] == (2, message)
    assert found[0][0] == 2
    assert found[0][1].startswith("host 1 of 2 (") and found[0][1].endswith(message)


def test_without_others_nobody_is_waited_for(tmp_path):
    ((code, printed),) = Hosts(tmp_path, "be alone").ends()
    assert (code, printed) == (0, "meeting the other hosts at the first host of this slice")


def test_alone_it_ends_as_its_child(tmp_path):
    assert Hosts(tmp_path, "work").ends() == [(0, "")]


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    "act, code, message",
    [
        ("refuse", 2, "error: data.sources: found nothing; wanted rows and"),
        ("overflow", 1, "error: step 8: loss is nan"),
        ("fail", 1, "ValueError: broken"),
        ("abort", 76, "the process was ended by SIGABRT after step 7"),
        ("leave", 3, "the process ended with exit code 3, without a word"),
    ],
)
def test_an_error_of_one_host_ends_all_with_its_message(tmp_path, act, code, message, index):
    acts = ["wait", "wait"]
    acts[index] = act
    hosts = Hosts(tmp_path, *acts)
    children = [hosts.child(1 - index)]
    for found, printed in hosts.ends():
        assert found == code
        assert f"host {index} of 2" in printed and message in printed
        assert printed.count("Traceback") == (act == "fail")
    assert not any(map(is_alive, children))
    assert hosts.seconds < 30


def test_a_message_fits_the_terminal(tmp_path):
    hosts = Hosts(tmp_path, "refuse", "wait")
    for process in hosts.processes:
        lines = process.communicate()[1].splitlines()
        assert len(lines) > 1 and max(map(len, lines)) <= 80


def test_an_error_before_the_hosts_have_met_is_each_hosts_own(tmp_path):
    for code, printed in Hosts(tmp_path, *["refuse before joining"] * 2).ends():
        assert (code, printed) == (2, "error: config.seed: found 'x'; wanted a number")


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("whole", [True, False], ids=["host", "training process"])
def test_a_killed_host_is_named_and_the_others_exit_76(tmp_path, index, whole):
    hosts = Hosts(tmp_path, *["wait"] * 3)
    children = [hosts.child(host) for host in range(3)]
    os.kill(hosts.processes[index].pid if whole else children[index], signal.SIGKILL)
    for host, (code, printed) in enumerate(hosts.ends()):
        if whole and host == index:
            assert code == -signal.SIGKILL
            continue
        assert code == 76
        assert f"host {index} of 3" in printed and "lost" in printed
        assert ("SIGKILL" in printed) != whole
    time.sleep(0.2)
    assert not any(map(is_alive, children))


@pytest.mark.parametrize("index", [0, 1])
def test_sigterm_to_a_host_reaches_its_training_process(tmp_path, index):
    hosts = Hosts(tmp_path, "stop", "stop")
    for host in range(2):
        hosts.child(host)
    hosts.processes[index].send_signal(signal.SIGTERM)
    # jax would tell the other; here somebody does.
    hosts.processes[1 - index].send_signal(signal.SIGTERM)
    for code, printed in hosts.ends():
        assert (code, printed) == (75, "stopped after step 7 of 9; the checkpoint is saved")


def test_told_to_stop_before_it_can_save_it_says_so(tmp_path):
    hosts = Hosts(tmp_path, "wait", "wait")
    hosts.child(0), hosts.child(1)
    hosts.processes[1].send_signal(signal.SIGTERM)
    for code, printed in hosts.ends():
        assert code == 75
        assert "host 1 of 2" in printed and "told to stop before" in printed


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_told_twice_it_ends_at_once(tmp_path, number, code):
    hosts = Hosts(tmp_path, "wait", "wait")
    child = hosts.child(0)
    os.kill(child, signal.SIGSTOP)  # it cannot answer
    while state(child) != "T":
        time.sleep(0.01)
    hosts.processes[0].send_signal(number)
    time.sleep(0.3)
    hosts.processes[0].send_signal(number)
    found = hosts.ends()
    assert found[0][0] == code
    assert found[1][0] == 76
    assert not is_alive(child)


@pytest.mark.slow
def test_a_process_that_hangs_is_blamed_for_the_end_of_another(tmp_path):
    """jax aborts the others when one does not answer any more."""
    hosts = Hosts(tmp_path, "wait", "wait")
    hanging, other = hosts.child(1), hosts.child(0)
    os.kill(hanging, signal.SIGSTOP)
    time.sleep(24)
    os.kill(other, signal.SIGABRT)
    for code, printed in hosts.ends():
        assert code == 76
        assert "host 1 of 2" in printed and "its process hangs" in printed
    assert not is_alive(hanging)


@pytest.mark.slow
def test_a_process_that_dies_when_told_to_stop_has_saved_nothing(tmp_path):
    hosts = Hosts(tmp_path, "stop", "wait")
    child = hosts.child(0)
    os.kill(child, signal.SIGSTOP)
    hosts.processes[0].send_signal(signal.SIGTERM)
    time.sleep(0.3)
    os.kill(child, signal.SIGKILL)
    for code, printed in hosts.ends():
        assert code == 76
        assert "host 0 of 2" in printed and "lost" in printed


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_host_that_is_silent_is_lost(tmp_path, index):
    hosts = Hosts(tmp_path, "wait", "wait")
    hosts.child(0), hosts.child(1)
    silent = hosts.processes.pop(index)
    silent.send_signal(signal.SIGSTOP)  # its connections stay open
    ((code, printed),) = hosts.ends()
    assert code == 76
    assert f"host {index} of 2" in printed and "nothing was heard of it for 30 s" in printed
    assert hosts.seconds < 45
    silent.kill()
    silent.communicate()


def test_a_stranger_at_the_port_is_not_listened_to(tmp_path):
    hosts = Hosts(tmp_path, "wait", "work")
    hosts.child(0)
    host, port, _ = (tmp_path / "meeting").read_text().split(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b'{"token": "guess", "host": 1, "name": "x"}\n{"failed": "ha"}\n')
        assert stranger.recv(1) == b""
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(1) == b""
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"5\n")
        assert stranger.recv(1) == b""
    os.kill(hosts.child(0), signal.SIGTERM)
    for _, printed in hosts.ends():
        assert "ha" not in printed.split() and "Traceback" not in printed


def place(**values):
    return parse_place({"coordinator": "", "processes": "", "process": "", **values})


def test_the_place_of_a_host():
    assert place() is None
    assert place(coordinator="h:1", processes="2", process="1") == ("h:1", 2, 1)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"processes": "2"}, "--coordinator: found ''; wanted HOST:PORT"),
        ({"coordinator": "host"}, "--coordinator: found 'host'; wanted HOST:PORT"),
        ({"coordinator": "h:1"}, "--processes: found ''; wanted 1 or more"),
        ({"coordinator": "h:1", "processes": "two"}, "--processes: found 'two'; wanted 1 or more"),
        (
            {"coordinator": "h:1", "processes": "2", "process": "2"},
            "--process: found '2'; wanted 0",
        ),
        ({"coordinator": "h:1", "processes": "2"}, "--process: found ''; wanted 0 to 1"),
    ],
)
def test_wrong_places(values, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        place(**values)


def test_only_commands_that_may_have_others_get_a_parent(monkeypatch):
    monkeypatch.setattr(flags, "has_tpu", lambda: False)
    assert flags.may_have_others(["--workdir=x", "--coordinator=h:1"])
    assert not flags.may_have_others(["--workdir=x"])
    monkeypatch.setattr(flags, "has_tpu", lambda: True)
    assert flags.may_have_others([])
