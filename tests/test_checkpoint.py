"""Checkpoints come back bit for bit on any mesh, and damage is named, never loaded."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from easylm.checkpoint import (
    abstract_params_in,
    find_checkpoint,
    latest_step,
    make_bundle,
    read_bundle,
    read_params,
    read_state,
    tokenizer_files_of,
    write_params,
)
from easylm.errors import InputError
from easylm.models.llama.sharding import param_shardings
from easylm.saving import Checkpointer
from easylm.sharding import make_mesh
from tests.tiny import hf_llama, native

FILES = {"tokenizer.json": b"{}", "tokenizer.model": b"\x00\xff"}


@pytest.fixture(scope="module")
def tiny():
    return native(hf_llama())


def placed(config, params, mesh):
    return jax.device_put(params, param_shardings(config, make_mesh(mesh)))


def wanted(tree, shardings=None):
    shardings = jax.tree.map(lambda x: x.sharding, tree) if shardings is None else shardings
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.fixture(scope="module")
def step_folder(tiny, tmp_path_factory):
    config, params = tiny
    target = str(tmp_path_factory.mktemp("native") / "model")
    write_params(
        target, placed(config, params, "1,2,4"), make_bundle(config.to_hf("float32"), FILES)
    )
    return target


@pytest.mark.parametrize("mesh", ["1,2,4", "8,1,1", "2,2,2"])
def test_parameters_come_back_on_any_mesh(tiny, step_folder, mesh):
    config, params = tiny
    shardings = param_shardings(config, make_mesh(mesh))
    restored = read_params(step_folder, wanted(params, shardings))
    assert_same(restored, params)
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), restored, shardings)


def test_the_bundle_holds_model_and_tokenizer(tiny, step_folder):
    bundle = read_bundle(step_folder)
    assert bundle["model_config"] == tiny[0].to_hf("float32")
    assert tokenizer_files_of(bundle) == FILES


def test_shapes_are_known_without_reading(tiny, step_folder):
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params_in(step_folder))
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), tiny[1])


def test_some_parameters_can_be_read_alone_and_in_another_dtype(tiny, step_folder):
    scale = jax.ShapeDtypeStruct(
        tiny[1]["norm"]["scale"].shape,
        jnp.bfloat16,
        sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )
    restored = read_params(step_folder, {"norm": {"scale": scale}})
    assert_same(restored["norm"]["scale"], tiny[1]["norm"]["scale"].astype(jnp.bfloat16))


def test_saves_under_way_keep_what_they_were_given(tiny, tmp_path):
    # Each state is overwritten in place right after its save returns.
    config, params = tiny
    optimizer = optax.adamw(1e-2)
    params = placed(config, params, "2,2,2")
    opt_state = jax.jit(optimizer.init)(params)

    @jax.jit
    def update(params, opt_state):
        updates, opt_state = optimizer.update(params, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    update = jax.jit(update, donate_argnums=(0, 1))
    checkpointer = Checkpointer(str(tmp_path), keep=2)
    saved = {}
    for step in range(1, 6):
        params, opt_state = update(params, opt_state)
        saved[step] = jax.tree.map(np.array, jax.device_get((params, opt_state)))
        checkpointer.save(step, params, opt_state, make_bundle({}, {}))
    checkpointer.close()

    assert latest_step(str(tmp_path)) == 5
    kept = sorted(int(folder.name) for folder in (tmp_path / "checkpoints").iterdir())
    assert kept == [4, 5]
    for step in kept:
        step_folder = str(tmp_path / "checkpoints" / str(step))
        assert_same(read_state(step_folder, wanted(params), wanted(opt_state)), saved[step])


def test_a_path_may_mean_a_run_its_checkpoints_or_one_of_them(tmp_path):
    checkpointer = Checkpointer(str(tmp_path), keep=3)
    params = {"norm": {"scale": jnp.ones(3)}}
    for step in (9, 10):
        checkpointer.save(step, params, params, make_bundle({}, {}))
    checkpointer.close()
    folder = tmp_path / "checkpoints"
    # A save that was cut off leaves a folder under a temporary name.
    shutil.copytree(folder / "10", folder / "11.orbax-checkpoint-tmp-1")
    for path in (tmp_path, folder, folder / "10"):
        assert find_checkpoint(str(path)) == str(folder / "10")
    assert find_checkpoint(str(folder / "9")) == str(folder / "9")
    with pytest.raises(InputError, match=r"11\.orbax-checkpoint-tmp-1: the save .* did not finish"):
        find_checkpoint(str(folder / "11.orbax-checkpoint-tmp-1"))
    assert find_checkpoint(str(tmp_path / "nothing")) is None


def test_exports_by_step_are_no_checkpoints(tmp_path):
    for step in ("4", "12"):
        (tmp_path / "hf" / step).mkdir(parents=True)
        (tmp_path / "hf" / step / "model.safetensors").write_bytes(b"")
    assert find_checkpoint(str(tmp_path / "hf")) is None
    assert find_checkpoint(str(tmp_path)) is None


def test_a_target_that_exists_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match=r"exists; wanted a new folder"):
        write_params(str(tmp_path), tiny[1], make_bundle({}, {}))
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_refused_by_name(tiny, step_folder):
    config, params = tiny
    shardings = param_shardings(config, make_mesh("1,1,8"))
    other = wanted(params, shardings)
    other["norm"]["scale"] = jax.ShapeDtypeStruct((31,), jnp.float32)
    with pytest.raises(InputError, match=r"params: .*norm/scale: found \(32,\); wanted.*\(31,\)"):
        read_params(step_folder, other)
    other = wanted(params, shardings)
    other["lm_head"]["bias"] = jax.ShapeDtypeStruct((31,), jnp.float32)
    with pytest.raises(InputError, match=r"lm_head/bias: found nothing"):
        read_params(step_folder, other)


def test_another_format_is_refused(tmp_path):
    bundle = make_bundle({}, {})
    write_params(str(tmp_path / "x"), {"a": jnp.ones(2)}, {**bundle, "format": "easylm-9"})
    with pytest.raises(InputError, match=r"format: found 'easylm-9'; wanted 'easylm-1'"):
        read_bundle(str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("content", "wanted_message"),
    [
        ("[]", "format: found None; wanted 'easylm-1'"),
        ('{"format": "easylm-1", "run_config": null}', "found no model_config, tokenizer; wanted"),
    ],
)
def test_a_bundle_without_its_fields_is_refused(tmp_path, content, wanted_message):
    write_params(str(tmp_path / "x"), {"a": jnp.ones(2)}, make_bundle({}, {}))
    (tmp_path / "x" / "bundle" / "metadata").write_text(content)
    with pytest.raises(InputError, match=wanted_message):
        read_bundle(str(tmp_path / "x"))


def damaged(folder: pathlib.Path, into: pathlib.Path):
    """Copies of `folder`, each with one file cut in half or gone."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    for number, file in enumerate(files):
        for how in ("cut", "gone"):
            copy = into / f"{number}_{how}"
            shutil.copytree(folder, copy)
            victim = copy / file.relative_to(folder)
            if how == "gone":
                victim.unlink()
            else:
                victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
            yield copy, victim


# tensorstore's futures complain of being dropped when a read beside them has failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_an_error_or_reads_the_same(tiny, step_folder, tmp_path):
    config, params = tiny
    abstract = wanted(params, param_shardings(config, make_mesh("1,1,8")))
    refused = 0
    for copy, victim in damaged(pathlib.Path(step_folder), tmp_path):
        try:
            assert tokenizer_files_of(read_bundle(str(copy))) == FILES, victim
            assert_same(read_params(str(copy), abstract), params)
        except InputError as error:
            refused += 1
            assert str(copy) in str(error)
    assert refused >= 6  # the manifest, the bundle and the data, cut and gone
