"""TensorBoard and Weights & Biases get what metrics.jsonl gets; read back from their own files."""

import json
import math
import os
import struct
import subprocess
import sys

import pytest
import wandb
from tensorboardX.proto.event_pb2 import Event
from wandb.proto.wandb_internal_pb2 import Record

from easylm import storage
from easylm import track as track_module
from easylm.errors import InputError
from easylm.track import check_trackers, open_trackers
from tests.bucket import running_bucket

CONFIG = {"seed": 1, "optimizer": {"b1": 0.9}}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb_cache"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    yield
    wandb.teardown()  # it reads the environment once


def track(workdir, steps, last_step=0, *, tensorboard=False, wandb="", **values):
    trackers = open_trackers(
        str(workdir), last_step, tensorboard=tensorboard, wandb=wandb, config=CONFIG
    )
    for step in steps:
        for tracker in trackers:
            tracker.write({"step": step, "loss": 1.0 / step, "mfu": None, **values})
    for tracker in trackers:
        tracker.close()
    return len(trackers)


def events(data):
    """Every Event of a TFRecord file: length, its checksum, the message, its checksum."""
    found = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def scalars(data):
    return {
        (event.step, value.tag): value.simple_value
        for event in events(data)
        for value in event.summary.value
    }


def test_nothing_is_tracked_unless_asked(tmp_path):
    check_trackers(tensorboard=False, wandb="")
    assert track(tmp_path, [1]) == 0
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_every_number(tmp_path):
    workdir = tmp_path / "run"
    track(workdir, [1, 2], tensorboard=True, **{"eval/loss": math.nan})
    (file,) = (workdir / "tensorboard").iterdir()
    found = scalars(file.read_bytes())
    assert found[1, "loss"] == 1.0 and found[2, "loss"] == 0.5
    assert math.isnan(found[2, "eval/loss"])
    assert {tag for _, tag in found} == {"loss", "eval/loss"}


def test_tensorboard_forgets_the_steps_that_a_resumed_run_takes_again(tmp_path):
    track(tmp_path, [1, 2, 3], last_step=0, tensorboard=True)
    track(tmp_path, [3, 4], last_step=2, tensorboard=True)
    first, second = sorted((tmp_path / "tensorboard").iterdir())
    restarts = [e.step for e in events(second.read_bytes()) if e.HasField("session_log")]
    assert restarts == [3]
    assert scalars(first.read_bytes())[3, "loss"] == pytest.approx(1 / 3)


def test_tensorboard_can_be_watched_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(track_module, "STORE_SECONDS", 0.0)
    tracker = track_module.TensorBoard(str(tmp_path), 0)
    (file,) = (tmp_path / "tensorboard").iterdir()
    for step in (1, 2):
        tracker.write({"step": step, "loss": 1.0})
        assert scalars(file.read_bytes())[step, "loss"] == 1.0


def test_tensorboard_in_a_bucket():
    with running_bucket() as bucket:
        track(f"{bucket}/run", [1, 2], tensorboard=True)
        (name,) = storage.list_files(f"{bucket}/run/tensorboard")
        found = scalars(storage.read_bytes(f"{bucket}/run/tensorboard/{name}"))
    assert found == {(1, "loss"): 1.0, (2, "loss"): 0.5}


def test_a_tensorboard_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/tensorboard: found a file where a folder"):
        track(tmp_path / "file", [1], tensorboard=True)


def wandb_records(folder):
    """(id, records) of the one offline run in `folder`: blocks of 32 KiB as LevelDB logs have."""
    wandb.teardown()  # as the end of the process does: only then is the file sure to be whole
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, whole, part = path.read_bytes(), 7, [], b""
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last piece of one
            whole.append(Record.FromString(part))
            part = b""
    return path.stem.removeprefix("run-"), whole


def history(records):
    lines = []
    for record in records:
        if record.HasField("history"):
            items = record.history.item
            lines.append(
                {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            )
    return lines


def test_wandb_gets_every_number_and_the_config(tmp_path):
    workdir = tmp_path / "my_run"
    track(workdir, [1, 2], wandb="my_project")
    run_id, records = wandb_records(workdir)
    assert [(line["_step"], line["step"], line["loss"]) for line in history(records)] == [
        (1, 1, 1.0),
        (2, 2, 0.5),
    ]
    assert all("mfu" not in line for line in history(records))
    (run,) = [record.run for record in records if record.HasField("run")]
    assert (run.project, run.run_id, run.display_name) == ("my_project", run_id, "my_run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["seed"] == 1 and config["optimizer"] == {"b1": 0.9}


def test_wandb_goes_on_with_the_same_run(tmp_path):
    track(tmp_path, [1, 2], wandb="p")
    first, _ = wandb_records(tmp_path)
    (tmp_path / "wandb").rename(tmp_path / "earlier")
    track(tmp_path, [2, 3], last_step=1, wandb="p")
    second, records = wandb_records(tmp_path)
    assert first == second == (tmp_path / "wandb_id").read_text().strip()
    assert [line["step"] for line in history(records)] == [2, 3]


def test_a_new_run_in_the_same_folder_is_another_run_of_wandb(tmp_path):
    track(tmp_path, [1], wandb="p")
    first, _ = wandb_records(tmp_path)
    (tmp_path / "wandb").rename(tmp_path / "earlier")
    track(tmp_path, [1], wandb="p")
    assert wandb_records(tmp_path)[0] != first


def test_wandb_leaves_out_steps_that_it_has(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_SILENT", "false")
    track(tmp_path, [5, 3, 4, 5, 6], wandb="p")
    _, records = wandb_records(tmp_path)
    assert [line["step"] for line in history(records)] == [5, 6]
    printed = capfd.readouterr().err
    assert "run" in printed and "less than" not in printed  # one warning for each such step


def test_wandb_of_a_run_in_a_bucket(tmp_path):
    with running_bucket() as bucket:
        track(f"{bucket}/run", [1], wandb="p")
        stored = storage.read_bytes(f"{bucket}/run/wandb_id").decode()
    run_id, records = wandb_records(tmp_path)
    assert stored == f"{run_id}\n" and len(history(records)) == 1


def test_without_a_login_wandb_is_refused_at_once(tmp_path):
    code = "from easylm.track import check_trackers; check_trackers(tensorboard=False, wandb='p')"
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert "InputError: wandb: Weights & Biases refused: No API key configured" in result.stderr
    assert "WANDB_API_KEY" in result.stderr
    check_trackers(tensorboard=True, wandb="p")  # offline needs no key


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("tensorboardX", {"tensorboard": True, "wandb": ""}),
        ("wandb", {"tensorboard": False, "wandb": "p"}),
    ],
)
def test_a_missing_library_is_named_with_its_cure(module, options):
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        f"from easylm.track import check_trackers; check_trackers(**{options!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"found no {module} in this environment" in result.stderr
    assert "pip install '.[track]'" in result.stderr
