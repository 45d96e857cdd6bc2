"""What `open_source` finds by looking, and what it says of everything else."""

import contextlib
import http.server
import json
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import urllib.parse

import numpy as np
import pytest
import torch

from easylm import storage
from easylm.converters.safetensors_io import SafetensorsWriter
from easylm.converters.sources import describe_unknown, open_source
from easylm.errors import InputError
from tests import bucket
from tests.converters import easylm_encoder as encoder
from tests.converters.test_easylm_stream import CONFIG, hf_weights, tree

WEIGHTS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}


def save_safetensors(folder, config=CONFIG):
    os.makedirs(folder, exist_ok=True)
    with SafetensorsWriter(str(folder), [("a", (2, 3), np.dtype(np.float32))]) as writer:
        writer.write("a", WEIGHTS["a"])
    if config:
        (folder / "config.json").write_text(json.dumps(config))


def save_bin(folder):
    os.makedirs(folder, exist_ok=True)
    torch.save({"a": torch.from_numpy(WEIGHTS["a"])}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG))


@pytest.mark.parametrize("save", [save_safetensors, save_bin])
def test_a_hugging_face_folder_is_found(tmp_path, save):
    save(tmp_path / "model")
    for path in (f"{tmp_path}/model", f"{tmp_path}/model/"):
        read = open_source(path)
        np.testing.assert_array_equal(read.read("a"), WEIGHTS["a"])
        assert read.config == CONFIG
        assert read.config_path == f"{tmp_path}/model/config.json"
        assert read.folder == f"{tmp_path}/model"


def test_a_folder_in_the_home_or_the_working_folder_is_found(tmp_path, monkeypatch):
    save_safetensors(tmp_path / "org" / "model")
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(open_source("org/model").read("a"), WEIGHTS["a"])
    monkeypatch.setenv("HOME", str(tmp_path))
    np.testing.assert_array_equal(open_source("~/org/model").read("a"), WEIGHTS["a"])


def test_safetensors_are_preferred_to_bin(tmp_path):
    save_bin(tmp_path)
    save_safetensors(tmp_path)
    assert open_source(str(tmp_path)).kind.startswith("Hugging Face safetensors")


def test_a_bucket_is_looked_into(tmp_path):
    save_safetensors(tmp_path / "model")
    (tmp_path / "streaming_params").write_bytes(encoder.stream(tree(layers=1), True))
    with bucket.running_bucket() as url:
        for name in ("model/model.safetensors", "model/config.json", "streaming_params"):
            storage.write_bytes(f"{url}/{name}", (tmp_path / name).read_bytes())
        read = open_source(f"{url}/model")
        np.testing.assert_array_equal(read.read("a"), WEIGHTS["a"])
        assert read.config == CONFIG
        local = tmp_path / "one_layer.json"
        local.write_text(json.dumps({**CONFIG, "num_hidden_layers": 1}))
        assert open_source(f"{url}/streaming_params", str(local)).kind.startswith("EasyLM")
        missing = "gs://tests/none: no such file or folder; check the spelling, and that .*; wanted"
        with pytest.raises(InputError, match=missing):
            open_source(f"{url}/none")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("streaming_params_2548", encoder.stream(tree(), True)),
        ("streaming_train_state", encoder.stream(encoder.train_state(tree()), True)),
        ("renamed", encoder.stream(tree(), False)),
        ("flax_params", encoder.document(tree())),
    ],
)
def test_an_easylm_file_is_found_by_its_first_bytes(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(CONFIG))
    for hf_config in (f"{tmp_path}/hf", f"{tmp_path}/hf/", f"{tmp_path}/hf/config.json"):
        read = open_source(f"{tmp_path}/{name}", hf_config)
        assert read.kind.startswith("EasyLM")
        assert read.folder == f"{tmp_path}/hf"
        wanted = hf_weights()["model.layers.1.self_attn.q_proj.weight"]
        found = read.read("model.layers.1.self_attn.q_proj.weight")
        np.testing.assert_array_equal(found, wanted)
    straight = open_source(f"{tmp_path}/{name}", hf_config, unpermuted=True)
    assert not np.array_equal(straight.read("model.layers.1.self_attn.q_proj.weight"), wanted)
    with pytest.raises(InputError, match=r"does not say how many heads.* wanted --hf_config=PATH"):
        open_source(f"{tmp_path}/{name}")


