"""benchmarks/faults.py: that it runs, and that it would see what must not happen."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from benchmarks import fault_runs, faults
from easylm.saving import Checkpointer

STATE = {"a": jnp.arange(7.0)}


@pytest.fixture
def workdir(tmp_path):
    checkpointer = Checkpointer(str(tmp_path), keep=2)
    for step in (4, 8):
        checkpointer.save(step, STATE, STATE, BUNDLE | {"step": step})
    checkpointer.close()
    return tmp_path


BUNDLE = {"format": "easylm-1", "model_config": {}, "run_config": {}, "tokenizer": {}}


def checked(workdir, states: dict) -> faults.Tally:
    tally = faults.Tally()
    faults.check_newest(SimpleNamespace(states=states), workdir, tally)
    return tally


def test_the_newest_checkpoint_must_hold_the_bits_of_its_step(workdir):
    same = fault_runs.read_checkpoint(workdir, 4)
    assert len(same) == 2
    assert checked(workdir, {8: same}).is_good
    name = next(iter(same))
    assert not checked(workdir, {8: same | {name: b"other"}}).is_good


def test_a_newest_checkpoint_that_cannot_be_read_is_counted(workdir):
    os.unlink(workdir / "checkpoints" / "8" / "opt_state" / "manifest.ocdbt")
    tally = checked(workdir, {})
    assert tally.counts["unreadable"] == 1
    assert not tally.is_good


def test_what_a_run_ends_with_is_compared_part_by_part(workdir):
    result = fault_runs.Result({"w": b"1"}, {"w": b"2"}, [{"step": 1, "loss": 2.0}], b"")
    other = result._replace(metrics=[], state={"w": b"3"})
    assert result.differences(result) == []
    assert result.differences(other) == ["state", "metrics"]
    tally = faults.Tally()
    tally.differing.update(result.differences(other))
    assert not tally.is_good


def test_hosts_must_end_with_the_code_of_a_lost_host():
    tally = faults.Tally()
    tally.codes.update([76, 76])
    assert tally.is_good
    tally.codes.update([None])  # did not end
    assert not tally.is_good


def test_what_a_killed_save_leaves_counts_as_inside_a_save(workdir):
    assert fault_runs.unfinished(workdir) == []
    shutil.copytree(workdir / "checkpoints" / "8", workdir / "checkpoints/9.orbax-checkpoint-tmp")
    assert fault_runs.unfinished(workdir) == ["9.orbax-checkpoint-tmp"]


@pytest.mark.slow
def test_two_runs_are_killed_and_end_with_the_same_bits(tmp_path):
    output = tmp_path / "faults.json"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.faults",
            "--runs=2",
            "--dpo_runs=0",
            f"--output={output}",
        ],
        capture_output=True,
        text=True,
        cwd=fault_runs.ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(output.read_text())["1 host"]["sft"]
    assert figures["runs"] == 2
    assert figures["kills"] >= 2
    assert figures["starts"] >= 4
    assert figures["mismatches"] == {}
