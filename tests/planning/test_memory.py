"""Planned memory against the memory that a run of the same config takes."""

import pathlib
import subprocess
import sys

import pytest

from tests.planning.run_step import program

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_run_takes_the_memory_that_was_planned():
    mesh = "2,2,2"
    step = program(mesh)
    memory = step.jitted().lower(step.state, step.batch).compile().memory_analysis()
    # All devices are of one process here. The state that comes out lies where the old one lay.
    planned = 8 * (memory.argument_size_in_bytes + memory.temp_size_in_bytes)
    command = [sys.executable, "-m", "tests.planning.run_step", mesh]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert planned == pytest.approx(int(run.stdout), rel=0.2)