def test_an_empty_stream_is_cut_not_unknown(tmp_path):
    (tmp_path / "streaming_params").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(InputError, match="111 of 111 tensors are missing"):
        open_source(f"{tmp_path}/streaming_params", str(tmp_path))


def test_options_that_do_not_fit_are_refused(tmp_path):
    save_safetensors(tmp_path / "with")
    with pytest.raises(InputError, match="--unpermuted is for EasyLM files; this is a folder"):
        open_source(f"{tmp_path}/with", unpermuted=True)
    with pytest.raises(InputError, match=r"has a config.json of its own; --hf_config is for"):
        open_source(f"{tmp_path}/with", hf_config=f"{tmp_path}/with")
    save_safetensors(tmp_path / "without", config=None)
    with pytest.raises(InputError, match=r"has weights but no config.json; wanted one there, or"):
        open_source(f"{tmp_path}/without")
    assert open_source(f"{tmp_path}/without", f"{tmp_path}/with").config == CONFIG


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: not valid JSON"),
        ("[" * 100_000, "config.json: not valid JSON: maximum recursion depth"),
        ("9" * 5000, "config.json: not valid JSON: Exceeds the limit"),
        ("[]", "config.json: found a list; wanted a JSON obj"),
    ],
)
def test_a_broken_config_is_named(tmp_path, text, message):
    save_safetensors(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        open_source(str(tmp_path))
    with pytest.raises(InputError, match=r"nowhere.json: no such file"):
        (tmp_path / "streaming_params").write_bytes(b"")
        open_source(f"{tmp_path}/streaming_params", f"{tmp_path}/nowhere.json")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-ran",)


@pytest.mark.parametrize("name", ["metadata_100.pkl", "dataset_100.pkl", "streaming_params", "x"])
def test_pickles_are_never_opened(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    for protocol in range(2 if "pkl" not in name else 0, pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(Evil(), protocol))
        with pytest.raises(InputError, match=r"a Python pickle.*never opened.*streaming_params"):
            open_source(str(path))
    assert not os.path.exists("evil-ran")


def unknown_places(root):
    """Path → what is said of it."""
    for name in ("empty", "config", "streams", "shards", "other"):
        (root / name).mkdir()
    (root / "config" / "config.json").write_text("{}")
    (root / "streams" / "streaming_params_1").write_bytes(b"")
    (root / "streams" / "streaming_train_state").write_bytes(b"")
    (root / "shards" / "model-00001-of-00002.safetensors").write_bytes(b"")
    (root / "other" / "notes.txt").write_text("hello")
    (root / "model.safetensors").write_bytes(b"")
    return {
        "nothing": "nothing: no such file or folder; wanted a Hugging Face folder",
        "empty": "empty: no files in this folder; wanted a Hugging Face folder",
        "config": "config: a folder with config.json but no weights; wanted",
        "streams": "streams: a folder with EasyLM files; give one of them: streaming_params_1, "
        "streaming_train_state",
        "shards": "shards: 1 weight files (model-00001-of-00002.safetensors, ...) without their "
        "index file",
        "other": "other: a folder without config.json and weights (found notes.txt); wanted",
        "other/notes.txt": "notes.txt: a file of no known kind (it begins b'hello'); wanted",
        "model.safetensors": "model.safetensors: weights go with the files beside them; give their",
    }


def test_what_is_unknown_is_described(tmp_path):
    for place, said in unknown_places(tmp_path).items():
        with pytest.raises(InputError) as error:
            open_source(f"{tmp_path}/{place}")
        assert said in str(error.value)
        assert str(describe_unknown(f"{tmp_path}/{place}")) == str(error.value)


def test_easylms_prefixes_are_explained():
    for prefix in ("params", "trainstate_params", "flax_params"):
        with pytest.raises(InputError, match=f"give the path without {prefix}::, as gs://b/x"):
            open_source(f"{prefix}::gs://b/x")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as a download needs; every repository is in `folder`."""

    folder: pathlib.Path
    asked: list[str]
    commit = "0" * 40

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/")
        repository = self.folder / "/".join(path.removeprefix("api/models/").split("/")[:2])
        self.asked.append(f"{self.command} {path}")
        if not repository.is_dir():
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if "/tree/" in path:
            files = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                for file in repository.iterdir()
            ]
            return self.answer(200, json.dumps(files).encode(), {})
        if path.startswith("api/models/"):
            files = [{"rfilename": file.name} for file in repository.iterdir()]
            about = {"id": "org/name", "modelId": "org/name", "sha": self.commit, "private": False}
            about |= {"siblings": files, "downloads": 0, "tags": []}
            return self.answer(200, json.dumps(about).encode(), {})
        content = (repository / path.rpartition("/")[2]).read_bytes()
        headers = {"ETag": f'"{abs(hash(content)):x}"', "X-Repo-Commit": self.commit}
        return self.answer(200, content, headers)

    do_HEAD = do_GET

    def answer(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def running_hub(folder):
    asked = []
    handler = type("Handler", (Hub,), {"folder": folder, "asked": asked})
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}", asked
        server.shutdown()


def open_from_hub(name, endpoint, cache, offline=False):
    """The output of a fresh process: huggingface_hub reads the environment when imported."""
    program = (
        "import sys; from easylm.converters.sources import open_source\n"
        "read = open_source(sys.argv[1]); print(read.kind, read.read('a').tolist())"
    )
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": str(int(offline))}
    run = subprocess.run(
        [sys.executable, "-c", program, name],
        env={**os.environ, **settings, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
    )
    return run.stdout + run.stderr.replace("\n", " ")


def test_a_model_of_the_hub_is_downloaded_without_what_it_does_not_need(tmp_path):
    save_safetensors(tmp_path / "hub" / "org" / "safe")
    save_bin(tmp_path / "hub" / "org" / "bin")
    for name in ("consolidated.safetensors", "pytorch_model.bin", "README.md"):
        (tmp_path / "hub" / "org" / "safe" / name).write_bytes(b"large")
    with running_hub(tmp_path / "hub") as (endpoint, asked):
        said = open_from_hub("org/safe", endpoint, tmp_path / "cache")
        assert "Hugging Face safetensors, 1 file" in said, said
        assert "[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]" in said
        downloaded = {place.rpartition("/")[2] for place in asked if place.startswith("GET org/")}
        assert downloaded == {"config.json", "model.safetensors"}
        assert "Hugging Face PyTorch .bin, 1 file" in open_from_hub(
            "org/bin", endpoint, tmp_path / "cache"
        )
        said = open_from_hub("org/none", endpoint, tmp_path / "cache")
        assert "InputError: org/none: no such folder here, and the Hugging Face hub gave no" in said
    # What was downloaded is found without the network.
    said = open_from_hub("org/safe", "http://localhost:1", tmp_path / "cache", offline=True)
    assert "Hugging Face safetensors, 1 file" in said, said


def test_an_unreachable_hub_is_said(tmp_path):
    for offline in (False, True):
        said = open_from_hub("org/none", "http://localhost:1", tmp_path / "cache", offline)
        assert "InputError: org/none: no such folder here, and the Hugging Face hub gave no" in said
        assert "Check the spelling, the network, HF_ENDPOINT, and for a private" in said


def test_finding_out_needs_neither_jax_nor_torch():
    program = (
        "import sys, easylm.converters.sources\n"
        "print([name for name in ('jax', 'torch', 'huggingface_hub') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "[]\n"
