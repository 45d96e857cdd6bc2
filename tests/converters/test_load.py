"""Loading onto meshes, against the mapping of tests/tiny.py, and in two processes."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from easylm.converters.llama import rules
from easylm.converters.load import load_params, make_update
from easylm.converters.safetensors_io import SafetensorsSource
from easylm.errors import InputError
from easylm.models.llama.sharding import param_shardings
from easylm.sharding import make_mesh
from tests import bucket, tiny


def save(folder, model, dtype=np.float32, **changes) -> SafetensorsSource:
    """The model's tensors in a new folder, but for `changes`: a dict name → array or None."""
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    weights.update(changes.get("tensors", {}))
    folder.mkdir(exist_ok=True)
    arrays = {name: np.ascontiguousarray(value.astype(dtype)) for name, value in weights.items()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    return SafetensorsSource(str(folder), model.config.to_dict(), "config.json")


def load(source, config, mesh="1,1,1", dtype=np.float32):
    sizes = np.prod([int(size) for size in mesh.split(",")])
    shardings = param_shardings(config, make_mesh(mesh, jax.devices()[:sizes]))
    return load_params(source, config, shardings, dtype, progress=False), shardings


def assert_same_bits(found, wanted):
    def check(path, a, b):
        assert a.shape == b.shape and a.dtype == b.dtype, path
        assert np.asarray(a).tobytes() == np.ascontiguousarray(b).tobytes(), path

    jax.tree_util.tree_map_with_path(check, found, wanted)


@pytest.mark.parametrize("mesh", ["1,1,1", "1,8,1", "2,2,2", "1,2,4"])
def test_sharded_parameters_have_the_bits_of_the_model(tmp_path, mesh):
    # 67 rows of vocabulary, and 8 heads and 2 KV heads, do not divide these meshes evenly.
    model = tiny.hf_llama(attention_bias=True, mlp_bias=True)
    config, params = tiny.native(model)
    found, shardings = load(save(tmp_path / "hf", model), config, mesh)
    assert_same_bits(found, params)
    assert jax.tree.all(
        jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), found, shardings)
    )


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_stays_itself_and_other_dtypes_are_cast(tmp_path, tied):
    model = tiny.hf_llama(tie_word_embeddings=tied)
    config, params = tiny.native(model)
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    source = save(tmp_path / "hf", model, ml_dtypes.bfloat16)
    assert_same_bits(load(source, config, "1,2,2", jnp.bfloat16)[0], rounded)
    widened = jax.tree.map(lambda x: x.astype(np.float32), rounded)
    assert_same_bits(load(source, config)[0], widened)
    assert_same_bits(load(save(tmp_path / "f32", model), config, dtype=jnp.bfloat16)[0], rounded)
    doubled = save(tmp_path / "f64", model, np.float64)
    assert_same_bits(load(doubled, config)[0], params)


def test_layers_of_different_dtypes_keep_their_values(tmp_path):
    model = tiny.hf_llama()
    config, params = tiny.native(model)
    source = save(tmp_path / "hf", model)
    weights = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].astype(np.float16)
    safetensors.numpy.save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    source = SafetensorsSource(str(tmp_path / "hf"), None, "config.json")
    params["layers"]["mlp"]["up_proj"]["kernel"][0] = weights[name].astype(np.float32).T
    assert_same_bits(load(source, config)[0], params)


def test_all_tensors_with_bad_values_are_listed(tmp_path):
    model = tiny.hf_llama()
    config, _ = tiny.native(model)
    bad = {
        "model.norm.weight": np.full(32, np.inf, np.float32),
        "model.layers.1.self_attn.k_proj.weight": np.full((8, 32), np.nan, np.float32),
    }
    source = save(tmp_path / "hf", model, tensors=bad)
    with pytest.raises(InputError) as error:
        load(source, config, "2,2,2")
    message = str(error.value)
    assert "2 problems" in message and all(f"tensor {name} holds" in message for name in bad)


