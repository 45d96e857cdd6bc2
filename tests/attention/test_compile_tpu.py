"""The TPU backends compile for the TPUs they are meant for, sharded, forward and backward."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def programs():
    pytest.importorskip("libtpu")
    environment = os.environ | {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUMPY_RANK_PROMOTION": "allow",
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.attention.compile_for_tpu"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("case", ["v4 splash", "v4 splash 64", "v5e splash"])
def test_splash_compiles(programs, case):
    assert programs[case]["kernels"] > 0


@pytest.mark.parametrize("case", ["v3 flash", "v3 flash 64"])
def test_flash_compiles_where_bfloat16_kernels_do_not(programs, case):
    assert programs[case]["kernels"] > 0


def test_auto_on_v3_is_xla_alone(programs):
    assert programs["v3 blockwise"]["kernels"] == 0


def test_blockwise_takes_less_memory_than_flash_on_v3(programs):
    blockwise, flash = (programs[f"v3 {name}"] for name in ("blockwise", "flash"))
    assert blockwise["temporary_bytes"] < flash["temporary_bytes"]
