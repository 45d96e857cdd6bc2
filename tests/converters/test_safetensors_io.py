"""Safetensors, against the safetensors library both ways, and files that are wrong."""

import json
import random

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from easylm import storage
from easylm.converters import safetensors_io
from easylm.converters.safetensors_io import SafetensorsSource, SafetensorsWriter
from easylm.errors import InputError
from tests import bucket

RNG = np.random.default_rng(0)
TENSORS = {
    "a.weight": RNG.normal(size=(7, 3)).astype(np.float32),
    "b.weight": RNG.normal(size=(5, 2, 2)).astype(ml_dtypes.bfloat16),
    "c": np.array(3.5, np.float16),
    "d": np.zeros((0, 4), np.float32),
    "e": np.arange(6, dtype=np.int64),
    "f": np.array([True, False, True]),
    "g": np.arange(5, dtype=np.uint8),
    "h": RNG.normal(size=4),
}


def plan(tensors):
    return [(name, array.shape, array.dtype) for name, array in tensors.items()]


def write(folder, tensors=TENSORS, **options):
    with SafetensorsWriter(str(folder), plan(tensors), **options) as writer:
        for name, array in tensors.items():
            writer.write(name, array)


def source(folder):
    return SafetensorsSource(str(folder), None, "")


def assert_same(found, wanted):
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert found.tobytes() == wanted.tobytes()


