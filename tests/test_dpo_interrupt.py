"""A preference run that is killed, or told to go, ends as if nothing had happened."""

import os
import pathlib
import shutil
import signal

import pytest

from easylm import dpo
from easylm.errors import InputError
from easylm.reference import ReferenceParts
from tests.runs import (
    PAIRS,
    PAIRS_OPTIONS,
    RANDOM,
    arguments,
    make_pairs_folder,
    metrics,
    start,
    write_rows,
)
from tests.test_interrupt import signal_at

# Seven batches for the reference, of eight rows each, and one to evaluate on.
MANY = [{**pair, "prompt": f"{n}: {pair['prompt']}"} for n in range(4) for pair in PAIRS]
# The command, whose pass of the reference keeps every batch at once; after so many a signal comes.
SIGNALLED = """\
import os, sys
from easylm import dpo, reference
from easylm.command import run_command
from easylm.trainers import reference as pass_of_the_reference

number, left = int(sys.argv.pop(1)), int(sys.argv.pop(1))
pass_of_the_reference.SECONDS_BETWEEN_PARTS = 0
add = reference.ReferenceParts.add

def add_then_signal(parts, name, table):
    global left
    add(parts, name, table)
    left -= 1
    if not left:
        os.kill(os.getpid(), number)

reference.ReferenceParts.add = add_then_signal
run_command(dpo.main)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = make_pairs_folder(tmp_path_factory.mktemp("dpo_interrupt"))
    write_rows(path / "rows.jsonl", MANY)
    return path


@pytest.fixture(scope="module")
def options(folder):
    """Of a run on weights that a short run leaves."""
    dpo.main(arguments(folder, folder / "start", {**RANDOM, **PAIRS_OPTIONS, "steps": 1}))
    return {
        "init_from": folder / "start" / "hf",
        "data.seq_len": 240,
        "data.eval_sources": folder / "eval.jsonl",
        "steps": 30,
        "checkpoint.every": 4,
        "checkpoint.keep": 1,
    }


@pytest.fixture(scope="module")
def whole(folder, options):
    """The run that nothing interrupts."""
    dpo.main(arguments(folder, folder / "whole", options))
    return folder / "whole"


def check_same(run: pathlib.Path, whole: pathlib.Path) -> None:
    """The two left the same bits, and say the same of every step."""
    for file in ("hf/model.safetensors", "reference.npz"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()
    found, wanted = (
        [{name: value for name, value in line.items() if "second" not in name} for line in lines]
        for lines in (metrics(run), metrics(whole))
    )
    assert found == wanted


def pairs_known(cache: pathlib.Path) -> int:
    (name,) = os.listdir(cache / "reference")
    return len(ReferenceParts(f"{cache / 'reference' / name}").load())


def test_interrupted_in_the_pass_of_the_reference_it_ends_with_the_same_bits(
    folder, options, whole, capsys
):
    workdir, cache = folder / "early", folder / "early_cache"
    command = arguments(folder, workdir, {**options, "data.cache": cache})
    found = []
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)):
        process = start(command, program=["-c", SIGNALLED, str(int(number)), "2"])
        printed = process.communicate()[1]
        assert process.returncode == code, printed
        assert "Traceback" not in printed
        found.append(pairs_known(cache))
        assert not (workdir / "reference.npz").exists()
        assert not (workdir / "checkpoints").exists()
    assert 0 < found[0] < found[1] < 120
    said = f"in the pass of the reference, after {found[1]} of 120 pairs; they are kept"
    assert said in " ".join(printed.split())
    dpo.main(command)
    assert f"of 125 pairs, {found[1]} of them computed before" in capsys.readouterr().err
    check_same(workdir, whole)


def test_interrupted_in_training_it_goes_on_without_what_it_started_from(
    folder, options, whole, tmp_path
):
    # Whoever stops for long may find neither the weights it started from nor the cache again.
    workdir, cache, weights = folder / "late", folder / "late_cache", options["init_from"]
    command = arguments(folder, workdir, {**options, "data.cache": cache})
    shutil.copytree(folder / "prepared", cache)
    process = start(command, program=["-m", "easylm.dpo"])
    signal_at(process, workdir, 10, signal.SIGKILL)  # two have been saved, one of them surely whole
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    table = (workdir / "reference.npz").stat().st_mtime_ns
    shutil.rmtree(cache)
    weights.rename(tmp_path / "gone")
    try:
        process = start(command, program=["-m", "easylm.dpo"])
        signal_at(process, workdir, 16, signal.SIGTERM)
        printed = process.communicate()[1]
        assert process.returncode == 75, printed
        assert "the checkpoint is saved" in " ".join(printed.split())
        assert "Traceback" not in printed
        dpo.main(command)
    finally:
        (tmp_path / "gone").rename(weights)
    assert not (cache / "reference").exists()
    assert (workdir / "reference.npz").stat().st_mtime_ns == table
    check_same(workdir, whole)


def test_a_run_whose_table_is_gone_does_not_take_what_it_has_become_for_the_reference(
    folder, options, whole, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / "reference.npz").unlink()
    with pytest.raises(
        InputError, match=r"run/reference\.npz: no such .* the pairs it started with"
    ):
        dpo.main(arguments(folder, workdir, options))
