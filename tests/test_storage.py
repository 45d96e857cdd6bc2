"""Files and folders on a disk and in a bucket."""

import http.server
import os
import stat
import threading
import urllib.error
import urllib.request

import fsspec
import numpy as np
import pytest

from easylm import storage
from easylm.errors import InputError
from tests import bucket

DATA = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def bucket_url():
    with bucket.running_bucket() as url:
        yield url


@pytest.fixture(params=["disk", "bucket"])
def root(request, tmp_path):
    """A folder to write below, on a disk and in a bucket."""
    if request.param == "disk":
        return str(tmp_path)
    name = request.node.name.replace("[", "-").replace("]", "")
    return f"{request.getfixturevalue('bucket_url')}/{name}"


def test_bytes_come_back(root):
    path = f"{root}/data.bin"
    storage.write_bytes(path, DATA)
    assert storage.exists(path)
    assert storage.file_size(path) == len(DATA)
    assert storage.read_bytes(path) == DATA
    assert storage.read_range(path, 255, 514) == DATA[255:514]
    assert storage.read_range(path, 7, 7) == b""


def test_large_reads_are_split_and_joined(root, monkeypatch):
    path = f"{root}/data.bin"
    storage.write_bytes(path, DATA)
    monkeypatch.setattr(storage, "REQUEST_BYTES", 1000)
    monkeypatch.setattr(storage, "CONCURRENT_REQUESTS", 3)
    out = np.zeros(len(DATA) - 11, np.uint8)
    storage.read_into(path, 11, out)
    assert out.tobytes() == DATA[11:]


def test_reading_past_the_end_says_where_the_file_ends(root):
    path = f"{root}/data.bin"
    storage.write_bytes(path, DATA)
    message = f"data.bin: ends at byte {len(DATA)}; wanted bytes up to {len(DATA) + 1}"
    with pytest.raises(InputError, match=message):
        storage.read_range(path, 5, len(DATA) + 1)
    with pytest.raises(InputError, match=message):
        storage.read_into(path, 5, np.empty(len(DATA) + 1 - 5, np.uint8))


def test_a_missing_file_is_named(root):
    for read in (storage.file_size, storage.list_files, lambda p: storage.read_range(p, 0, 1)):
        with pytest.raises(InputError, match=r"nothing-here: no such (file|object)"):
            read(f"{root}/nothing-here")
    assert not storage.exists(f"{root}/nothing-here")


def test_files_of_a_folder_are_listed_without_subfolders(root):
    with storage.write_folder(f"{root}/made") as folder:
        storage.write_bytes(f"{folder}/b", b"12")
        storage.write_bytes(f"{folder}/a", b"")
    if not storage.is_bucket(root):
        os.mkdir(f"{root}/made/below")
    else:
        storage.write_bytes(f"{root}/made/below/c", b"1")
    assert storage.list_files(f"{root}/made") == {"COMPLETE": 0, "a": 0, "b": 2}
    assert storage.is_folder(f"{root}/made")
    assert not storage.is_folder(f"{root}/made/a")
    with pytest.raises(InputError, match="made: found a folder; wanted a file"):
        storage.file_size(f"{root}/made")


def test_links_are_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "blob").write_bytes(b"123")
    (tmp_path / "folder" / "link").symlink_to("blob")
    (tmp_path / "other").symlink_to("folder")
    assert storage.list_files(f"{tmp_path}/other") == {"blob": 3, "link": 3}
    assert storage.is_folder(f"{tmp_path}/other")
    assert storage.file_size(f"{tmp_path}/other/link") == 3
    assert storage.read_bytes(f"{tmp_path}/other/link") == b"123"


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.write_bytes("~/a", b"1")
    with storage.write_folder("~/made") as folder:
        storage.write_bytes(f"{folder}/b", b"1")
    assert storage.exists("~/a")
    assert storage.file_size("~/a") == 1
    assert storage.read_bytes("~/made/b") == b"1"
    assert storage.is_folder("~/made")
    assert list(storage.list_files("~/made")) == ["COMPLETE", "b"]
    assert sorted(os.listdir(tmp_path)) == ["a", "made"]


def test_a_listing_sees_what_another_process_wrote_since(root):
    storage.write_bytes(f"{root}/a", b"1")
    assert list(storage.list_files(root)) == ["a"]
    protocol = "gs" if storage.is_bucket(root) else "file"
    another = fsspec.filesystem(protocol, skip_instance_cache=True)
    another.pipe_file(f"{root}/b", b"1")
    assert list(storage.list_files(root)) == ["a", "b"]


def test_a_failed_folder_leaves_nothing(root):
    with pytest.raises(ZeroDivisionError), storage.write_folder(f"{root}/made") as folder:
        storage.write_bytes(f"{folder}/a", b"1")
        raise ZeroDivisionError
    assert not storage.exists(f"{root}/made")
    if not storage.is_bucket(root):
        assert os.listdir(root) == []
    with storage.write_folder(f"{root}/made"):
        pass
    assert storage.list_files(f"{root}/made") == {"COMPLETE": 0}


