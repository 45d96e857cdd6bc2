"""A source is known by what it holds; and what its rows do not need is not imported."""

import gzip
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from easylm import storage
from easylm.data.sources import Source, digest
from easylm.errors import InputError
from tests import bucket

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROWS = [{"prompt": f"row{i}", "completion": "x"} for i in range(3)]

datasets.disable_progress_bars()


def write_all(folder):
    """One of each kind, of the same rows."""
    lines = "\n".join(map(json.dumps, ROWS)).encode()
    (folder / "rows.jsonl").write_bytes(lines)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    parquet.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved", num_shards=2)
    return ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "saved"]


def test_content_decides_and_neither_name_nor_amount(tmp_path):
    for name in write_all(tmp_path):
        before = digest(Source(f"{tmp_path}/{name}"))
        assert digest(Source(f"{tmp_path}/{name}", 2)) == before
        moved = tmp_path / "moved"
        (shutil.copytree if name == "saved" else shutil.copy)(tmp_path / name, moved)
        assert digest(Source(str(moved))) == before
        changed = next(moved.glob("*1-of-*.arrow")) if name == "saved" else moved
        content = bytearray(changed.read_bytes())
        content[-9] ^= 1
        changed.write_bytes(content)
        assert digest(Source(str(moved))) != before
        shutil.rmtree(moved) if name == "saved" else moved.unlink()


def test_of_one_file_it_is_the_sha256_of_its_bytes(tmp_path):
    for name in write_all(tmp_path)[:3]:
        content = (tmp_path / name).read_bytes()
        assert digest(Source(f"{tmp_path}/{name}")) == hashlib.sha256(content).hexdigest()


def test_order_of_shards_decides(tmp_path):
    write_all(tmp_path)
    before = digest(Source(f"{tmp_path}/saved"))
    first, second = sorted((tmp_path / "saved").glob("*.arrow"))
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    assert digest(Source(f"{tmp_path}/saved")) != before


def test_in_a_bucket_checksums_stand_for_the_content(tmp_path, monkeypatch):
    names = write_all(tmp_path)
    with bucket.running_bucket() as url:
        for folder in ("a", "b"):
            for file in (*map(tmp_path.joinpath, names[:3]), *(tmp_path / "saved").iterdir()):
                path = f"{url}/{folder}/{file.relative_to(tmp_path)}"
                storage.write_bytes(path, file.read_bytes())
        first = [digest(Source(f"{url}/a/{name}")) for name in names]
        assert len(set(first)) == 4
        assert [digest(Source(f"{url}/b/{name}")) for name in names] == first
        content = (tmp_path / "rows.jsonl").read_bytes()
        storage.write_bytes(f"{url}/b/rows.jsonl", content.replace(b"row1", b"row7"))
        assert digest(Source(f"{url}/b/rows.jsonl")) != first[0]
        with pytest.raises(InputError, match="no such file"):
            digest(Source(f"{url}/c/rows.jsonl"))


def test_json_needs_no_library_and_arrow_only_pyarrow(tmp_path):
    code = (
        "import sys\n"
        "heavy = 'jax torch tensorflow transformers datasets tensorflow_datasets huggingface_hub'\n"
        "sys.modules |= dict.fromkeys(heavy.split() + sys.argv[2:])\n"
        "from easylm.data.sources import digest, parse_sources, read_rows\n"
        "print(len(read_rows(sys.argv[1]).rows), len(digest(parse_sources(sys.argv[1])[0])))"
    )
    for name in write_all(tmp_path):
        banned = ["pyarrow", "fsspec"] if "json" in name else []
        run = subprocess.run(
            [sys.executable, "-c", code, f"{tmp_path}/{name}", *banned],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert run.stdout == "3 64\n", run.stderr
