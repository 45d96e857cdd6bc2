"""One interface to weights of every kind: what they are, their tokenizer, and loading on a mesh."""

import dataclasses
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm.chat import TULU
from easylm.checkpoint import make_bundle, write_params
from easylm.converters.weights import open_weights
from easylm.errors import InputError
from easylm.models.llama.sharding import param_shardings
from easylm.saving import Checkpointer
from easylm.sharding import make_mesh
from easylm.tokenizer import load_tokenizer, tokenizer_files
from tests import tiny
from tests.converters import models

TURNS = [{"role": "user", "content": "The quick fox"}, {"role": "assistant", "content": "jumps"}]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    models.write_all(folder)
    config, params = tiny.native(models.hf_model())
    files = tokenizer_files(load_tokenizer(folder / "tokenizer"))
    bundle = make_bundle(config.to_hf("float32"), tokenizer_files=files)
    write_params(str(folder / "native"), jax.tree.map(jnp.asarray, params), bundle)
    return folder


def opened(sources, name):
    config = str(sources / "hf" / "config.json") if name == "streaming_params" else ""
    return open_weights(str(sources / name), hf_config=config)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


@pytest.mark.parametrize("name", ["hf", "hf_bin", "streaming_params", "native"])
def test_every_kind_loads_the_same_model_onto_a_mesh(sources, name):
    weights = opened(sources, name)
    config, params = tiny.native(models.hf_model())
    assert weights.config == config
    assert weights.dtype == "float32"
    shardings = param_shardings(config, make_mesh("1,2,4"))
    loaded = weights.load(config, shardings, jnp.dtype(jnp.float32))
    assert_same(loaded, params)
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings


def test_a_native_checkpoint_is_cast_and_grown_where_it_lies(sources):
    weights = opened(sources, "native")
    larger = dataclasses.replace(weights.config, vocab_size=models.VOCAB_SIZE + 5)
    shardings = param_shardings(larger, make_mesh("1,4,2"))
    loaded = weights.load(larger, shardings, jnp.dtype(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings
    # By the other way in, through Hugging Face's names.
    hf = opened(sources, "hf_bfloat16")
    assert hf.dtype == "bfloat16"
    assert_same(loaded, hf.load(larger, shardings, jnp.dtype(jnp.bfloat16)))


def test_a_vocabulary_does_not_shrink(sources):
    weights = opened(sources, "native")
    smaller = dataclasses.replace(weights.config, vocab_size=models.VOCAB_SIZE - 1)
    shardings = param_shardings(smaller, make_mesh("1,4,2"))
    with pytest.raises(InputError, match="can grow, not shrink"):
        weights.load(smaller, shardings, jnp.dtype(jnp.float32))


def test_a_workdir_means_its_newest_checkpoint(sources, tmp_path):
    config, params = tiny.native(models.hf_model())
    params = jax.tree.map(jnp.asarray, params)
    run = Checkpointer(str(tmp_path), keep=2)
    for step in (3, 12):
        bundle = make_bundle(config.to_hf("float32"), tokenizer_files={}, run_config={})
        run.save(step, params, {"count": jnp.int32(step)}, {**bundle, "step": step})
    run.close()
    # A workdir also has a config.json, of the run.
    (tmp_path / "config.json").write_text('{"seed": 42}')
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "12"):
        assert open_weights(str(path)).where == str(tmp_path / "checkpoints" / "12")
    with pytest.raises(InputError, match=r"no tokenizer came .* data\.tokenizer"):
        open_weights(str(tmp_path)).tokenizer()


@pytest.mark.parametrize("name", ["hf", "streaming_params", "native"])
def test_the_tokenizer_comes_with_the_weights(sources, name):
    expected = load_tokenizer(sources / "tokenizer")
    tokenizer = opened(sources, name).tokenizer()
    assert tokenizer.chat_template == TULU
    assert tokenizer.apply_chat_template(TURNS) == expected.apply_chat_template(TURNS)


def test_a_tokenizer_has_the_chat_template_it_came_with(sources, tmp_path):
    for name, template in {"own": "{{ messages[0]['content'] }}", "none": None}.items():
        shutil.copytree(sources / "hf", tmp_path / name)
        tokenizer = load_tokenizer(sources / "tokenizer")
        tokenizer.chat_template = template
        for file, content in tokenizer_files(tokenizer).items():
            (tmp_path / name / file).write_bytes(content)
    own = open_weights(str(tmp_path / "own")).tokenizer()
    assert own.apply_chat_template(TURNS, tokenize=False) == "The quick fox"
    assert open_weights(str(tmp_path / "none")).tokenizer().chat_template is None


def test_a_checkpoint_takes_no_other_config(sources):
    with pytest.raises(InputError, match=r"native checkpoint, .* leave out hf_config"):
        open_weights(str(sources / "native"), hf_config=str(sources / "hf"))


def test_opening_hugging_face_weights_loads_no_jax(sources):
    program = (
        "import sys\nfrom easylm.converters.weights import open_weights\n"
        "print(open_weights(sys.argv[1]).kind)\n"
        "print([name for name in ('jax', 'torch', 'transformers') if name in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(sources / "hf")], capture_output=True, text=True
    )
    kind, loaded = result.stdout.splitlines()
    assert kind.startswith("Hugging Face safetensors")
    assert loaded == "[]"