def test_an_existing_folder_is_not_touched(root):
    storage.write_bytes(f"{root}/made.txt", b"old")
    with (
        pytest.raises(InputError, match=r"made.txt: exists already.*wanted a new folder"),
        storage.write_folder(f"{root}/made.txt"),
    ):
        pytest.fail("entered")
    assert storage.read_bytes(f"{root}/made.txt") == b"old"


def test_a_local_folder_appears_whole_and_readable_by_others(tmp_path):
    target = tmp_path / "parent" / "made"
    umask = os.umask(0o022)
    try:
        with storage.write_folder(f"{target}/") as folder:
            storage.write_bytes(f"{folder}/a", b"1")
            assert not target.exists()
    finally:
        os.umask(umask)
    assert sorted(os.listdir(target)) == ["COMPLETE", "a"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
    assert os.listdir(tmp_path / "parent") == ["made"]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "made"
    with (
        pytest.raises(InputError, match="made: something else made this folder meanwhile"),
        storage.write_folder(str(target)),
    ):
        target.mkdir()
        (target / "theirs").write_text("x")
    assert os.listdir(tmp_path) == ["made"]
    assert os.listdir(target) == ["theirs"]


def test_a_folder_in_a_bucket_without_its_mark_is_called_unfinished(bucket_url):
    storage.write_bytes(f"{bucket_url}/unfinished/a", b"1")
    with (
        pytest.raises(InputError, match=r"unfinished: exists already .it has no COMPLETE"),
        storage.write_folder(f"{bucket_url}/unfinished"),
    ):
        pytest.fail("entered")


def test_a_missing_bucket_is_explained(bucket_url):
    with pytest.raises(InputError, match="gs://no-such-bucket/x: no such object or bucket; check"):
        storage.file_size("gs://no-such-bucket/x")
    with pytest.raises(InputError, match="gs://no-such-bucket/x: no such object or bucket; check"):
        storage.write_bytes("gs://no-such-bucket/x", b"1")


def test_local_refusals_are_explained(tmp_path):
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(InputError, match="file/below: found a file where a folder is wanted"):
        storage.write_bytes(f"{tmp_path}/file/below", b"1")
    with pytest.raises(InputError, match="no/x: no such file or folder"):
        storage.write_bytes(f"{tmp_path}/no/x", b"1")
    with (
        pytest.raises(InputError, match="/dev/full: the disk is full"),
        storage.explained("/dev/full"),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"1")


class FaultyProxy(http.server.BaseHTTPRequestHandler):
    """Answers each request with the next of `faults`, and passes it on when they are used up."""

    faults: list
    upstream: str

    def do_GET(self):
        if self.faults:
            fault = self.faults.pop(0)
            if fault == "hang up":
                self.close_connection = True
                return
            self.send_error(fault)
            return
        headers = {name: self.headers[name] for name in ("Range",) if name in self.headers}
        request = urllib.request.Request(self.upstream + self.path, headers=headers)
        with urllib.request.urlopen(request) as answer:
            body = answer.read()
            self.send_response(answer.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def faulty_bucket(bucket_url):
    """Runs a proxy before the emulator; yields the list of faults it is to make."""
    storage.write_bytes(f"{bucket_url}/data.bin", DATA)
    upstream = os.environ["STORAGE_EMULATOR_HOST"]
    faults = []
    handler = type("Handler", (FaultyProxy,), {"faults": faults, "upstream": upstream})
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with bucket.environment(server.server_port):
            yield faults
        server.shutdown()


@pytest.mark.parametrize("fault", [429, 503, "hang up"])
def test_a_busy_bucket_is_asked_again(faulty_bucket, fault):
    faulty_bucket += [fault, fault]
    assert storage.read_range("gs://tests/data.bin", 3, 9) == DATA[3:9]
    assert not faulty_bucket


@pytest.mark.parametrize("fault", [401, 403])
def test_a_refusing_bucket_is_explained(faulty_bucket, fault):
    faulty_bucket += [fault] * 9
    with pytest.raises(InputError, match=r"gs://tests/data.bin: the bucket refused.*credentials"):
        storage.read_range("gs://tests/data.bin", 3, 9)
    with pytest.raises(InputError, match=r"gs://tests/data.bin: the bucket refused.*credentials"):
        storage.read_into("gs://tests/data.bin", 3, np.empty(9, np.uint8))
    with pytest.raises(InputError, match=r"gs://tests/data.bin: the bucket refused.*credentials"):
        storage.exists("gs://tests/data.bin")


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_folders_are_listed_and_removed(place, tmp_path, bucket_url):
    root = {"disk": str(tmp_path / "root"), "bucket": f"{bucket_url}/root"}[place]
    for name in ("b/x", "a/y/z", "c"):
        if place == "disk":
            (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        storage.write_bytes(f"{root}/{name}", b"1")
    assert storage.list_folders(root) == ["a", "b"]
    storage.remove_folder(f"{root}/a")
    assert storage.list_folders(root) == ["b"]
    assert storage.exists(f"{root}/c")
    with pytest.raises(InputError, match=r"root/nothing"):
        storage.list_folders(f"{root}/nothing")
