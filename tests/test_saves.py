"""Saves go on beside the training: what they hold, what they say, and how they end."""

import contextlib
import ctypes
import dataclasses
import os
import re
import resource
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint._src.serialization import replica_slices, serialization

from easylm import storage
from easylm.checkpoint import latest_step, read_params, write_params
from easylm.errors import InputError
from easylm.saving import Checkpointer
from easylm.sharding import make_mesh
from easylm.trainers.options import CheckpointConfig, ExportConfig
from easylm.trainers.save import Saver
from easylm.trainers.step import TrainState
from easylm.workdir import has_checkpoints
from tests import bucket
from tests.runs import start

LARGE = 1 << 20
FEW = {"a": jnp.arange(5.0)}
# Split over the devices, whole on each of them, and small.
PLACES = {"split": P("fsdp"), "whole": P(), "few": P()}


def update(state):
    return jax.tree.map(lambda x: 1.5 * x + 1, state)


def after(steps: int) -> dict:
    """A state, changed so many times."""
    state = {"split": jnp.arange(LARGE, dtype=jnp.float32), "whole": jnp.ones(LARGE), "few": 2.0}
    mesh = make_mesh("1,8,1")
    state = jax.device_put(
        state, {name: NamedSharding(mesh, place) for name, place in PLACES.items()}
    )
    for _ in range(steps):
        state = jax.jit(update, donate_argnums=0)(state)
    return jax.block_until_ready(state)


def read(workdir, step: int, like: dict) -> dict:
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    return read_params(f"{workdir}/checkpoints/{step}", abstract)


def same_bits(found: dict, wanted: dict) -> dict[str, bool]:
    return {name: np.array_equal(found[name], wanted[name]) for name in wanted}


@pytest.fixture
def gate(monkeypatch):
    """Until it is set, saves have taken their arrays and write nothing."""
    opened, write = threading.Event(), serialization.async_serialize_from_host

    async def wait_and_write(*args, **kwargs):
        opened.wait()
        await write(*args, **kwargs)

    monkeypatch.setattr(serialization, "async_serialize_from_host", wait_and_write)
    yield opened
    opened.set()


def without_telling_jax(monkeypatch):
    """Lets saves take the shards of arrays, which on a CPU are not copied, by address alone."""

    def by_address(part):
        array = part.data()
        if part.slice_args is not None:  # a copy already
            return np.asarray(array)
        memory = (ctypes.c_byte * array.nbytes).from_address(array.unsafe_buffer_pointer())
        return np.frombuffer(memory, array.dtype).reshape(array.shape)

    def take(arrays, *args, enable_pinned_host_transfer=False, **options):
        taken = [replica_slices.get_replica_slices(x, *args, **options) for x in arrays]
        return [
            dataclasses.replace(
                slices,
                is_on_host=True,
                replica_slices=[
                    dataclasses.replace(part, unsliced_data=by_address(part), slice_args=None)
                    for part in slices.replica_slices
                ],
            )
            for slices in taken
        ]

    monkeypatch.setattr(replica_slices, "transfer_arrays_to_host", take)


@pytest.mark.parametrize("known_to_jax", [True, False])
def test_steps_never_overwrite_what_is_being_saved(gate, known_to_jax, tmp_path, monkeypatch):
    if not known_to_jax:  # then they do, and this test would see it
        without_telling_jax(monkeypatch)
    checkpointer = Checkpointer(str(tmp_path), keep=2)
    state = after(3)
    checkpointer.save(3, state, FEW, {})
    for _ in range(4):
        state = jax.jit(update, donate_argnums=0)(state)
    jax.block_until_ready(state)
    assert latest_step(str(tmp_path)) is None
    gate.set()
    checkpointer.close()
    wanted = after(3)
    same = same_bits(read(tmp_path, 3, wanted), wanted)
    assert same == {"split": known_to_jax, "whole": True, "few": known_to_jax}
    assert same_bits(state, after(7)) == dict.fromkeys(wanted, True)


def saver(workdir, **options) -> Saver:
    config = type(
        "Config", (), {"checkpoint": CheckpointConfig(**options), "export": ExportConfig()}
    )
    return Saver(config, str(workdir), export=None, bundle={})


def test_nothing_else_asks_jax_whether_to_stop(tmp_path, monkeypatch):
    # All hosts must ask equally often, and with the same numbers.
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    checkpointer = Checkpointer(str(tmp_path), keep=1)
    for step in (5, 9):
        checkpointer.save(step, FEW, FEW, {})
    checkpointer.close()
    assert latest_step(str(tmp_path)) == 9
    assert asked == []


@pytest.mark.parametrize(("grace", "warned"), [(30.0, False), (0.1, True)])
def test_the_first_save_says_what_it_took(gate, grace, warned, tmp_path, capfd):
    run = saver(tmp_path, every=7, grace_seconds=grace)
    state = TrainState(jnp.int32(7), after(0), FEW)
    run.save(7, state)
    time.sleep(0.2)
    assert capfd.readouterr().err == ""  # it is not complete
    gate.set()
    run.save(14, state)
    run.close()
    said = " ".join(capfd.readouterr().err.split())
    numbers = r"saved step 7: 0\.00839 GB in (.*) s; training waited for (.*) s of them"
    seconds, waited = map(float, re.match(numbers, said).groups())
    assert seconds >= 0.2 > waited - 0.1
    assert said.count("saved step") == 1
    warning = "warning: that is longer than the 0.1 s that a run may have between being told to"
    assert (warning in said) == warned
    assert ("up to 7 steps (checkpoint.every) back" in said) == warned


