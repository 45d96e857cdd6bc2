"""Runs in a bucket that fails now and then, too often, or for good."""

import json
import time

import numpy as np
import pytest
from safetensors.numpy import load

from easylm import storage
from easylm.checkpoint import find_checkpoint, latest_step
from tests import bucket
from tests.fault_proxy import BUSY, HANG, LOSE_ANSWER, LOSE_REQUEST, MILD, running_proxy
from tests.runs import RANDOM, arguments, make_folder, metrics, start

pytestmark = pytest.mark.slow
OPTIONS = {**RANDOM, "steps": 16, "checkpoint.every": 4, "export.every": 8, "cpu_devices": 2}
# Gives up after seconds, where the command does after minutes.
IMPATIENT = """\
from easylm import bucket, sft, storage
from easylm.command import run_command

bucket.PATIENCE_SECONDS, bucket.SILENCE_SECONDS, storage.TENSORSTORE_RETRIES = 4, 2, 2
run_command(sft.main)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def whole(folder):
    """The run that nothing disturbs, on a disk."""
    process = start(arguments(folder, folder / "whole", OPTIONS), without="XLA_FLAGS")
    assert process.wait() == 0, process.stderr.read()
    return folder / "whole"


@pytest.fixture(scope="module")
def root(folder):
    with bucket.running_bucket() as root:
        storage.write_bytes(f"{root}/rows.jsonl", (folder / "rows.jsonl").read_bytes())
        yield root


def start_run(folder, root, name, **how):
    """The run, with all that it reads and writes in the bucket."""
    places = {"data.sources": f"{root}/rows.jsonl", "data.cache": f"{root}/{name}/prepared"}
    home = folder / f"home_{name}"
    home.mkdir(exist_ok=True)
    options = arguments(folder, f"{root}/{name}", {**OPTIONS, **places})
    return start(options, without="XLA_FLAGS", HOME=str(home), **how)


def check_same(root, name, whole):
    for step in (8, 16):
        found = load(storage.read_bytes(f"{root}/{name}/hf/{step}/model.safetensors"))
        wanted = load((whole / "hf" / str(step) / "model.safetensors").read_bytes())
        assert found.keys() == wanted.keys()
        for key, array in wanted.items():
            np.testing.assert_array_equal(found[key].view(np.uint8), array.view(np.uint8))
    lines = storage.read_bytes(f"{root}/{name}/metrics.jsonl").decode().splitlines()
    found = [json.loads(line) for line in lines]
    same = ("step", "loss", "grad_norm", "target_tokens")
    assert [[line[key] for key in same] for line in found] == [
        [line[key] for key in same] for line in metrics(whole)
    ]


def check_message(printed, path):
    """One message, which names what was to be read or written there, and nothing after it."""
    assert "Traceback" not in printed
    assert printed.count("error:") == 1
    assert path in printed[printed.index("error:") :].replace("\n  ", " ")


@pytest.mark.parametrize("seed", [1])
def test_a_run_in_a_bucket_with_faults_ends_with_the_same_bits(folder, root, whole, seed):
    with running_proxy(seed, MILD) as proxy:
        process = start_run(folder, root, f"mild{seed}")
        printed = process.communicate()[1]
    assert process.returncode == 0, printed
    assert set(proxy.made) == set(MILD)
    check_same(root, f"mild{seed}", whole)


@pytest.mark.parametrize("fault", [503, 403, HANG], ids=str)
def test_a_run_stops_when_its_bucket_dies_and_goes_on_when_it_is_well(folder, root, whole, fault):
    name = f"dead_{fault}".replace(" ", "_")
    low = {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "2"}
    with running_proxy() as proxy:
        process = start_run(folder, root, name, program=("-c", IMPATIENT), **low)
        while process.poll() is None and (latest_step(f"{root}/{name}") or 0) < 4:
            time.sleep(0.05)
        proxy.always = fault
        printed = process.communicate(timeout=120)[1]
        assert process.returncode == (2 if fault == 403 else 1), printed
        check_message(printed, f"{root}/{name}")
        proxy.always = None
        step = latest_step(f"{root}/{name}")
        assert 4 <= step < 16
        assert find_checkpoint(f"{root}/{name}") == f"{root}/{name}/checkpoints/{step}"
        process = start_run(folder, root, name)
        printed = process.communicate()[1]
    assert process.returncode == 0, printed
    assert f"going on after step {step} of 16" in printed
    check_same(root, name, whole)


def test_a_run_with_too_many_faults_says_so(folder, root):
    rates = dict.fromkeys((*BUSY, LOSE_REQUEST, LOSE_ANSWER), 0.18)
    with running_proxy(3, rates):
        process = start_run(folder, root, "often", program=("-c", IMPATIENT))
        printed = process.communicate(timeout=120)[1]
    assert process.returncode == 1, printed
    check_message(printed, f"{root}/")