def raw_file(header: dict | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_the_library_reads_what_is_written(tmp_path):
    write(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(TENSORS)
    read = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for name, wanted in TENSORS.items():
        tensor = read[name]
        assert tuple(tensor.shape) == wanted.shape
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.view(torch.uint16)
        assert tensor.numpy().tobytes() == wanted.tobytes()
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0


def test_what_the_library_writes_is_read(tmp_path):
    tensors = {name: torch.arange(12.0).reshape(3, 4).to(torch.bfloat16) * k
               for k, name in enumerate("xyz")}  # fmt: skip
    tensors["single"] = torch.tensor(2.5)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    read = source(tmp_path)
    assert set(read.tensors) == set(tensors)
    assert read.tensors["z"].dtype == ml_dtypes.bfloat16
    for name, tensor in tensors.items():
        assert_equal = read.read(name).astype(np.float32)
        np.testing.assert_array_equal(assert_equal, tensor.to(torch.float32).numpy())


def test_shards_hold_what_fits_and_the_index_adds_up(tmp_path):
    tensors = {f"t{i}": np.full((4, 4), i, np.float32) for i in range(5)}
    tensors["huge"] = np.ones((10, 10), np.float32)
    tensors["last"] = np.ones(1, np.float32)
    write(tmp_path, tensors, max_shard_bytes=130)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names[:-1] == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    held = {}
    for shard in names[:-1]:
        for name, array in safetensors.numpy.load_file(tmp_path / shard).items():
            held[name] = shard
            assert_same(array, tensors[name])
    assert held == index["weight_map"]
    read = source(tmp_path)
    assert read.kind == "Hugging Face safetensors, 5 files, 1.3 kB"
    for name, wanted in tensors.items():
        assert_same(read.read(name), wanted)


def test_rows_are_read_alone(tmp_path):
    write(tmp_path)
    read = source(tmp_path)
    for name, wanted in TENSORS.items():
        assert_same(read.read(name), wanted)
        if wanted.ndim:
            assert_same(read.read(name, 1, 3), wanted[1:3])
            assert_same(read.read(name, 2), wanted[2:])
            assert_same(read.read(name, 3, 3), wanted[3:3])


def test_strided_arrays_are_written_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_io, "_WRITE_BYTES", 100)
    wide = np.arange(60 * 31, dtype=np.float32).reshape(60, 31)
    tensors = {"t": wide.T, "s": wide[::2], "p": wide.reshape(4, 3, 5, 31).swapaxes(1, 2)}
    write(tmp_path, tensors)
    for name, array in safetensors.numpy.load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(array, tensors[name])


def test_a_bucket_holds_the_same(tmp_path):
    with bucket.running_bucket() as url:
        with storage.write_folder(f"{url}/model") as folder:
            write(folder, max_shard_bytes=100)
        read = source(f"{url}/model")
        for name, wanted in TENSORS.items():
            assert_same(read.read(name), wanted)
            if wanted.ndim:
                assert_same(read.read(name, 1, 3), wanted[1:3])


def test_the_writer_keeps_to_its_plan(tmp_path):
    array = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="planned twice"):
        SafetensorsWriter(str(tmp_path), plan({"a": array}) * 2)
    with (
        pytest.raises(ValueError, match=r"1 planned tensors were not written: .'a'."),
        SafetensorsWriter(str(tmp_path), plan({"a": array})),
    ):
        pass
    for name, wrong in (("b", array), ("a", array.T), ("a", array.astype(np.float16))):
        with (
            pytest.raises(ValueError, match=r"wrote .*; the plan says a \(2, 3\) float32"),
            SafetensorsWriter(str(tmp_path), plan({"a": array})) as writer,
        ):
            writer.write(name, wrong)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "model.safetensors: 0 bytes; too short"),
        (raw_file({}, b"")[:9], "model.safetensors: truncated in its header: 9 bytes; wanted at"),
        (b"\xff" * 20, "model.safetensors: not a safetensors file"),
        (raw_file(b"{]", b""), "the safetensors header is not valid JSON"),
        (raw_file(b"\xff\xff", b""), "the safetensors header is not valid JSON"),
        (raw_file(b"[]", b""), "the safetensors header is not a JSON object"),
        (
            raw_file(b'{"a": {}, "a": {}}', b""),
            "the safetensors header is not valid JSON: a twice",
        ),
        (raw_file({"a": 3}, b""), "tensor a: found 3; wanted dtype, shape and data_offsets"),
        (raw_file({"a": entry(0, 4, [4], "F8_E4M3")}, b"1234"), "a: dtype: found 'F8_E4M3'; want"),
        (raw_file({"a": entry(0, 4, [-1])}, b"1234"), r"tensor a: shape: found \[-1\]; wanted a"),
        (raw_file({"a": entry(0, 4, [1.0])}, b"1234"), r"tensor a: shape: found \[1.0\]; wanted"),
        (raw_file(b"[" * 100_000, b""), "the safetensors header is not valid JSON: max"),
        (raw_file(b"9" * 5000, b""), "the safetensors header is not valid JSON: Exceeds the limit"),
        (raw_file({"a": entry(0, 4, [1], ["F32"])}, b"1234"), r"dtype: found \['F32'\]; wanted"),
        (
            raw_file({"a": entry(0, 4, [10**4000] * 3)}, b"1234"),
            r"model.safetensors: tensor a: shape: found \[10+...; wanted at most 64 numbers of",
        ),
        (raw_file({"a": entry(0, 4, [9] * 5000)}, b"1234"), r"a: shape: found \[9, .*; wanted at"),
        (raw_file({"a": entry(0, 1 << 63, [1])}, b"1234"), r"a: data_offsets: found \[0, 922.*; w"),
        (raw_file({"a": entry(4, 0, [1])}, b"1234"), r"data_offsets: found \[4, 0\]; wanted \[st"),
        (
            raw_file({"a": entry(0, 4, [3])}, b"1234"),
            r"tensor a: data_offsets \[0, 4\] hold 4 bytes; F32 \[3\] wants 12",
        ),
        (
            raw_file({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
            r"tensor b starts at byte \d+, where it leaves a gap after a; wanted",
        ),
        (
            raw_file({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
            r"tensor b starts at byte \d+, where it overlaps a; wanted",
        ),
        (raw_file({"a": entry(0, 4, [1])}, bytes(6)), "2 bytes after the last tensor: the file"),
    ],
)
def test_a_wrong_file_is_named_with_its_fault(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=message):
        source(tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    data_start = 8 + int.from_bytes(content[:8], "little")
    boundaries = [0, 1, 7, 8, 9, data_start - 1, data_start, len(content) - 1]
    offsets = json.loads(content[8:data_start])
    boundaries += [
        data_start + offsets[name]["data_offsets"][0] + step for name in TENSORS for step in (-1, 0)
    ]
    for cut in boundaries + random.Random(0).sample(range(len(content)), 50):
        path.write_bytes(content[:cut])
        with pytest.raises(InputError, match=r"model.safetensors: .*(truncated|too short)"):
            source(tmp_path)


def test_a_cut_shard_says_which_tensor_and_both_sizes(tmp_path):
    tensors = {"a": np.ones((4, 4), np.float32), "b": np.ones((4, 4), np.float32)}
    write(tmp_path, tensors, max_shard_bytes=64)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-10])
    message = f"{shard.name}: truncated at tensor b: the file has {size - 10} bytes; wanted {size}"
    with pytest.raises(InputError, match=message):
        source(tmp_path)


def test_everything_wrong_between_index_and_shards_is_listed_at_once(tmp_path):
    tensors = {name: np.ones((4, 4), np.float32) for name in "abcd"}
    write(tmp_path, tensors, max_shard_bytes=64)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    first, second, third, fourth = (f"model-0000{i}-of-00004.safetensors" for i in range(1, 5))
    index["weight_map"] |= {"a": second, "ghost": third}
    del index["weight_map"]["c"]
    index["weight_map"]["x"] = first
    index_path.write_text(json.dumps(index))
    (tmp_path / fourth).unlink()
    with pytest.raises(InputError) as error:
        source(tmp_path)
    message = str(error.value)
    assert "5 problems" in message, message
    assert f"{fourth}: no such file; {index_path.name} wants it for 1 tensors" in message
    assert f"{second}: no tensor a, which {index_path.name} places there; it is in" in message
    assert f"{third}: no tensor ghost" in message
    assert f"{first}: no tensor x, which {index_path.name} places there; no shard has it" in message
    assert f"{third}: tensor c is not in {index_path.name}" in message


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    tensors = {name: np.ones((4, 4), np.float32) for name in "ab"}
    write(tmp_path, tensors, max_shard_bytes=64)
    second = tmp_path / "model-00002-of-00002.safetensors"
    safetensors.numpy.save_file(tensors, second)
    with pytest.raises(InputError, match=f"{second.name}: tensor a is in model-00001-of-00002.saf"):
        source(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}']
)
def test_a_wrong_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"index.json: not an index of shards; wanted a JSON obj"):
        source(tmp_path)
