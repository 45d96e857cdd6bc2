"""Conversions and checkpoints in a bucket, as on a disk."""

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from easylm import storage
from easylm.checkpoint import (
    find_checkpoint,
    latest_step,
    make_bundle,
    read_bundle,
    read_state,
)
from easylm.convert import main
from easylm.errors import InputError
from easylm.saving import Checkpointer
from tests import bucket
from tests.converters import models


@pytest.fixture
def root():
    with bucket.running_bucket() as name:
        yield name


def convert(source, target, to, *options):
    main([f"--source={source}", f"--target={target}", f"--to={to}", *options])


def test_there_and_back_through_a_bucket(tmp_path, root):
    models.write_all(tmp_path)
    convert(tmp_path / "hf", f"{root}/native", "native")
    convert(f"{root}/native", f"{root}/hf", "hf")
    convert(f"{root}/hf", tmp_path / "back", "hf")
    names = storage.list_files(f"{root}/hf")
    assert "COMPLETE" in names and "config.json" in names and "tokenizer.json" in names
    back = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    weights = models.hf_model().state_dict()
    assert back.keys() == weights.keys()
    for name, array in back.items():
        assert array.tobytes() == weights[name].numpy().tobytes(), name
    for target, to in ((f"{root}/native", "native"), (f"{root}/hf", "hf")):
        with pytest.raises(InputError, match=f"{target} exists; wanted a new folder"):
            convert(tmp_path / "hf", target, to)


def test_a_refused_conversion_leaves_nothing_in_the_bucket(tmp_path, root):
    models.write_all(tmp_path)
    file = sorted((tmp_path / "hf").glob("model-*.safetensors"))[-1]
    weights = safetensors.numpy.load_file(file)
    name = sorted(weights)[-1]
    weights[name] = np.full_like(weights[name], np.nan)
    safetensors.numpy.save_file(weights, file, {"format": "pt"})
    for to in ("hf", "native"):
        with pytest.raises(InputError, match=f"{name} holds values that are not finite"):
            convert(tmp_path / "hf", f"{root}/{to}", to)
        assert not storage.exists(f"{root}/{to}")


def test_a_native_checkpoint_without_its_mark_is_refused(tmp_path, root):
    models.write_all(tmp_path)
    convert(tmp_path / "hf", f"{root}/native", "native")
    assert find_checkpoint(f"{root}/native") == f"{root}/native"
    fsspec.filesystem("gs").rm(f"{root}/native/commit_success.txt")
    with pytest.raises(InputError, match=r"native: the save .* did not finish"):
        convert(f"{root}/native", tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_weights_copied_from_a_bucket(tmp_path, root, monkeypatch):
    models.write_all(tmp_path)
    for name in storage.list_files(str(tmp_path / "hf_bin")):
        storage.write_bytes(f"{root}/bin/{name}", (tmp_path / "hf_bin" / name).read_bytes())
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    for to in ("hf", "native"):  # each reads by a way of its own
        convert(f"{root}/bin", tmp_path / f"to_{to}", to)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_newest_complete_checkpoint_of_a_bucket_comes_back(root):
    workdir = f"{root}/run"
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {"norm": {"scale": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=place)}}
    checkpointer = Checkpointer(workdir, keep=2)
    assert latest_step(workdir) is None and find_checkpoint(workdir) is None
    for step in (8, 9, 10):
        params = {"norm": {"scale": jnp.full(3, step, jnp.float32)}}
        checkpointer.save(step, params, params, make_bundle({"n": step}, {}))
    checkpointer.close()
    # A save that was cut off lacks the mark that is written last.
    for item in ("params", "bundle"):
        storage.write_bytes(f"{workdir}/checkpoints/11/{item}/metadata", b"x")
    with pytest.raises(InputError, match=r"11: the save that made this checkpoint did not finish"):
        find_checkpoint(f"{workdir}/checkpoints/11")

    assert latest_step(workdir) == 10
    params, opt_state = read_state(f"{workdir}/checkpoints/10", abstract, abstract)
    assert params["norm"]["scale"].tolist() == opt_state["norm"]["scale"].tolist() == [10] * 3
    assert find_checkpoint(workdir) == f"{workdir}/checkpoints/10"
    assert read_bundle(f"{workdir}/checkpoints/9")["model_config"] == {"n": 9}
    assert not storage.exists(f"{workdir}/checkpoints/8")
