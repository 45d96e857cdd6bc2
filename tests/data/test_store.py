"""Stored arrays are whole or absent, come back as they were, and are made once."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from easylm import storage
from easylm.data import store
from easylm.errors import InputError
from tests.bucket import running_bucket

WORDS = np.arange(10, dtype=np.int32)
PAIRS = np.arange(6, dtype=np.float32).reshape(3, 2)


def fill(writer):
    writer.append(words=WORDS[:4], pairs=PAIRS[:1])
    writer.append(words=WORDS[4:])
    writer.append(pairs=PAIRS[1:], words=WORDS[:0])
    return {"made": "here", "count": 10}


def not_called(writer):
    raise AssertionError("made again")


def check(stored):
    assert stored.arrays.keys() == {"words", "pairs"}
    assert stored.arrays["words"].dtype == np.int32 and stored.arrays["pairs"].dtype == np.float32
    assert stored.arrays["words"].tolist() == WORDS.tolist()
    assert stored.arrays["pairs"].tolist() == PAIRS.tolist()
    assert stored.manifest == {"made": "here", "count": 10}


def test_arrays_come_back_and_are_made_once(tmp_path):
    cache = str(tmp_path / "cache")
    assert not store.holds_any(cache, "a")
    made = store.open_or_make(cache, "a/b", fill)
    check(made)
    assert not made.reused and store.holds_any(cache, "a") and not store.holds_any(cache, "b")
    again = store.open_or_make(cache, "a/b", not_called)
    check(again)
    assert again.reused and again.fingerprint == made.fingerprint
    assert isinstance(again.arrays["words"].base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        again.arrays["words"][0] = 1
    # They are ordinary numpy files.
    assert np.load(f"{made.folder}/pairs.npy").tolist() == PAIRS.tolist()


def test_fingerprint_tells_contents_apart(tmp_path):
    def other(writer):
        writer.append(words=WORDS[::-1], pairs=PAIRS)
        return {}

    first = store.open_or_make(str(tmp_path), "a", fill)
    assert store.open_or_make(str(tmp_path), "b", fill).fingerprint == first.fingerprint
    assert store.open_or_make(str(tmp_path), "c", other).fingerprint != first.fingerprint


def test_an_array_has_one_type(tmp_path):
    def mixed(writer):
        writer.append(words=WORDS)
        writer.append(words=WORDS.astype(np.int64))

    with pytest.raises(ValueError, match=r"int64\(\) after int32\(\)"):
        store.open_or_make(str(tmp_path), "a", mixed)
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
import numpy as np
from easylm.data import store

def fill(writer):
    writer.append(words=np.arange(10, dtype=np.int32))
    os.kill(os.getpid(), signal.SIGKILL)

store.open_or_make(sys.argv[1], "a/b", fill)
"""


def test_what_is_interrupted_is_made_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        store.open_or_make(str(tmp_path), "a/b", interrupted)
    assert os.listdir(tmp_path / "a") == []
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert process.returncode == -9
    assert len(os.listdir(tmp_path / "a")) == 1  # what it had written, under another name
    assert not store.holds_any(str(tmp_path), "a")
    (left,) = (tmp_path / "a").iterdir()
    os.utime(left, (0, 0))

    def beside_the_living(writer):
        (living,) = (tmp_path / "a").iterdir()
        os.utime(living, (0, 0))
        check(store.open_or_make(str(tmp_path), "a/b", fill))
        return fill(writer)

    check(store.open_or_make(str(tmp_path), "a/b", beside_the_living))
    assert os.listdir(tmp_path / "a") == ["b"]


def interrupted(writer):
    writer.append(words=WORDS)
    raise KeyboardInterrupt


def test_two_at_once_both_get_whole_arrays(tmp_path):
    def slower(writer):
        manifest = fill(writer)
        check(store.open_or_make(str(tmp_path), "a", fill))  # another is done first
        return manifest

    check(store.open_or_make(str(tmp_path), "a", slower))
    assert os.listdir(tmp_path) == ["a"]


