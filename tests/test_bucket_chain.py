"""From rows to answers with every path in a bucket, and nothing but caches on the disk."""

import gzip
import io
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time

import pyarrow
import pyarrow.parquet
import pytest
from safetensors.numpy import load, load_file

import easylm
from easylm import storage
from easylm.checkpoint import latest_step
from easylm.reference import ReferenceTable
from tests import bucket
from tests.runs import COMMON, CONFIG, PAIRS, PAIRS_OPTIONS, RANDOM, ROWS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root():
    with bucket.running_bucket() as root:
        yield root


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The folders that a process can find without being told; of HOME, caches may fill .cache."""
    folder = tmp_path_factory.mktemp("places")
    for name in ("home", "temporary", "here"):
        (folder / name).mkdir()
    for name in ("SftConfig", "DpoConfig"):
        (folder / f"{name}.py").write_text(CONFIG.format(name=name))
    return folder


def begin(places: pathlib.Path, command: str, **options) -> subprocess.Popen:
    """A command of easylm; options are those of a config, but for the ones in capitals."""
    flags = {"WORKDIR", "MODEL", "INPUT", "OUTPUT", "SOURCE", "TARGET", "TO", "CONFIG", "TOPOLOGY"}
    arguments = [
        f"--{name.lower()}={value}" if name in flags else f"--config.{name}={value}"
        for name, value in options.items()
    ]
    variables = {
        "HOME": str(places / "home"),
        "TMPDIR": str(places / "temporary"),
        "PYTHONPATH": str(pathlib.Path(easylm.__file__).parent.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment = {**os.environ, **variables}
    environment.pop("XLA_FLAGS")
    return subprocess.Popen(
        [sys.executable, "-m", f"easylm.{command}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=places / "here",
        env=environment,
    )


def run(places: pathlib.Path, command: str, **options) -> str:
    """What the command says on stdout and stderr."""
    process = begin(places, command, **options)
    printed, said = process.communicate()
    assert process.returncode == 0, said
    return printed + said


def files_in(places: pathlib.Path) -> set[str]:
    """Files that processes have left, caches aside."""
    left = itertools.chain.from_iterable(
        (places / name).rglob("*") for name in ("home", "temporary", "here")
    )
    names = {str(path.relative_to(places)) for path in left if path.is_file()}
    return {name for name in names if not name.startswith("home/.cache/")}


@pytest.fixture(scope="module")
def sources(root):
    """Rows for SFT in two kinds of files, and pairs."""
    conversations = [row for row in ROWS if "messages" in row]
    instructions = "".join(json.dumps(row) + "\n" for row in ROWS if "messages" not in row)
    storage.write_bytes(f"{root}/data/rows.jsonl.gz", gzip.compress(instructions.encode()))
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(conversations), table)
    storage.write_bytes(f"{root}/data/more.parquet", table.getvalue())
    pairs = "".join(json.dumps(row) + "\n" for row in PAIRS)
    storage.write_bytes(f"{root}/data/pairs.jsonl", pairs.encode())
    return f"{root}/data/rows.jsonl.gz,{root}/data/more.parquet"


@pytest.fixture(scope="module")
def tuned(places, root, sources):
    """The workdir of a run that was killed after its first checkpoint, and has gone on."""
    options = {
        **COMMON,
        **RANDOM,
        "model.max_position_embeddings": 256,
        "steps": 20,
        "checkpoint.every": 4,
        "tensorboard": True,
        "cpu_devices": 2,
        "data.sources": sources,
        "data.cache": f"{root}/cache",
        "CONFIG": places / "SftConfig.py",
        "WORKDIR": f"{root}/sft",
    }
    prepared = {name: value for name, value in options.items() if name != "tensorboard"}
    said = run(places, "prepare", **{**prepared, "WORKDIR": f"{root}/prepared"})
    assert "36 rows: 36 examples" in said
    assert storage.exists(f"{root}/prepared/plots/data_lengths.png")
    process = begin(places, "sft", **options)
    while process.poll() is None and latest_step(f"{root}/sft") is None:
        time.sleep(0.02)
    process.kill()
    said = process.communicate()[1]
    assert process.returncode < 0, said
    assert "prepared before" in said
    step = latest_step(f"{root}/sft")
    before = storage.read_bytes(f"{root}/sft/metrics.jsonl").decode().splitlines()
    assert [json.loads(line)["step"] for line in before][:step] == list(range(1, step + 1))
    said = run(places, "sft", **options)
    assert f"going on after step {step} of 20" in said
    return f"{root}/sft"


def test_a_run_leaves_all_of_it_in_the_bucket(places, tuned):
    lines = storage.read_bytes(f"{tuned}/metrics.jsonl").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 21))
    assert latest_step(tuned) == 20
    for name in ("config.json", "hf/COMPLETE", "hf/model.safetensors", "plots/loss.png"):
        assert storage.exists(f"{tuned}/{name}")
    assert len(storage.list_files(f"{tuned}/tensorboard")) == 2  # of both starts
    assert files_in(places) == set()


def test_preferences_start_from_it_with_a_stored_reference(places, root, tuned):
    options = {
        **COMMON,
        **PAIRS_OPTIONS,
        "steps": 4,
        "checkpoint.every": 4,
        "cpu_devices": 2,
        "init_from": f"{tuned}/hf",
        "data.sources": f"{root}/data/pairs.jsonl",
        "data.cache": f"{root}/cache",
        "CONFIG": places / "DpoConfig.py",
    }
    said = run(places, "dpo", **options, WORKDIR=f"{root}/dpo")
    assert "0 of them" in said
    assert len(ReferenceTable.load(f"{root}/dpo/reference.npz")) == 30
    assert storage.exists(f"{root}/dpo/hf/COMPLETE")
    said = run(places, "dpo", **options, WORKDIR=f"{root}/again")
    assert "30 of them" in said
    assert files_in(places) == set()


def test_answers_and_plans_need_no_disk_either(places, root, tuned, sources):
    storage.write_bytes(f"{root}/questions.jsonl", b'{"prompt": "Say sun 2 times."}\n' * 3)
    run(
        places,
        "generate",
        MODEL=tuned,
        INPUT=f"{root}/questions.jsonl",
        OUTPUT=f"{root}/answers.jsonl",
    )
    answers = storage.read_bytes(f"{root}/answers.jsonl").decode().splitlines()
    assert len(answers) == 3 and all("completion" in json.loads(line) for line in answers)
    said = run(
        places,
        "plan",
        **{**COMMON, "init_from": f"{tuned}/hf", "data.sources": sources},
        **{"data.cache": f"{root}/cache", "CONFIG": places / "SftConfig.py", "TOPOLOGY": "cpu:2"},
    )
    assert "fits" in said
    assert files_in(places) == set()


def test_weights_go_to_a_disk_and_back(places, tmp_path, root, tuned):
    run(places, "convert", SOURCE=tuned, TARGET=tmp_path / "native", TO="native")
    run(places, "convert", SOURCE=tmp_path / "native", TARGET=f"{root}/back", TO="hf")
    run(places, "convert", SOURCE=f"{root}/back", TARGET=tmp_path / "hf", TO="hf")
    wanted = load(storage.read_bytes(f"{tuned}/hf/model.safetensors"))
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in wanted.items()
    }
    assert files_in(places) == set()
