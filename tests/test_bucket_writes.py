"""What is written to a bucket is there whole or not at all, and faults that pass are sat out."""

import os
import time

import pytest

import easylm.bucket
from easylm import storage
from easylm.errors import InputError, UnavailableError
from easylm.metrics import MetricsWriter
from tests import bucket
from tests.fault_proxy import DELAY, HANG, LOSE_ANSWER, LOSE_REQUEST, running_proxy

DATA = os.urandom(3 << 20)


@pytest.fixture(scope="module")
def root():
    with bucket.running_bucket() as root:
        yield root


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(easylm.bucket, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(easylm.bucket, "SILENCE_SECONDS", 0.5)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(storage, "UPLOAD_BYTES", 1 << 18)


@pytest.fixture
def hasty(monkeypatch):
    """Without long pauses between requests."""
    monkeypatch.setattr(easylm.bucket, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(easylm.bucket, "_LONGEST_PAUSE", 0.02)


@pytest.mark.parametrize("old", [None, b"old"], ids=["absent", "old"])
@pytest.mark.parametrize("end", ["an error", "forgotten"])
def test_half_a_file_is_none(root, small_blocks, old, end):
    path = f"{root}/half_{end[:2]}_{old}"
    if old:
        storage.write_bytes(path, old)
    if end == "forgotten":
        file = storage.open_to_write(path)
        file.write(DATA)
        del file
    else:
        with pytest.raises(ZeroDivisionError), storage.open_to_write(path) as file:
            file.write(DATA)
            raise ZeroDivisionError
    assert storage.exists(path) == bool(old)
    if old:
        assert storage.read_bytes(path) == old


@pytest.mark.parametrize("fault", [503, HANG])
def test_a_bucket_that_dies_half_way_keeps_what_it_had(root, impatient, small_blocks, fault):
    path = f"{root}/dies_{fault}"
    storage.write_bytes(path, b"old")
    with running_proxy() as proxy:
        with (
            pytest.raises(UnavailableError, match=f"{path}: the bucket did not answer"),
            storage.explained(path),
            storage.open_to_write(path) as file,
        ):
            file.write(DATA[: len(DATA) // 2])
            proxy.always = fault
            file.write(DATA[len(DATA) // 2 :])
        proxy.always = None
        assert storage.read_bytes(path) == b"old"


def test_a_folder_that_cannot_be_finished_is_named_by_the_first_error(root, impatient):
    with (
        running_proxy() as proxy,
        pytest.raises(UnavailableError, match="folder/b: the bucket did not answer"),
        storage.write_folder(f"{root}/folder") as folder,
    ):
        storage.write_bytes(f"{folder}/a", b"1")
        proxy.always = 503
        storage.write_bytes(f"{folder}/b", b"1")


def test_faults_that_pass_change_nothing(root, hasty, small_blocks):
    rates = dict.fromkeys((429, 500, 503, LOSE_REQUEST, LOSE_ANSWER), 0.1)
    with running_proxy(5, rates) as proxy:
        for name in ("a", "b", "c"):
            path = f"{root}/many/{name}"
            storage.write_bytes(path, DATA)
            assert storage.read_bytes(path) == DATA
            with storage.open_to_write(f"{path}2") as file:
                for start in range(0, len(DATA), 1 << 17):
                    file.write(DATA[start : start + (1 << 17)])
            assert storage.read_bytes(f"{path}2") == DATA
            assert storage.list_files(f"{root}/many") == dict.fromkeys((name, f"{name}2"), 3 << 20)
            storage.remove_folder(f"{root}/many")
            assert not storage.exists(f"{root}/many")
        assert proxy.made.keys() == rates.keys()


def test_a_copy_on_the_disk_is_read_in_blocks(root, hasty, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "REQUEST_BYTES", 1 << 18)
    monkeypatch.setattr(storage, "CONCURRENT_REQUESTS", 3)
    storage.write_bytes(f"{root}/copied", DATA)
    with running_proxy(2, {503: 0.2, LOSE_ANSWER: 0.2}) as proxy:
        storage.copy_to_disk(f"{root}/copied", str(tmp_path / "copy"))
        assert len(proxy.made) == 2
    assert (tmp_path / "copy").read_bytes() == DATA


def test_what_takes_long_is_said_once(root, capsys, monkeypatch):
    monkeypatch.setattr(easylm.bucket, "SAID_AFTER_SECONDS", 0.2)
    monkeypatch.setattr(easylm.bucket, "PATIENCE_SECONDS", 120.0)
    with running_proxy(0, {503: 0.6, DELAY: 0.4}):
        monkeypatch.setattr(easylm.bucket, "_LONGEST_PAUSE", 0.1)
        storage.write_bytes(f"{root}/slow", b"1")
        assert storage.read_bytes(f"{root}/slow") == b"1"
    said = capsys.readouterr().err
    assert "asking again for up to 2 minutes" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("ask", [storage.exists, storage.is_folder, storage.list_folders])
@pytest.mark.parametrize(("fault", "error"), [(403, InputError), (503, UnavailableError)])
def test_what_cannot_be_asked_is_not_taken_for_absent(root, impatient, ask, fault, error):
    storage.write_bytes(f"{root}/there/a", b"1")
    with running_proxy() as proxy:
        proxy.always = fault
        with pytest.raises(error, match=f"{root}/there: the bucket"):
            ask(f"{root}/there")


def test_refusals_are_not_waited_for(root):
    with running_proxy() as proxy:
        proxy.always = 403
        started = time.monotonic()
        with pytest.raises(InputError, match="role Storage Object Admin"):
            storage.write_bytes(f"{root}/a", b"1")
        assert len(proxy.requests) == 1
        assert time.monotonic() - started < 5


def test_a_run_that_is_killed_loses_no_line_before_its_checkpoint(root):
    writer = MetricsWriter(f"{root}/run")
    for step in (1, 2, 3):
        writer.write({"step": step})
        if step == 2:
            writer.store()
    # Killed here: it goes on from the checkpoint of step 2, and writes 3 again.
    assert storage.read_bytes(f"{root}/run/metrics.jsonl").count(b"\n") == 2
    writer = MetricsWriter(f"{root}/run", last_step=2)
    writer.write({"step": 3})
    writer.close()
    assert storage.read_bytes(f"{root}/run/metrics.jsonl").count(b"\n") == 3