@contextlib.contextmanager
def small_files_only():
    """Within it a file larger than 64 kB cannot be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_fails_ends_the_run_at_the_next_step(tmp_path, capfd):
    run = saver(tmp_path, every=10)
    run.save(10, TrainState(jnp.int32(10), FEW, FEW))
    assert not run.due(11)
    with small_files_only():
        run.save(20, TrainState(jnp.int32(20), after(0), FEW))
        with pytest.raises(
            InputError, match=r"checkpoints/20: cannot be written: File too large\."
        ):
            for _ in range(1000):
                assert not run.due(21)
                time.sleep(0.01)
    run.close()
    assert latest_step(str(tmp_path)) == 10
    assert "Traceback" not in capfd.readouterr().err


def test_a_conversion_that_fails_leaves_nothing(tmp_path, capfd):
    with (
        small_files_only(),
        pytest.raises(InputError, match=r"new: cannot be written: File too large"),
    ):
        write_params(str(tmp_path / "new"), after(0), {})
    assert os.listdir(tmp_path) == []
    assert "Traceback" not in capfd.readouterr().err


def test_a_save_that_fails_last_is_an_error_too(tmp_path, capfd):
    run = saver(tmp_path)
    with small_files_only():
        run.save(20, TrainState(jnp.int32(20), after(0), FEW))
        with pytest.raises(InputError, match=r"start the same command again"):
            run.close()
    assert latest_step(str(tmp_path)) is None
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("error", [FloatingPointError, KeyboardInterrupt])
def test_a_save_under_way_is_finished_whatever_ends_the_run(
    gate, error, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr("easylm.saving.SAID_AFTER_SECONDS", 0.1)
    threading.Timer(0.3, gate.set).start()
    state = after(1)
    with pytest.raises(error), contextlib.closing(saver(tmp_path)) as run:
        run.save(1, TrainState(jnp.int32(1), state, FEW))
        raise error
    assert "finishing the checkpoint" in capfd.readouterr().err
    assert same_bits(read(tmp_path, 1, state), state) == dict.fromkeys(state, True)


INTERRUPTED = """\
import sys, threading
import jax.numpy as jnp
from orbax.checkpoint._src.serialization import serialization
from easylm.command import run_command
from easylm.saving import Checkpointer

async def never(*args, **kwargs):
    threading.Event().wait()

def main(argv):
    x = {"a": jnp.ones(5)}
    checkpointer = Checkpointer(argv[0], keep=2)
    checkpointer.save(1, x, x, {})
    checkpointer.save(2, x, x, {})
    serialization.async_serialize_from_host = never
    checkpointer.save(3, x, x, {})
    print("saving", flush=True)
    checkpointer.close()

run_command(main)
"""


def test_ctrl_c_discards_the_save_that_is_waited_for(tmp_path):
    process = start([str(tmp_path)], program=("-c", INTERRUPTED))
    assert process.stdout.readline() == "saving\n", process.communicate()[1]
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in printed
    assert latest_step(str(tmp_path)) == 2
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2", "3.orbax-checkpoint-tmp"]


def test_what_was_cut_off_is_removed_and_the_newest_stay(tmp_path):
    folder = tmp_path / "checkpoints"
    for rest in ("3.orbax-checkpoint-tmp/params", "9.orbax-checkpoint-tmp"):
        (folder / rest).mkdir(parents=True)
    (folder / "2.set aside").mkdir()
    checkpointer = Checkpointer(str(tmp_path), keep=2)
    assert os.listdir(folder) == ["2.set aside"]
    for step in range(4, 8):
        checkpointer.save(step, FEW, FEW, {})
    checkpointer.close()
    assert sorted(os.listdir(folder)) == ["2.set aside", "6", "7"]


def test_a_step_is_not_saved_twice(tmp_path):
    checkpointer = Checkpointer(str(tmp_path), keep=2)
    checkpointer.save(4, FEW, FEW, {})
    with pytest.raises(InputError, match=r"checkpoints/4: .*already exists"):
        checkpointer.save(4, after(0), FEW, {})
    checkpointer.close()
    assert same_bits(read(tmp_path, 4, FEW), FEW) == {"a": True}


def test_in_a_bucket_too_what_was_cut_off_is_removed_and_the_newest_stay():
    # Nothing can be renamed there: a step has its name before it is complete.
    with bucket.running_bucket() as root:
        folder = f"{root}/run/checkpoints"
        storage.write_bytes(f"{folder}/3/params/d/x", b"")
        storage.write_bytes(f"{folder}/2.set aside/x", b"")
        assert latest_step(f"{root}/run") is None
        assert not has_checkpoints(f"{root}/run")
        checkpointer = Checkpointer(f"{root}/run", keep=2)
        assert storage.list_folders(folder) == ["2.set aside"]
        for step in range(3, 7):
            checkpointer.save(step, FEW, FEW, {})
        checkpointer.close()
        assert storage.list_folders(folder) == ["2.set aside", "5", "6"]
        assert has_checkpoints(f"{root}/run")
        assert same_bits(read(f"{root}/run", 6, FEW), FEW) == {"a": True}