def test_an_error_of_fill_is_not_hidden_by_another_that_succeeds(tmp_path):
    def fails(writer):
        store.open_or_make(str(tmp_path), "a", fill)
        raise InputError("mine")

    with pytest.raises(InputError, match="mine"):
        store.open_or_make(str(tmp_path), "a", fails)


@pytest.mark.parametrize("size", [0, 150])
@pytest.mark.parametrize("name", ["words.npy", "manifest.json"])
def test_damage_is_an_error(tmp_path, name, size):
    folder = pathlib.Path(store.open_or_make(str(tmp_path), "a", fill).folder)
    with open(folder / name, "r+b") as file:
        file.truncate(size)
    with pytest.raises(
        InputError, match=r"/a: the prepared data is damaged \(.*delete this folder"
    ):
        store.open_or_make(str(tmp_path), "a", not_called)


def test_another_array_under_the_name_is_damage(tmp_path):
    folder = store.open_or_make(str(tmp_path), "a", fill).folder
    np.save(f"{folder}/words.npy", WORDS[:9])
    with pytest.raises(InputError, match=r"words\.npy is not what manifest\.json says"):
        store.open_or_make(str(tmp_path), "a", not_called)


def test_content_key():
    parts = {"a": [1, 0.5, None], "b": "ü"}
    assert store.content_key(parts) == store.content_key(dict(reversed(parts.items())))
    assert len(store.content_key(parts)) == 32
    assert store.content_key(parts) != store.content_key({**parts, "a": [1, 0.25, None]})


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    with running_bucket() as url:
        monkeypatch.setenv("HOME", str(tmp_path / "host1"))
        yield url


def test_a_bucket_is_mirrored(bucket, monkeypatch, tmp_path, capsys):
    cache = f"{bucket}/prepared"
    assert not store.holds_any(cache, "a")
    made = store.open_or_make(cache, "a/b", fill, progress=False)
    check(made)
    assert made.folder == str(tmp_path / "host1/.cache/easylm/prepared/a/b")
    assert list(storage.list_files(f"{cache}/a/b")) == [
        "COMPLETE",
        "manifest.json",
        "pairs.npy",
        "words.npy",
    ]
    monkeypatch.setenv("HOME", str(tmp_path / "host2"))
    capsys.readouterr()
    assert store.holds_any(cache, "a")
    copied = store.open_or_make(f"{cache}/", "a/b", not_called, progress=False)
    check(copied)
    assert copied.reused and copied.fingerprint == made.fingerprint
    assert f"copying 0.00 GB of prepared data from {cache}/a/b to " in capsys.readouterr().err
    # Not from stderr: the bucket's server is in this process, and may say that a client has left.
    said = []
    monkeypatch.setattr(store, "say", said.append)
    store.open_or_make(cache, "a/b", not_called, progress=False)
    assert said == []


def test_an_upload_that_broke_off_is_finished(bucket, monkeypatch, tmp_path):
    cache = f"{bucket}/prepared"
    store.open_or_make(cache, "a/b", fill, progress=False)
    with storage.explained(cache):
        storage._bucket().rm(f"{cache}/a/b/COMPLETE")
    monkeypatch.setenv("HOME", str(tmp_path / "host2"))
    assert not store.holds_any(cache, "a")
    assert not store.open_or_make(cache, "a/b", fill, progress=False).reused
    assert storage.exists(f"{cache}/a/b/COMPLETE")


def test_no_room_on_the_disk(bucket, monkeypatch, tmp_path):
    cache = f"{bucket}/prepared"
    store.open_or_make(cache, "a/b", fill, progress=False)
    monkeypatch.setenv("HOME", str(tmp_path / "host2"))
    usage = type(store.shutil.disk_usage("/"))(100, 90, 10)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"GB of prepared data do not fit; found 0\.00 GB free"):
        store.open_or_make(cache, "a/b", fill, progress=False)
    assert json.dumps(os.listdir(tmp_path)) == '["host1"]'
