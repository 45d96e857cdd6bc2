"""Rows of TensorFlow Datasets, written here as ArrayRecord files without TensorFlow."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from easylm import storage
from easylm.data.sources import Source, digest, read_rows, read_values
from easylm.errors import InputError
from tests import bucket

FEATURES = {
    "id": np.int64,
    "messages": tfds.features.Sequence(
        {"role": tfds.features.Text(), "content": tfds.features.Text()}
    ),
    "tags": tfds.features.Sequence(tfds.features.Text()),
    "scores": tfds.features.Tensor(shape=(2,), dtype=np.float32),
}


def feature(values):
    if isinstance(values[0], bytes):
        return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=values))
    if isinstance(values[0], int):
        return tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=values))
    return tf_feature_pb2.Feature(float_list=tf_feature_pb2.FloatList(value=values))


def example(number, text, roles=(b"user", b"assistant")):
    columns = {
        "id": [number],
        "messages/role": list(roles),
        "messages/content": [text, b"\xc3\xa9"][: len(roles)],
        "tags": [b"x"],
        "scores": [0.5, 1.0],
    }
    columns = {name: feature(values) for name, values in columns.items()}
    return tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=columns))


def write_builder(folder, splits, **info):
    """The folder of a prepared dataset `toy`; `splits` are lists of shards, those of records."""
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(FEATURES)
    (folder / "features.json").write_text(json.dumps(features.to_json()))
    for split, shards in splits.items():
        for i, records in enumerate(shards):
            name = f"toy-{split}.array_record-{i:05d}-of-{len(shards):05d}"
            writer = ArrayRecordWriter(str(folder / name), "group_size:1")
            for record in records:
                writer.write(record)
            writer.close()
    described = [
        {
            "name": split,
            "shardLengths": [str(len(records)) for records in shards],
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }
        for split, shards in splits.items()
    ]
    about = {"name": "toy", "version": "1.0.0", "fileFormat": "array_record", "splits": described}
    (folder / "dataset_info.json").write_text(json.dumps({**about, **info}))


RECORDS = [example(i, f"row{i}".encode()).SerializeToString() for i in range(5)]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    home = tmp_path_factory.mktemp("tensorflow_datasets")
    folder = home / "toy" / "1.0.0"
    write_builder(folder, {"train": [RECORDS[:2], RECORDS[2:4]], "test": [RECORDS[4:]]})
    return folder


def names(read):
    return [row.messages[0]["content"] for row in read.rows]


def test_rows_are_plain_python(toy):
    assert next(iter(read_values(str(toy)))) == (
        f"{toy}:row 1",
        {
            "id": 0,
            "messages": [
                {"role": "user", "content": "row0"},
                {"role": "assistant", "content": "é"},
            ],
            "tags": ["x"],
            "scores": [0.5, 1.0],
        },
        None,
    )
    assert all(type(value) is str for value in next(iter(read_values(str(toy))))[1]["tags"])


def test_a_builder_folder_and_its_splits(toy):
    assert (
        names(read_rows(str(toy)))
        == names(read_rows(f"{toy}:train"))
        == [f"row{i}" for i in range(4)]
    )
    assert names(read_rows(f"{toy}/:test")) == ["row4"]
    assert [row.where for row in read_rows(f"{toy}:test").rows] == [f"{toy}:test:row 1"]
    with pytest.raises(
        InputError, match=f"no split 'dev'; it has 'test', 'train'. Write {toy}:test"
    ):
        read_rows(f"{toy}:dev")
    assert len(read_rows(f"{toy}@0.5").rows) == 2
    assert (
        digest(Source(str(toy))) == digest(Source(f"{toy}:train")) != digest(Source(f"{toy}:test"))
    )


ROOT = pathlib.Path(__file__).resolve().parents[2]

# A process of its own, because TFDS reads TFDS_DATA_DIR when it is imported.
PROGRAM = """
import json, sys
sys.modules |= {"jax": None, "torch": None}
from easylm.data.sources import read_rows
from easylm.errors import InputError
for name in sys.argv[1:]:
    try:
        print(json.dumps([row.where for row in read_rows(name).rows]))
    except InputError as error:
        print(json.dumps(str(error)))
