"""Exit codes and messages of the process boundary, each in a process of its own."""

import os
import signal
import subprocess
import sys
import time

import pytest

from easylm.command import format_error
from easylm.errors import InputError

PROGRAM = """
from easylm.command import run_command
from easylm.errors import InputError

def main(argv):
{body}

run_command(main)
"""


def run(body, *arguments, stdout=subprocess.PIPE):
    program = PROGRAM.format(body="\n".join(f"    {line}" for line in body.splitlines()))
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


def test_success_passes_the_arguments_on():
    result = run("print(argv)\nreturn None", "--a=1", "b")
    assert (result.returncode, result.stdout) == (0, "['--a=1', 'b']\n")


def test_the_exit_code_of_main_is_kept():
    assert run("return 75").returncode == 75


def test_input_error_is_one_message_and_code_2():
    result = run("raise InputError('data.seq_len must be at least 2, got 0')")
    assert result.returncode == 2
    assert result.stderr == "error: data.seq_len must be at least 2, got 0\n"
    assert result.stdout == ""


def test_a_fault_shows_its_traceback_and_code_1():
    result = run("raise ValueError('a fault of ours')")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "ValueError: a fault of ours" in result.stderr


def test_a_preempted_command_says_so_with_code_75():
    body = "from easylm.errors import PreemptedError\nraise PreemptedError('saved after step 3')"
    result = run(body)
    assert (result.returncode, result.stderr) == (75, "saved after step 3\n")


def test_a_loss_that_is_not_finite_is_one_message_and_code_1():
    result = run("raise FloatingPointError('step 3: loss is nan')")
    assert (result.returncode, result.stderr) == (1, "error: step 3: loss is nan\n")


def test_interrupt_is_quiet_and_code_130():
    body = "import time\nprint('ready', flush=True)\ntime.sleep(60)"
    program = PROGRAM.format(body="\n".join(f"    {line}" for line in body.splitlines()))
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.05)  # the line is printed just before the sleep that the signal must interrupt
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (130, b"")


@pytest.mark.parametrize(
    "body",
    ["print('a line')", "print('a line')\nraise SystemExit", "print('a line', flush=True)"],
    ids=["at the end", "help", "in between"],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_of_stdout_who_leaves_is_no_error(monkeypatch, body, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    reader, writer = os.pipe()
    os.close(reader)
    result = run(body, stdout=writer)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


def test_another_broken_pipe_is_a_fault():
    result = run("print('a line')\nraise BrokenPipeError('of a worker')")
    assert (result.returncode, result.stdout) == (1, "a line\n")
    assert "BrokenPipeError: of a worker" in result.stderr


def test_messages_wrap_at_80_columns_but_paths_stay_whole():
    path = "/data/" + "very-long-folder-name/" * 5 + "train.jsonl"
    message = format_error(InputError(f"{path}:17: {'words ' * 30}\n  second line stays apart"))
    lines = message.splitlines()
    assert path in message
    assert all(len(line) <= 80 for line in lines if path not in line)
    assert lines[-1] == "  second line stays apart"
    assert len(lines) > 3
