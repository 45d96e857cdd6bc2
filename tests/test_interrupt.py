"""A run that is killed, or told to go, ends as if nothing had happened."""

import os
import pathlib
import signal
import time

import pytest
from safetensors.numpy import load_file

from easylm import sft
from easylm.config import read_json
from tests.runs import RANDOM, arguments, make_folder, metrics, start

OPTIONS = {**RANDOM, "steps": 60, "checkpoint.every": 4, "checkpoint.keep": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("interrupt"))


@pytest.fixture(scope="module")
def whole(folder):
    """The run that nothing interrupts."""
    sft.main(arguments(folder, folder / "whole", OPTIONS))
    return folder / "whole"


def signal_at(process, workdir: pathlib.Path, step: int, number: int) -> None:
    """Sends a signal once metrics.jsonl has a line of `step`."""
    while process.poll() is None:
        if (workdir / "metrics.jsonl").exists():
            lines = metrics(workdir)
            if lines and lines[-1]["step"] >= step:
                process.send_signal(number)
                return
        time.sleep(0.002)
    raise AssertionError(f"ended by itself: {process.communicate()[1]}")


def check_same_result(run: pathlib.Path, whole: pathlib.Path) -> None:
    found, wanted = (load_file(path / "hf" / "model.safetensors") for path in (run, whole))
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in wanted.items()
    }
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(whole)]
    assert [line["step"] for line in metrics(run)] == list(range(1, 61))


def test_killed_again_and_again_it_ends_with_the_same_bits(folder, whole):
    workdir = folder / "killed"
    for step in (2, 17, 44):  # before the first save, and wherever it is later
        # The devices come from the config here: it must be heard before a checkpoint loads jax.
        options = {**OPTIONS, "cpu_devices": 8}
        process = start(arguments(folder, workdir, options), without="XLA_FLAGS")
        signal_at(process, workdir, step, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (workdir / "hf").exists()
    sft.main(arguments(folder, workdir, OPTIONS))
    check_same_result(workdir, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_run_that_is_told_to_stop_saves_and_the_same_command_goes_on(folder, whole, number):
    workdir = folder / number.name
    process = start(arguments(folder, workdir, OPTIONS))
    signal_at(process, workdir, 10, number)
    printed = process.communicate()[1]
    assert process.returncode == 75, printed
    assert "the checkpoint is saved" in " ".join(printed.split())
    assert "Traceback" not in printed
    done = metrics(workdir)[-1]["step"]
    assert 10 <= done < 60
    assert os.listdir(workdir / "checkpoints") == [str(done)]
    assert read_json(str(workdir / "config.json"))["steps"] == 60
    process = start(arguments(folder, workdir, OPTIONS))
    printed = process.communicate()[1]
    assert process.returncode == 0, printed
    assert f"going on after step {done} of 60" in printed
    check_same_result(workdir, whole)
