"""Equal parameters have one fingerprint wherever they lie, and any others another."""

import hashlib
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm.fingerprint import _all_words, params_fingerprint
from easylm.models.llama.sharding import param_shardings
from easylm.sharding import make_mesh
from tests import bucket
from tests.tiny import hf_llama, native

DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def tiny():
    return native(hf_llama(attention_bias=True))


def on_mesh(tiny, shape, dtype, devices=None):
    config, params = tiny
    mesh = make_mesh(shape, devices)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return jax.device_put(params, param_shardings(config, mesh))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mesh_does_not_matter(tiny, dtype):
    shapes = ("8,1,1", "1,8,1", "1,1,8", "2,2,2", "1,2,4")
    found = {params_fingerprint(on_mesh(tiny, shape, dtype)) for shape in shapes}
    found.add(params_fingerprint(on_mesh(tiny, "1,1,1", dtype, jax.devices()[:1])))
    # Other devices first, so that the parts of the arrays are summed in another order.
    found.add(params_fingerprint(on_mesh(tiny, "1,4,2", dtype, jax.devices()[::-1])))
    assert len(found) == 1
    (fingerprint,) = found
    assert len(fingerprint) == 32 and int(fingerprint, 16)


def test_nothing_is_gathered():
    # Which would cost a pod its memory: what devices exchange is a word for each of them.
    mesh = make_mesh("1,4,2")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp", "tensor"))
    leaf = jax.ShapeDtypeStruct((4, 64, 64), jnp.float32, sharding=sharding)
    memory = _all_words.lower([leaf]).compile().memory_analysis()
    assert memory.argument_size_in_bytes == 4 * 64 * 64 * 4 // 8
    assert memory.temp_size_in_bytes < 1024


PROCESS = """
import sys
import jax
import jax.numpy as jnp
from easylm.fingerprint import params_fingerprint
from easylm.sharding import make_mesh
from jax.sharding import NamedSharding, PartitionSpec

process, port = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
assert len(jax.devices()) == 16
kernel = jnp.arange(64, dtype=jnp.float32).reshape(4, 16)
split = NamedSharding(make_mesh("2,4,2"), PartitionSpec("tensor", ("data", "fsdp")))
print(params_fingerprint({"norm": {"kernel": jax.device_put(kernel, split)}}))
"""


def test_the_number_of_processes_does_not_matter():
    kernel = jnp.arange(64, dtype=jnp.float32).reshape(4, 16)
    expected = params_fingerprint({"norm": {"kernel": kernel}})
    port = bucket.free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(i), str(port)],
            env=dict(os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    # Beside what gloo says.
    assert all(expected in out.split() for out, _ in outputs), outputs


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_changed_bit_changes_it(dtype):
    values = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(jnp.dtype(dtype))
    found = {params_fingerprint({"kernel": jnp.asarray(values)})}
    unsigned = f"uint{8 * values.itemsize}"
    changes = [(place, bit) for place in (0, 52, 104) for bit in range(8 * values.itemsize)]
    for place, bit in changes:
        changed = values.copy()
        changed.view(unsigned).reshape(-1)[place] ^= 1 << bit
        found.add(params_fingerprint({"kernel": jnp.asarray(changed)}))
    assert len(found) == 1 + len(changes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swapped_values_change_it(dtype):
    values = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(jnp.dtype(dtype))
    flat = values.reshape(-1)
    found = {params_fingerprint({"kernel": jnp.asarray(values)})}
    swaps = [(i, j) for i in range(0, 24, 3) for j in range(i)]
    for i, j in swaps:
        swapped = flat.copy()
        swapped[[i, j]] = flat[[j, i]]
        found.add(params_fingerprint({"kernel": jnp.asarray(swapped.reshape(values.shape))}))
    for axis in range(3):
        found.add(params_fingerprint({"kernel": jnp.asarray(np.roll(values, 1, axis))}))
    assert len(found) == 1 + len(swaps) + 3


def test_paths_shapes_and_dtypes_count():
    zeros = jnp.zeros((2, 6))
    trees = [
        {"a": zeros},
        {"b": zeros},
        {"a": {"a": zeros}},
        {"a": zeros, "b": zeros},
        {"a": zeros.reshape(3, 4)},
        {"a": zeros.reshape(12)},
        {"a": zeros.astype(jnp.bfloat16)},
        {"a": zeros.astype(jnp.float16)},
        {"a": zeros.at[0, 0].set(-0.0)},
        {"a": jnp.zeros(())},
        {"a": jnp.zeros((2, 0))},
        {},
    ]
    assert len({params_fingerprint(tree) for tree in trees}) == len(trees)


def test_two_parameters_that_change_places_change_it():
    a, b = jnp.arange(6.0), jnp.arange(6.0) + 1
    assert params_fingerprint({"q": a, "k": b}) != params_fingerprint({"q": b, "k": a})
    # The order in which a dict was filled is no difference.
    assert params_fingerprint({"q": a, "k": b}) == params_fingerprint({"k": b, "q": a})


def test_it_is_the_sum_it_says():
    # Stored reference log-probabilities are found by it, so another sum would lose them.
    def mixed(word):
        word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
        word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
        return word ^ word >> 16

    values = np.random.default_rng(0).standard_normal((2, 3, 4), np.float32)
    sums = [0, 0]
    for (i, j, k), bits in np.ndenumerate(values.view(np.uint32)):
        first, second = (i * s + j * s**2 + k * s**3 for s in (0x9E3779B1, 0x85EBCA77))
        word = mixed((int(bits) + first) % 2**32)
        sums[0] += word
        sums[1] += mixed(word ^ second % 2**32)
    text = json.dumps([["mlp/kernel", [2, 3, 4], "float32", *(x % 2**32 for x in sums)]])
    expected = hashlib.sha256(text.encode()).hexdigest()[:32]
    assert params_fingerprint({"mlp": {"kernel": jnp.asarray(values)}}) == expected
