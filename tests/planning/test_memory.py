"""Planned memory against the memory that a run of the same step takes."""

import pathlib
import subprocess
import sys

import pytest

from easylm.planning.compiled import compile_step
from easylm.planning.topology import parse_topology
from tests.planning.run_step import program

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_run_takes_the_memory_that_was_planned(tmp_path):
    mesh = "2,2,2"
    planned, _ = compile_step(program(mesh), parse_topology("cpu:8"), str(tmp_path))
    command = [sys.executable, "-m", "tests.planning.run_step", mesh]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    # All devices are of one process here.
    assert 8 * planned.total == pytest.approx(int(run.stdout), rel=0.2)