def test_a_head_beside_tied_embeddings_must_equal_them(tmp_path):
    model = tiny.hf_llama(tie_word_embeddings=True)
    config, params = tiny.native(model)
    head = params["embed_tokens"]["embedding"].copy()
    source = save(tmp_path / "hf", model, tensors={"lm_head.weight": head})
    assert_same_bits(load(source, config, "1,2,2")[0], params)
    head[66, 31] += 1
    source = save(tmp_path / "hf", model, tensors={"lm_head.weight": head})
    with pytest.raises(InputError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        load(source, config, "1,2,2")


def test_new_words_get_the_mean_of_the_old_ones(tmp_path, capsys):
    model = tiny.hf_llama()
    config, params = tiny.native(model)
    source = save(tmp_path / "hf", model)
    wide = jax.tree.map(lambda x: x, config.__class__(**{**vars(config), "vocab_size": 72}))
    found, _ = load(source, wide, "2,2,2")
    embedding = params["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(found["embed_tokens"]["embedding"][:67], embedding)
    np.testing.assert_array_equal(found["lm_head"]["kernel"][:, :67], params["lm_head"]["kernel"])
    for row in range(67, 72):
        new = found["embed_tokens"]["embedding"][row], found["lm_head"]["kernel"][:, row]
        np.testing.assert_allclose(new[0], embedding.mean(0), atol=1e-7)
        np.testing.assert_allclose(new[1], params["lm_head"]["kernel"].mean(1), atol=1e-7)
    found["embed_tokens"]["embedding"] = found["lm_head"]["kernel"] = np.zeros(0)
    params["embed_tokens"]["embedding"] = params["lm_head"]["kernel"] = np.zeros(0)
    assert_same_bits(found, params)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "67 rows" in said and "72 wanted" in said


def test_a_vocabulary_does_not_shrink(tmp_path):
    model = tiny.hf_llama()
    config, _ = tiny.native(model)
    narrow = config.__class__(**{**vars(config), "vocab_size": 64})
    with pytest.raises(InputError, match="found 67 rows; wanted at most vocab_size = 64"):
        load(save(tmp_path / "hf", model), narrow)


@pytest.mark.parametrize("mesh", ["1,8,1", "1,2,4"])
def test_the_layers_of_several_processes_never_meet_whole_on_a_device(mesh):
    # As four processes of two devices would compile it.
    config, params = tiny.native(tiny.hf_llama(num_hidden_layers=4))
    shardings = param_shardings(config, make_mesh(mesh))
    for rule in [rule for rule in rules(config) if rule.transposed and rule.num_layers]:
        stack, sharding = params, shardings
        for key in rule.path:
            stack, sharding = stack[key], sharding[key]
        devices = NamedSharding(sharding.mesh, PartitionSpec(sharding.mesh.axis_names))
        pieces = (8, rule.hf_shape[1], rule.hf_shape[0] // 2)
        update = make_update(rule, rule, 4, sharding).lower(
            jax.ShapeDtypeStruct(stack.shape, np.float32, sharding=sharding),
            jax.ShapeDtypeStruct(pieces, np.float32, sharding=devices),
            jax.ShapeDtypeStruct((4,), np.int32),
        )
        assert "all-gather(" not in update.compile().as_text(), rule.path


@pytest.mark.parametrize("order", ["by process", "interleaved"])
def test_two_processes_read_disjoint_shares_and_hold_the_same_model(tmp_path, order):
    # 9 layers: the second process has none in its last turn.
    model = tiny.hf_llama(num_hidden_layers=9)
    model.save_pretrained(tmp_path / "hf")
    options = ["1000"] if order == "interleaved" else []
    run_two(tmp_path / "hf", tmp_path / "out", order, *options)
    before = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert_same_bits(after, before)

    reads = [json.loads((tmp_path / f"out.{i}.json").read_text()) for i in range(2)]
    total = sum(array.nbytes for array in before.values())
    for own in reads:
        assert sum(nbytes for *_, nbytes in own) <= 0.6 * total
    rows = [
        (name, row) for own in reads for name, start, end, _ in own for row in range(start, end)
    ]
    assert sorted(rows) == sorted((name, i) for name, x in before.items() for i in range(len(x)))


def run_two(*arguments):
    """Both processes of two_processes.py; fails with what they said."""
    port = bucket.free_port()
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.converters.two_processes",
                str(i),
                str(port),
                *map(str, arguments),
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
