"""PyTorch .bin files: what torch saved comes back, and nothing else is unpickled."""

import json
import os
import random
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch

from easylm import storage
from easylm.converters.torch_bin import TorchBinSource
from easylm.errors import InputError
from tests import bucket

GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    "a": torch.randn(5, 3, generator=GENERATOR),
    "b": torch.randn(4, 2, generator=GENERATOR).to(torch.bfloat16),
    "transposed": torch.randn(4, 2, generator=GENERATOR).to(torch.bfloat16).T,
    "c": torch.randn(3, generator=GENERATOR).to(torch.float16),
    "d": torch.tensor(2.5),
    "e": torch.arange(4),
    "f": torch.tensor([True, False]),
}


def source(folder):
    return TorchBinSource(str(folder), None, "")


def save_shards(folder):
    names = list(TENSORS)
    weight_map = {}
    for number, part in enumerate((names[:2], names[2:]), 1):
        shard = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: TENSORS[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def assert_all_read(read):
    assert set(read.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        rows = [(0, None)] if not tensor.ndim else [(0, None), (1, 2), (1, None)]
        for start, end in rows:
            wanted = tensor[start:end] if tensor.ndim else tensor
            found = read.read(name, start, end)
            assert found.shape == tuple(wanted.shape)
            assert found.dtype == read.tensors[name].dtype
            np.testing.assert_array_equal(found.astype(np.float64), wanted.double().numpy())
    assert read.tensors["b"].dtype == ml_dtypes.bfloat16
    assert read.tensors["a"].shape == (5, 3)


def test_one_file_comes_back(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    read = source(tmp_path)
    assert read.kind.startswith("Hugging Face PyTorch .bin, 1 file, ")
    assert_all_read(read)


def test_shards_come_back(tmp_path):
    save_shards(tmp_path)
    read = source(tmp_path)
    assert read.kind.startswith("Hugging Face PyTorch .bin, 2 files, ")
    assert_all_read(read)


def test_a_bucket_is_copied_and_the_copies_are_gone_once_mapped(tmp_path, monkeypatch):
    save_shards(tmp_path)
    copies = tmp_path / "copies"
    copies.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(copies))
    with bucket.running_bucket() as url:
        for name in storage.list_files(str(tmp_path)):
            storage.write_bytes(f"{url}/model/{name}", (tmp_path / name).read_bytes())
        read = source(f"{url}/model")
        assert list(copies.iterdir()) == []
        assert_all_read(read)
        storage.write_bytes(f"{url}/model/pytorch_model-00002-of-00002.bin", b"no weights")
        with pytest.raises(InputError, match=r"not a file of torch\.save's zip format"):
            source(f"{url}/model")
        assert list(copies.iterdir()) == []


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-ran",)


def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin: holds more than tensors.*refused"):
        source(tmp_path)
    assert not os.path.exists("evil-ran")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path)
    content = path.read_bytes()
    for cut in [0, 1, 4, len(content) - 1, *random.Random(0).sample(range(len(content)), 50)]:
        path.write_bytes(content[:cut])
        with pytest.raises(InputError, match=r"pytorch_model.bin: not a file .* or truncated"):
            source(tmp_path)


def test_the_old_format_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"pytorch_model.bin: not a file of torch.save's zip for"):
        source(tmp_path)


def test_all_that_is_no_tensor_is_listed(tmp_path):
    state = {"model": {"a": torch.ones(2)}, "step": 3, "z": torch.ones(2, dtype=torch.complex64)}
    torch.save({**state, "ok": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError) as error:
        source(tmp_path)
    message = str(error.value)
    assert "3 problems" in message
    assert "pytorch_model.bin: model: found a dict; wanted a tensor of numbers" in message
    assert "step: found a int" in message
    assert "z: found a tensor of torch.complex64" in message
    torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="found a list; wanted a state dict"):
        source(tmp_path)


def test_index_and_shards_must_agree(tmp_path):
    save_shards(tmp_path)
    index_path = tmp_path / "pytorch_model.bin.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"]["ghost"] = "pytorch_model-00001-of-00002.bin"
    index["weight_map"]["other"] = "pytorch_model-00003-of-00003.bin"
    index_path.write_text(json.dumps(index))
    with pytest.raises(InputError) as error:
        source(tmp_path)
    message = str(error.value)
    assert "pytorch_model-00001-of-00002.bin: no tensor ghost" in message
    assert "pytorch_model-00003-of-00003.bin: no such file; pytorch_model.bin.index.json" in message
    torch.save(TENSORS, tmp_path / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(InputError, match=r"00002.bin: tensor a is in pytorch_model-00001-of-00002"):
        source(tmp_path)


def test_a_missing_torch_is_said(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from easylm.converters.torch_bin import TorchBinSource\n"
        f"TorchBinSource({str(tmp_path)!r}, None, '')"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "InputError" in run.stderr
    assert "PyTorch .bin files need torch to read: `pip install torch`" in run.stderr
