"""Rows of datasets on the Hugging Face hub, served by a small hub of our own."""

import json
import os
import pathlib
import subprocess
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from easylm.data.hub import is_hub_name
from tests.data.dataset_hub import running_hub

ROOT = pathlib.Path(__file__).resolve().parents[2]

# A process of its own, because datasets and huggingface_hub read the environment when imported.
PROGRAM = """
import json, sys
sys.modules["jax"] = None
from easylm.data.sources import digest, parse_sources, read_rows
from easylm.errors import InputError
for name in sys.argv[1:]:
    try:
        rows = read_rows(name).rows
        found = [[row.where, row.messages[0]["content"]] for row in rows]
        print(json.dumps([found, digest(parse_sources(name)[0])]))
    except InputError as error:
        print(json.dumps(str(error)))
"""


def read(names, home, endpoint="http://localhost:1", offline=False):
    """For each name its rows and digest, or the error."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    settings["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def rows(*names):
    return [{"prompt": name, "completion": "x"} for name in names]


def write_repositories(folder):
    """org/plain of parquet with two splits, org/two with two configs, and three bad ones."""
    plain = folder / "org" / "plain" / "data"
    plain.mkdir(parents=True)
    parquet.write_table(
        pa.Table.from_pylist(rows("a", "b")), plain / "train-00000-of-00002.parquet"
    )
    parquet.write_table(pa.Table.from_pylist(rows("c")), plain / "train-00001-of-00002.parquet")
    parquet.write_table(pa.Table.from_pylist(rows("t")), plain / "test-00000-of-00001.parquet")
    configs = []
    for config in ("one", "two"):
        (folder / "org" / "two" / config).mkdir(parents=True)
        lines = "\n".join(map(json.dumps, rows(config)))
        (folder / "org" / "two" / config / "dev.jsonl").write_text(lines)
        path = f"{config}/dev.jsonl"
        configs.append(f'{{config_name: {config}, data_files: [{{split: dev, path: "{path}"}}]}}')
    readme = f"---\nconfigs: [{', '.join(configs)}]\n---\n"
    (folder / "org" / "two" / "README.md").write_text(readme)
    for name, line in {"bad": '{"prompt": 5, "x"', "late": '{"a": 1}'}.items():
        (folder / "org" / name / "train").mkdir(parents=True)
        good = json.dumps(rows("a")[0])
        (folder / "org" / name / "train" / "0.jsonl").write_text(f"{good}\n")
        (folder / "org" / name / "train" / "1.jsonl").write_text(f"{good}\n{line}\n")
    (folder / "org" / "empty").mkdir()
    (folder / "org" / "empty" / "README.md").write_text("nothing")


REFUSED = {
    "org/plain:dev": "org/plain: no split 'dev'; it has 'test', 'train'. Write org/plain:test",
    "org/two/one": "no split is named and none is called 'train'; it has 'dev'. Write org/two/one:",
    "org/two": "Please pick one among the available configs: ['one', 'two']",
    "org/two/three": "BuilderConfig 'three' not found. Available: ['one', 'two']",
    "org/none": "Dataset 'org/none' doesn't exist on the Hub or cannot be accessed.). Check the s",
    "org/empty": "doesn't contain any data files). Check the spelling (owner/name[/config]",
    "org/bad": "its files are damaged or do not go together (No ':' found when decoding",
    "org/late": "its files are damaged or do not go together (Couldn't cast prompt: string",
}


def test_datasets_of_the_hub(tmp_path):
    write_repositories(tmp_path / "hub")
    good = ["org/plain", "org/plain:test", "org/two/one:dev", "org/two/two:dev", "org/plain@2"]
    with running_hub(tmp_path / "hub") as endpoint:
        train, test, one, two, part = read(good, tmp_path / "home", endpoint)
        said = read(REFUSED, tmp_path / "home", endpoint)
    assert train[0] == [[f"org/plain:row {i}", name] for i, name in enumerate("abc", 1)]
    assert test[0] == [["org/plain:test:row 1", "t"]]
    assert one[0] == [["org/two/one:dev:row 1", "one"]]
    assert two[0] == [["org/two/two:dev:row 1", "two"]]
    assert len(part[0]) == 2 and part[1] == train[1]
    assert len({found[1] for found in (train, test, one, two)}) == 4
    for (name, part), message in zip(REFUSED.items(), said, strict=True):
        assert message.startswith(name.partition(":")[0]) and part in message
    # What was downloaded is there without the network; the rest is an error that says so.
    again = read([good[0], good[2], "org/other"], tmp_path / "home", offline=True)
    assert again[:2] == [train, one]
    assert again[2].startswith("org/other: no such file or folder here, and the Hugging Face hub")
    assert "Couldn't reach 'org/other' on the Hub (OfflineModeIsEnabled)" in again[2]
    assert "the network, HF_ENDPOINT, and for a private or gated dataset HF_TOKEN" in again[2]


@pytest.mark.parametrize("name", ["o/n", "a-b/c.d_e", "owner/name/config", "o/n/2.0-en", "data/x"])
def test_names_of_the_hub(name):
    assert is_hub_name(name)


NO_NAMES = ["/a/b", "./a/b", "../a", "~/a", "gs://a/b", "name", "a/b/c/d", "a//b", "a/b.jsonl"]
NO_NAMES += ["a/b.json", "a/b.json.gz", "a/b/c.parquet", "a/b.csv", "a/b/", "a b/c", "a/.b", ""]


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_that_never_reach_the_hub(name):
    assert not is_hub_name(name)


def test_what_exists_here_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "plain").write_text(json.dumps(rows("here")[0]))
    monkeypatch.chdir(tmp_path)
    assert read(["org/plain"], tmp_path / "home")[0][0] == [["org/plain:1", "here"]]
