"""scripts/tpu.sh, with a gcloud whose hosts are folders."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.fake_gcloud import FakeCloud, Script, tpu

SCRIPTS = pathlib.Path(__file__).resolve().parent.parent / "scripts"
WORKDIR = "gs://bucket/run"
COMMAND = [
    "python",
    "-m",
    "easylm.sft",
    f"--workdir={WORKDIR}/",
    "--config.data.sources=a b'$c\"\n;",
]
# accelerator type, runtime version, hosts, devices
SLICES = [
    ("v2-8", "tpu-ubuntu2204-base", 1, 8),
    ("v3-256", "tpu-ubuntu2204-base", 32, 256),
    ("v4-64", "tpu-ubuntu2204-base", 8, 32),
    ("v5litepod-16", "v2-alpha-tpuv5-lite", 4, 16),
    ("v5p-16", "v2-alpha-tpuv5", 2, 8),
    ("v6e-8", "v2-alpha-tpuv6e", 1, 8),
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A small git repository with the scripts."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "scripts").mkdir()
    for script in SCRIPTS.glob("tpu*.sh"):
        shutil.copy(script, folder / "scripts")
    (folder / "pyproject.toml").write_text("[project]\n")
    identity = ["-c", "user.name=me", "-c", "user.email=me@example.com"]
    for command in (["init", "--quiet"], ["add", "."], [*identity, "commit", "-qm", "All"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture
def cloud(tmp_path):
    yield from kept(FakeCloud(tmp_path / "cloud"))


@pytest.fixture(scope="module")
def slice_of_two(checkout, tmp_path_factory):
    """A cloud with a slice that is set up."""
    cloud = FakeCloud(tmp_path_factory.mktemp("slice") / "cloud")
    tpu(cloud, checkout, "create", "--type=v3-16")
    tpu(cloud, checkout, "setup")
    cloud.write(calls="")
    return cloud


@pytest.fixture
def pod(slice_of_two, tmp_path):
    """A copy of it."""
    shutil.copytree(slice_of_two.folder, tmp_path / "pod")
    yield from kept(FakeCloud(tmp_path / "pod"))


def kept(cloud):
    """The cloud, while it is used; then scripts end, and its hosts."""
    yield cloud
    for process in Script.started:
        process.kill()
    for host in cloud.folder.glob("w*"):
        shutil.rmtree(host)


def dry(cloud, checkout, verb, *arguments, **environment):
    """The commands that a dry run prints, as lists of words."""
    out, _ = tpu(cloud, checkout, verb, "--dry-run", *arguments, **environment)
    return [shlex.split(command) for command in joined(out.splitlines())]


def joined(lines):
    """Lines, with those that a quoted line break has cut put together again."""
    command = ""
    for line in lines:
        command += line
        try:
            shlex.split(command)
        except ValueError:
            command += "\n"
        else:
            yield command
            command = ""


@pytest.mark.parametrize(("type", "version", "hosts", "devices"), SLICES)
def test_a_dry_run_prints_the_commands_and_runs_none(
    cloud, checkout, type, version, hosts, devices
):
    place = ["--zone=europe-west4-a", "--project=mine", "--quiet"]
    vm = ["gcloud", "compute", "tpus", "tpu-vm"]
    more = ["--project=mine", f"--type={type}"]
    (create,) = dry(cloud, checkout, "create", *more, "--spot", "--service-account=a@b")
    asked = [f"--accelerator-type={type}", "--spot", "--service-account=a@b"]
    assert create == [*vm, "create", "pod", f"--version={version}", *asked, *place]
    (queued,) = dry(cloud, checkout, "create", *more, "--queued", "--runtime-version=other")
    assert queued[:4] == ["gcloud", "compute", "tpus", "queued-resources"]
    assert {"--node-id=pod", "--runtime-version=other", f"--accelerator-type={type}"} < {*queued}

    setup = dry(cloud, checkout, "setup", PROJECT="mine", TYPE=type)
    verbs = [command[4] for command in setup if command[0] == "gcloud"]
    assert verbs == ["describe", "ssh", "scp", "ssh", "ssh", "ssh"]
    assert f"--command=bash easylm_host.sh devices {hosts}" in setup[-1]
    assert devices % hosts == 0
    run = dry(cloud, checkout, "run", "--keep-going", "--", *COMMAND, PROJECT="mine", TYPE=type)
    assert ["gcloud", "storage", "ls", f"{WORKDIR}/checkpoints/*/commit_success.txt"] in run
    (started,) = [word for command in run for word in command if " start " in word]
    assert shlex.split(started.partition("=")[2])[4:] == COMMAND
    for verb, told in [("logs", "show_log 100 '' ''"), ("status", "report"), ("stop", "stop_run")]:
        commands = dry(cloud, checkout, verb, PROJECT="mine", TYPE=type)
        assert any(f"--command=bash easylm_host.sh {told}" in command for command in commands)
        assert all(command[:4] == vm and command[-3:] == place for command in commands)
    (delete,) = dry(cloud, checkout, "delete", PROJECT="mine", TYPE=type)[1:]
    assert delete == [*vm, "delete", "pod", *place]
    assert cloud.calls() == []


def test_what_is_run_is_what_a_dry_run_prints(cloud, checkout):
    options = ["--type=v3-16", "--queued", "--spot", "--network=mine"]
    (printed,) = dry(cloud, checkout, "create", *options)
    tpu(cloud, checkout, "create", *options)
    assert cloud.calls()[0] == printed[1:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "found no verb; wanted one of create, setup, run, logs, status, stop, delete"),
        (["launch"], "found the verb 'launch'; wanted one of create,"),
        (["status", "--name="], "--name: found ''; wanted the name of the slice"),
        (["status", "--zone=here"], "--zone: found 'here'; wanted the zone"),
        (["status", "--spot"], "status: found '--spot'; wanted --name=... --zone=..."),
        (["create", "--type"], "create: found '--type' without a value; wanted --type=VALUE"),
        (["create"], "--type: found ''; wanted v2-N, v3-N, v4-N, v5e-N, v5p-N or v6e-N"),
        (["create", "--type=v7-8"], "--type: found 'v7-8'; wanted v2-N"),
        (["create", "--type=v3-12"], "--type: found 'v3-12'; wanted a multiple of 8 after 'v3-'"),
        (["create", "--type=v4-1"], "--type: found 'v4-1'; wanted a multiple of 8"),
        (["create", "--type=v6e-x"], "--type: found 'v6e-x'; wanted a multiple of 4"),
        (["setup", "--python=3.10"], "--python: found '3.10'; wanted 3.11 or 3.12"),
        (["setup", "--ref=main"], "--ref: found 'main'; wanted URL#REF"),
        (["setup", "--env=none"], "--env: found no file none"),
        (["setup", f"--env={__file__}"], f"--env: line 1 of {__file__} is no variable; wanted"),
        (["logs", "--worker=x"], "--worker: found 'x'; wanted the number of a host"),
        (["status", "--", "ls"], "status: found a command after '--'; wanted none"),
        (["run"], "run: found no command; wanted one, as in run -- python -m easylm.sft"),
        (["run", "--keep-going", "--", "ls"], "found --workdir='' in the command; wanted a folder"),
        (["status"], "found no slice pod in europe-west4-a; wanted one: scripts/tpu.sh create"),
    ],
)
def test_a_wrong_command_line_exits_2_with_one_message(cloud, checkout, arguments, message):
    if arguments == ["status"]:
        arguments = ["stop"]
    out, err = tpu(cloud, checkout, *arguments, code=2)
    assert err.startswith("error: ") and message in err and err.count("\n") == 1 and not out


def test_without_gcloud(cloud, checkout):
    bare = cloud.folder / "bare"
    bare.mkdir()
    for program in ("bash", "dirname"):
        (bare / program).symlink_to(shutil.which(program))
    _, err = tpu(cloud, checkout, "status", code=2, PATH=str(bare))
    assert "wanted the Google Cloud CLI" in err


def test_setup_installs_on_every_host_what_git_tracks(cloud, checkout, tmp_path):
    (tmp_path / "token").write_text("HF_TOKEN=secret\n")
    tpu(cloud, checkout, "create", "--type=v3-16")
    _, err = tpu(cloud, checkout, "setup", "--python=3.11", f"--env={tmp_path / 'token'}")
    head = subprocess.check_output(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=checkout, text=True
    ).strip()
    assert f"2 hosts: python 3.12.1 jax 0.11.2 easylm {head}\n2 hosts: 16 devices" in err
    for host in (cloud.folder / "w0" / "easylm", cloud.folder / "w1" / "easylm"):
        assert (host / "revision").read_text().strip() == head
        assert (host / "src" / "scripts" / "tpu.sh").exists()
        assert (host / "env").stat().st_mode & 0o777 == 0o600
        installed = (host.parent / "installed").read_text()
        assert "-m uv python install --quiet 3.11" in installed and "sudo" not in installed
        assert "--editable ./src[tpu]" in installed

    # What git does not track stays here, with a word.
    (checkout / "mine.py").write_text("")
    try:
        _, err = tpu(cloud, checkout, "setup")
    finally:
        (checkout / "mine.py").unlink()
    assert "not on the hosts, for git does not track them (git add): mine.py\n" in err
    assert not (cloud.folder / "w1" / "easylm" / "src" / "mine.py").exists()

    # Files that git tracks go as they are now, and the revision says so.
    (checkout / "pyproject.toml").write_text("[project]  # changed\n")
    try:
        tpu(cloud, checkout, "setup")
    finally:
        (checkout / "pyproject.toml").write_text("[project]\n")
    assert "changed" in cloud.read("w1/easylm/src/pyproject.toml")
    assert cloud.read("w1/easylm/revision").startswith(f"{head}-changed-")
    assert not (cloud.folder / "w0" / "easylm" / "env").exists()
    (checkout / "pyproject.toml").touch()
    tpu(cloud, checkout, "setup")
    assert cloud.read("w1/easylm/revision") == head


def test_setup_from_a_git_repository(cloud, checkout):
    tpu(cloud, checkout, "create", "--type=v3-16")
    _, err = tpu(cloud, checkout, "setup", f"--ref=file://{checkout}#HEAD")
    assert cloud.read("w0/easylm/revision") in err
    assert (cloud.folder / "w1" / "easylm" / "src" / "pyproject.toml").exists()


def test_setup_refuses_hosts_that_differ_or_miss_devices(cloud, checkout):
    tpu(cloud, checkout, "create", "--type=v3-16")
    cloud.write(versions_1="python 3.12.1 jax 0.10.2")
    _, err = tpu(cloud, checkout, "setup", code=1)
    assert "host 0 (t1v-n-1234-w-0): python 3.12.1 jax 0.11.2" in err
    assert "host 1 (t1v-n-1234-w-1): python 3.12.1 jax 0.10.2" in err
    assert "error: versions: the hosts do not fit together; wanted the same versions" in err
    cloud.write(versions_1="python 3.12.1 jax 0.11.2", devices=8)
    _, err = tpu(cloud, checkout, "setup", code=1)
    assert "error: devices: the hosts do not fit together; wanted 16 devices of v3-16" in err


def test_the_host_asks_python_for_versions_and_devices(tmp_path):
    (tmp_path / "easylm" / "venv" / "bin").mkdir(parents=True)
    python = tmp_path / "easylm" / "venv" / "bin" / "python"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    python.chmod(0o700)
    (tmp_path / "easylm" / "revision").write_text("abc\n")
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
    environment["JAX_NUM_CPU_DEVICES"] = "4"
    code = "import platform, jax; print(platform.python_version(), jax.__version__)"
    python, jax = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    host = ["bash", str(SCRIPTS / "tpu_host.sh")]
    said = subprocess.check_output([*host, "versions"], env=environment, text=True)
    assert said.startswith("easylm-host|0|") and said.endswith(" easylm abc\n")
    assert f"|python {python} jax {jax} jaxlib " in said
    said = subprocess.check_output([*host, "devices", "1"], env=environment, text=True)
    assert said.endswith("|4\n")


def test_a_run_shows_the_log_of_the_host_that_prints_and_ends_as_it_does(cloud, checkout, tmp_path):
    (tmp_path / "token").write_text("# mine\n\nHF_TOKEN=sec $ret 'x")
    tpu(cloud, checkout, "create", "--type=v3-16")
    tpu(cloud, checkout, "setup", f"--env={tmp_path / 'token'}")
    cloud.write(plan="0", talker=1)
    out, err = tpu(cloud, checkout, "run", "--", *COMMAND)
    assert "host 1: token sec $ret 'x, 0\nsome more\nand more\n" in out
    assert "started on all 2 hosts" in err and "the run ended with exit code 0" in err
    for worker in (0, 1):
        assert (cloud.folder / f"w{worker}" / "arguments").read_text() == "\n".join(
            [*COMMAND[1:], ""]
        )


def test_a_host_whose_run_cannot_begin_has_an_exit_code(pod, checkout):
    shutil.rmtree(pod.folder / "w1" / "easylm" / "src")
    pod.write(plan="0")
    tpu(pod, checkout, "run", "--", *COMMAND, code=1)
    assert pod.read("w1/easylm/run/exit") == "1"


@pytest.mark.parametrize(
    ("codes", "code"), [("2,1", 2), ("76,1", 1), ("137,76", 1), ("76,75", 76), ("0,75", 75)]
)
def test_the_exit_code_of_hosts_that_differ(pod, checkout, codes, code):
    pod.write(plan=codes)
    tpu(pod, checkout, "run", "--", *COMMAND, code=code)


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_start(cloud):
    wait_for(lambda: all(cloud.read(f"w{worker}/arguments") for worker in (0, 1)))


def test_a_run_outlives_its_terminal_and_is_not_started_twice(pod, checkout):
    pod.write(plan="wait")
    script = Script(pod, checkout, "run", "--", *COMMAND)
    wait_for_start(pod)
    os.killpg(script.process.pid, signal.SIGKILL)
    for verb in (["run", "--", *COMMAND], ["setup"]):
        _, err = tpu(pod, checkout, *verb, code=2)
        assert "a run goes on on pod" in err
    out, _ = tpu(pod, checkout, "status")
    assert "pod: READY, v3-16, 2 hosts\nhost 0 (t1v-n-1234-w-0): running; and more" in out
    out, _ = tpu(pod, checkout, "logs", "--worker=all")
    assert "1| host 1: token , wait" in out and "0| and more" in out
    following = Script(pod, checkout, "logs", "-f")
    out, err = tpu(pod, checkout, "stop")
    assert "waiting for 2 hosts to save and end" in err
    assert following.result()[0].endswith("saved\n")
    out, _ = tpu(pod, checkout, "status")
    assert "host 1 (t1v-n-1234-w-1): exit code 75, told to stop; saved" in out


def test_stop_now_kills(pod, checkout):
    pod.write(plan="wait")
    script = Script(pod, checkout, "run", "--keep-going", "--", *COMMAND)
    wait_for_start(pod)
    tpu(pod, checkout, "stop", "--now")
    out, err = script.result(1)
    assert "it was told to stop; not started again" in err and "saved" not in out


def test_a_run_asks_for_hosts_that_are_set_up(cloud, checkout, tmp_path):
    tpu(cloud, checkout, "create", "--type=v3-16")
    _, err = tpu(cloud, checkout, "run", "--", *COMMAND, code=1)
    assert "not all hosts of pod answer; wanted them set up: scripts/tpu.sh setup" in err
    tpu(cloud, checkout, "setup")
    (cloud.folder / "w1" / "easylm" / "revision").write_text("other\n")
    _, err = tpu(cloud, checkout, "run", "--", *COMMAND, code=2)
    assert "the hosts of pod are not set up, or not alike" in err
    (cloud.folder / "w0" / "easylm" / "revision").write_text("other\n")
    _, err = tpu(cloud, checkout, "run", "--keep-going", "--", *COMMAND, code=2)
    assert "error: the hosts have other, this checkout is" in err
    tpu(cloud, checkout, "setup", "--python=3.11")
    _, err = tpu(cloud, checkout, "run", "--keep-going", "--", *COMMAND, code=2)
    assert "set up with python 3.11, no env, this command says python 3.12, no env" in err
    (tmp_path / "token").write_text("HF_TOKEN=secret\n")
    run = ["run", "--keep-going", "--python=3.11", f"--env={tmp_path / 'token'}", "--", *COMMAND]
    _, err = tpu(cloud, checkout, *run, code=2)
    assert "no env, this command says python 3.11, env of checksum " in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "code", "starts"),
    [
        (["75", "76", "0"], 0, 3),
        (["1", "76", "1", "1", "1", "0"], 1, 5),
        (["1", "1", "1:10", "1", "2"], 2, 5),
        (["76", "75:10", *["76"] * 12], 1, 12),
    ],
)
def test_keep_going_starts_again_what_may_go_on(pod, checkout, plan, code, starts):
    pod.write(plan="\n".join(plan), steps="5")
    _, err = tpu(pod, checkout, "run", "--keep-going", "--", *COMMAND, code=code)
    assert pod.read("starts.0").count("x") == pod.read("starts.1").count("x") == starts, err
    assert pod.verbs() == []  # the slice is as it was
    if plan[-1] == "76":
        assert "error: 10 starts from checkpoint 10 ended with no new one, though the" in err
    elif code == 1:
        assert "after 3 more tries from checkpoint 5; not started again" in err


@pytest.mark.slow
@pytest.mark.parametrize("queued", [False, True])
def test_keep_going_replaces_a_spot_slice(cloud, checkout, queued):
    kind = "queued-resources" if queued else "tpu-vm"
    options = ["--spot", *(["--queued"] if queued else []), "--service-account=a@b"]
    tpu(cloud, checkout, "create", "--type=v3-16", *options)
    tpu(cloud, checkout, "setup")
    cloud.write(plan="lost\n0")
    script = Script(cloud, checkout, "run", "--keep-going", "--", *COMMAND)
    if queued:
        wait_for(lambda: cloud.read("node") == "PREEMPTED")
        (cloud.folder / "node").unlink()  # the cloud takes it away itself
        cloud.write(queue="SUSPENDING")
        time.sleep(0.3)
        cloud.write(queue="SUSPENDED", refusals=1)
    else:
        cloud.write(refusals=2)
    _, err = script.result()
    assert "creating pod again" in err and "there is none now; asking again" in err
    asked = cloud.verbs()
    assert asked[:3] == [f"{kind} create", "tpu-vm scp", f"{kind} delete"]
    assert asked[3:] == [*[f"{kind} create"] * (2 if queued else 3), "tpu-vm scp"]
    created = [call for call in cloud.calls() if "create" in call]
    for call in created[1:]:
        assert {"--spot", "--accelerator-type=v3-16", "--service-account=a@b"} < {*call}
        assert any(word.endswith("version=runtime-x") for word in call)


@pytest.mark.slow
def test_keep_going_does_not_count_lost_slices(cloud, checkout):
    tpu(cloud, checkout, "create", "--type=v3-16", "--spot")
    tpu(cloud, checkout, "setup")
    cloud.write(plan="\n".join([*["76"] * 9, "lost", "0"]))
    tpu(cloud, checkout, "run", "--keep-going", "--", *COMMAND)
    assert cloud.read("starts.0").count("x") == 11


@pytest.mark.slow
def test_keep_going_gives_up_a_slice_that_cannot_be_set_up(cloud, checkout):
    tpu(cloud, checkout, "create", "--type=v3-16", "--spot")
    tpu(cloud, checkout, "setup")
    cloud.write(plan="lost\n0", offline="yes")
    command = ["run", "--keep-going", "--", *COMMAND]
    _, err = tpu(cloud, checkout, *command, code=1, GIVE_UP_SECONDS="1")
    assert err.count("no package index") >= 4  # of two hosts
    assert "could not be made ready, see above; asking again" in err
    assert "Nothing else for 1 s: given up; the slice stays, and is paid for" in err
    assert cloud.read("starts.0").count("x") == 1


def test_keep_going_leaves_other_slices_alone(pod, checkout):
    pod.write(plan="lost\n0")
    _, err = tpu(pod, checkout, "run", "--keep-going", "--", *COMMAND, code=76)
    assert "error: pod is PREEMPTED, and no spot slice" in err
    assert pod.verbs() == []


def test_keep_going_does_not_create_what_somebody_deleted(cloud, checkout):
    tpu(cloud, checkout, "create", "--type=v3-16", "--spot", "--queued")
    tpu(cloud, checkout, "setup")
    cloud.write(plan="wait")
    script = Script(cloud, checkout, "run", "--keep-going", "--", *COMMAND)
    wait_for_start(cloud)
    tpu(cloud, checkout, "delete", "--yes")
    _, err = script.result(76)
    assert "somebody has deleted pod and its request; not created again" in err


def test_a_host_that_does_not_answer_is_asked_again(pod, checkout):
    pod.write(plan="wait")
    script = Script(pod, checkout, "run", "--", *COMMAND)
    wait_for_start(pod)
    pod.write(mute="1")
    tpu(pod, checkout, "stop", code=1)  # reaches host 0 alone
    wait_for(lambda: pod.read("w0/easylm/run/exit") == "75")
    out, err = tpu(pod, checkout, "status")
    assert "host 0" in out and "host 1" not in out and "not all hosts answer" in err
    wait_for(lambda: "pod answer (ssh: timed out); asking again" in script.files[1].read_text())
    (pod.folder / "mute").unlink()
    tpu(pod, checkout, "stop")
    script.result(75)


@pytest.mark.parametrize(
    ("trouble", "message"), [("mute", "ssh: timed out"), ("outage", "ERROR: no login. Log in")]
)
def test_hosts_that_do_not_answer_are_given_up(pod, checkout, trouble, message):
    pod.write(plan=trouble)
    _, err = tpu(pod, checkout, "run", "--", *COMMAND, code=1, GIVE_UP_SECONDS="1")
    message = f"not all hosts of pod answer ({message})"
    assert f"\n{message}; asking again\n" in err
    assert f"\nerror: {message}. Nothing else for 1 s: given up; the slice stays" in err
    (pod.folder / trouble).unlink()
    wait_for(lambda: pod.read("w1/easylm/run/exit") == "0")
    out, _ = tpu(pod, checkout, "status")
    assert out.count("exit code 0") == 2


def test_delete_asks_first(pod, checkout):
    _, err = tpu(pod, checkout, "delete", code=1)
    assert "error: not deleted" in err and pod.read("node") == "READY"
    tpu(pod, checkout, "delete", "--yes")
    assert pod.verbs()[-1] == "tpu-vm delete"


def test_the_scripts_pass_shellcheck():
    shellcheck = shutil.which("shellcheck", path=str(pathlib.Path(sys.executable).parent))
    assert shellcheck, "pip install '.[test]' brings it"
    scripts = sorted(map(str, SCRIPTS.glob("*.sh")))
    subprocess.run([shellcheck, "--external-sources", *scripts], check=True, cwd=SCRIPTS.parent)