"""


def test_a_prepared_dataset_by_name(toy):
    good = ["tfds:toy", "tfds:toy:test", "tfds:toy:1.0.0", "tfds:toy:1.0.0:test"]
    missing = ["tfds:toy:2.0.0", "tfds:toy/other", "tfds:tyo"]
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *good, *missing, "tfds:toy:dev"],
        env={**os.environ, "TFDS_DATA_DIR": str(toy.parent.parent), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    said = [json.loads(line) for line in run.stdout.splitlines()]
    for name, where in zip(good, said, strict=False):
        count = 1 if name.endswith("test") else 4
        assert where == [f"{name}:row {i + 1}" for i in range(count)]
    for name, message in zip(missing, said[4:7], strict=True):
        assert message.startswith(f"{name}: not prepared here. Could not find dataset files for")
        assert "TFDS_DATA_DIR says where to look; `tfds build" in message
    assert said[7].endswith(f"{toy}: no split 'dev'; it has 'test', 'train'. Write {toy}:test")


@pytest.mark.parametrize("name", ["tfds:", "tfds:a b", "tfds:/x", "tfds:a:1.0:b:c"])
def test_names_that_are_none_of_tfds(name):
    with pytest.raises(InputError, match=r"wanted tfds:NAME\[/CONFIG\]\[:VERSION\]\[:split\]"):
        read_rows(name)


def test_bad_records_are_bad_rows(tmp_path):
    records = [
        RECORDS[0],
        example(1, b"caf\xe9").SerializeToString(),
        example(2, b"x", roles=(b"user",)).SerializeToString(),
        b"\xff\xff",
        tf_example_pb2.Example().SerializeToString(),
    ]
    write_builder(tmp_path / "toy", {"train": [records]})
    with pytest.raises(InputError) as error:
        read_rows(f"{tmp_path}/toy")
    text = str(error.value)
    assert text.startswith("4 of 5 rows of data.sources are bad")
    assert "row 2: messages: byte 0xe9 at byte 4 of a text; wanted UTF-8 text" in text
    assert "row 3: messages: roles user; wanted an assistant message" in text
    assert "row 4: row: Error parsing message" in text and "row 5: row: " in text
    read = read_rows(f"{tmp_path}/toy", on_bad_row="skip")
    assert read.skipped == {"not UTF-8": 1, "no assistant turn": 1, "unreadable record": 2}


def test_damaged_folders_are_refused(toy, tmp_path):
    folder = tmp_path / "toy"
    shutil.copytree(toy, folder)
    shard = folder / "toy-train.array_record-00001-of-00002"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(InputError, match=f"{folder}: cannot be read .*copy or prepare it again"):
        read_rows(str(folder), on_bad_row="skip")
    shard.unlink()
    with pytest.raises(InputError, match=f"1 of 2 files are missing, the first is {shard.name}"):
        read_rows(str(folder))
    for name in ("features.json", "dataset_info.json"):
        (folder / name).write_text("{")
        with pytest.raises(
            InputError, match=f"{folder}: dataset_info.json or features.json is dam"
        ):
            read_rows(str(folder))
        shutil.copy(toy / name, folder / name)
    write_builder(tmp_path / "records", {"train": [RECORDS]}, fileFormat="tfrecord")
    shard = tmp_path / "records" / "toy-train.array_record-00000-of-00001"
    shard.rename(tmp_path / "records" / "toy-train.tfrecord-00000-of-00001")
    with pytest.raises(InputError, match=r"is prepared as tfrecord, which TensorFlow alone reads"):
        read_rows(f"{tmp_path}/records")


def test_a_folder_in_a_bucket(toy):
    with bucket.running_bucket() as url:
        for file in toy.iterdir():
            storage.write_bytes(f"{url}/toy/{file.name}", file.read_bytes())
        assert names(read_rows(f"{url}/toy")) == [f"row{i}" for i in range(4)]
        assert names(read_rows(f"{url}/toy:test")) == ["row4"]
        with pytest.raises(InputError, match=f"{url}/toy: no split 'dev'"):
            read_rows(f"{url}/toy:dev")
