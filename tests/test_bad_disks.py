"""Disks that are full or read-only, and checkpoints that they have damaged.

Each ends with one message, and once it is mended the run goes on to the same bits.
"""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from easylm import sft
from easylm.command import format_error
from easylm.errors import InputError
from tests.runs import RANDOM, arguments, make_folder
from tests.test_bad_inputs import check_message

OPTIONS = {**RANDOM, "steps": 12, "checkpoint.every": 2, "checkpoint.keep": 9}
# In namespaces of its own a process may mount what nobody else sees, also without being root.
OWN_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("bad_disks"))


@pytest.fixture(scope="module")
def whole(folder):
    """The run that nothing disturbs."""
    sft.main(arguments(folder, folder / "whole", OPTIONS))
    return folder / "whole"


@pytest.fixture
def interrupted(whole, tmp_path):
    """The same after step 10, as if it had been killed."""
    run = pathlib.Path(shutil.copytree(whole, tmp_path / "run"))
    for part in ("hf", "plots", "checkpoints/12"):
        shutil.rmtree(run / part)
    return run


def check_same_model(run: pathlib.Path, whole: pathlib.Path) -> None:
    file = "hf/model.safetensors"
    assert (run / file).read_bytes() == (whole / file).read_bytes()


def a_missing_file(step: pathlib.Path) -> str:
    (step / "params" / "manifest.ocdbt").unlink()
    return "/params: cannot be restored"


def a_truncated_array(step: pathlib.Path) -> str:
    largest = max((step / "opt_state").rglob("d/*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    return "/opt_state: cannot be restored"


def no_bundle(step: pathlib.Path) -> str:
    shutil.rmtree(step / "bundle")
    return "/bundle: cannot be restored"


def a_truncated_bundle(step: pathlib.Path) -> str:
    os.truncate(step / "bundle" / "metadata", 1000)
    return "/bundle: cannot be restored"


def another_model(step: pathlib.Path) -> str:
    path = step / "bundle" / "metadata"
    bundle = json.loads(path.read_text())
    bundle["model_config"] |= {"hidden_size": 64, "head_dim": 16}
    path.write_text(json.dumps(bundle))
    return "/params: cannot be restored"


DAMAGES = [a_missing_file, a_truncated_array, no_bundle, a_truncated_bundle, another_model]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_and_without_it_the_one_before_it_is_used(
    folder, whole, interrupted, damage, capsys
):
    newest = interrupted / "checkpoints" / "10"
    wanted = damage(newest)
    command = arguments(folder, interrupted, OPTIONS)
    with pytest.raises(InputError) as error:
        sft.main(command)
    print(error.value)
    said = check_message(format_error(error.value))
    assert f"{newest}{wanted}" in said
    assert "move this folder away to use an older one" in said
    newest.rename(interrupted / "damaged")
    capsys.readouterr()
    sft.main(command)
    assert "going on after step 8 of 12" in capsys.readouterr().err
    check_same_model(interrupted, whole)


@pytest.fixture(scope="module")
def in_small_disk(folder):
    """`in_small_disk(size, *scripts)` runs shell scripts with a disk of its own, empty, at $DISK.

    $RUN is the command in WORKDIR=$DISK/run. Gives (exit code, what it printed) of each script.
    """
    tried = subprocess.run([*OWN_MOUNTS, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"this machine lets nobody mount a disk of their own: {tried.stderr.strip()}")
    disk = folder / "disk"
    disk.mkdir()
    command = [sys.executable, "-m", "easylm.sft", *arguments(folder, disk / "run", OPTIONS)]

    def run(size: str, *scripts: str) -> list[tuple[int, str]]:
        lines = [f"mount -t tmpfs -o size={size} tmpfs $DISK"]
        logs = [folder / f"log{number}" for number in range(len(scripts))]
        for script, log in zip(scripts, logs, strict=True):
            lines.append(f"if ({script}) >{log} 2>&1; then echo 0; else echo $?; fi")
        done = subprocess.run(
            [*OWN_MOUNTS, "sh", "-ec", "\n".join(lines)],
            env={**os.environ, "DISK": str(disk), "RUN": shlex.join(command)},
            cwd=pathlib.Path(sft.__file__).parent.parent,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        codes = map(int, done.stdout.split())
        return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]

    return run


def refusal(ended: tuple[int, str]) -> str:
    """The one message of a command that left with 2."""
    code, printed = ended
    assert code == 2, printed
    assert "Traceback" not in printed
    message = printed[printed.index("error:") :]
    print(message)
    return check_message(message)


@pytest.mark.slow
def test_a_disk_that_is_full_ends_the_run_and_with_more_room_it_goes_on(
    folder, whole, in_small_disk
):
    full, listed, again, _ = in_small_disk(
        "1700k",
        "eval $RUN",
        "ls $DISK/run/checkpoints",
        "mount -o remount,size=50m $DISK; eval $RUN",
        f"cp -r $DISK/run {folder / 'again'}",
    )
    said = refusal(full)
    assert "No space left on device" in said or "the disk is full" in said
    assert f"{folder / 'disk' / 'run'}/" in said
    assert "start the same command again" in said
    steps = [int(name) for name in listed[1].split() if name.isdigit()]
    assert steps and max(steps) < 12
    assert again[0] == 0, again[1]
    assert f"going on after step {max(steps)} of 12" in again[1]
    check_same_model(folder / "again", whole)
    left = os.listdir(folder / "again" / "checkpoints")
    assert sorted(map(int, left)) == [2, 4, 6, 8, 10, 12]


@pytest.mark.slow
def test_a_workdir_that_is_read_only_is_refused(folder, in_small_disk):
    (ended,) = in_small_disk("2m", "mkdir $DISK/run; mount -o remount,ro $DISK; eval $RUN")
    said = refusal(ended)
    assert f"{folder / 'disk' / 'run'}" in said
    assert "the file system is read-only" in said
