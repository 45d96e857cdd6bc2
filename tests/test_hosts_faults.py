"""Real runs of two hosts of which one is wrong, leaves, or is told to stop."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from easylm import sft
from tests.hosts import ends, start_hosts
from tests.runs import RANDOM, arguments, make_folder, metrics

pytestmark = pytest.mark.slow

# Every process compiles for itself, which takes most of the time of a tiny run.
QUICKLY_COMPILED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
OPTIONS = {**RANDOM, "steps": 2000, "checkpoint.every": 20}
# In a namespace of its own a process may mount what nobody else sees, also without being root.
OWN_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("hosts_faults"))


def one_line(text: str) -> str:
    return " ".join(text.split())


def start_different(folder, workdir, own: dict[int, list[str]]) -> list[subprocess.Popen]:
    """Two hosts; `own` has further arguments for some."""
    return start_hosts(arguments(folder, workdir, OPTIONS), 2, own=own, **QUICKLY_COMPILED)


def test_an_error_before_the_hosts_have_met_ends_both_soon(folder, tmp_path):
    started = time.monotonic()
    found = ends(start_different(folder, tmp_path / "run", {1: ["--config.nonsense=1"]}))
    assert time.monotonic() - started < 60
    for index, (code, printed) in enumerate(found):
        assert code == 2, printed
        assert printed.count("--config.nonsense: no such option") == 1
        assert ("host 1 of 2" in printed) == (index == 0)
        assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_configs_that_differ_are_refused_by_the_field(folder, tmp_path):
    found = ends(start_different(folder, tmp_path / "run", {1: ["--config.seed=7"]}))
    for code, printed in found:
        assert code == 2
        assert "host 1 of 2" in printed
        assert "config.seed: 42 on the first host, 7 here" in one_line(printed)
        assert len(printed.splitlines()) < 10
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_refused(folder, tmp_path):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        place = [f"--coordinator=localhost:{port}", "--processes=2", "--process=0"]
        command = [sys.executable, "-m", "easylm.sft"]
        command += [*arguments(folder, tmp_path / "run", OPTIONS), *place]
        found = subprocess.run(
            command, capture_output=True, text=True, cwd=pathlib.Path(sft.__file__).parent.parent
        )
    assert found.returncode == 2
    assert f"the first host cannot listen at port {port}" in one_line(found.stderr)
    assert "Traceback" not in found.stderr


def wait_for_step(hosts, workdir: pathlib.Path, step: int) -> None:
    while not (workdir / "metrics.jsonl").exists() or len(metrics(workdir)) < step:
        assert all(host.poll() is None for host in hosts), ends(hosts)
        time.sleep(0.05)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_host_ends_the_other_and_both_go_on_later(folder, tmp_path, killed):
    workdir = tmp_path / "run"
    hosts = start_hosts(arguments(folder, workdir, OPTIONS), 2, **QUICKLY_COMPILED)
    wait_for_step(hosts, workdir, 30)
    started = time.monotonic()
    hosts[killed].kill()
    found = ends(hosts)
    assert time.monotonic() - started < 45
    assert found[killed][0] == -signal.SIGKILL
    code, printed = found[1 - killed]
    assert code == 76, printed
    assert f"host {killed} of 2" in printed and "was lost" in printed
    hosts = start_hosts(arguments(folder, workdir, OPTIONS), 2, **QUICKLY_COMPILED)
    wait_for_step(hosts, workdir, 40)
    hosts[killed].send_signal(signal.SIGTERM)
    found = ends(hosts)
    assert [code for code, _ in found] == [75, 75], found
    assert "going on after step 20 of 2000" in found[0][1]
    assert "stopped after step" in found[0][1]
    last = max(map(int, os.listdir(workdir / "checkpoints")))
    assert metrics(workdir)[-1]["step"] == last
    assert [line["step"] for line in metrics(workdir)] == list(range(1, last + 1))


@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
def test_a_workdir_that_one_host_does_not_see_is_refused(folder, tmp_path, resumed):
    probe = subprocess.run([*OWN_MOUNTS, f"mount -t tmpfs none {tmp_path}"], capture_output=True)
    if shutil.which("unshare") is None or probe.returncode:
        pytest.skip("this machine lets no process have mounts of its own")
    workdir = tmp_path / "run"
    if resumed:
        sft.main(arguments(folder, workdir, {**OPTIONS, "steps": 1}))
        for left in ("hf", "plots"):
            shutil.rmtree(workdir / left)
    workdir.mkdir(exist_ok=True)
    options = {**OPTIONS, "steps": 2 if not resumed else 1}
    hidden = [*OWN_MOUNTS, f'mount -t tmpfs none {workdir} && exec "$@"', "bash"]
    hosts = start_hosts(
        arguments(folder, workdir, options), 2, before={1: hidden}, **QUICKLY_COMPILED
    )
    for code, printed in ends(hosts):
        assert code == 2, printed
        assert "host 1 of 2" in printed and "--workdir" in printed
        assert "Traceback" not in printed
