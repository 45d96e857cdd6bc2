"""The sharding tables, and the same numbers on one device and on meshes of eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easylm.errors import InputError
from easylm.losses import cross_entropy, token_logprobs
from easylm.models.llama.model import Execution, abstract_params, graph_definition
from easylm.models.llama.sharding import (
    PARAM_AXES,
    check_mesh,
    execution_on,
    param_shardings,
)
from easylm.sharding import batch_sharding, logical_axes, make_mesh, tree_axes
from tests.tiny import hf_llama, native, packed_rows

MESHES = ("8,1,1", "1,8,1", "1,2,4", "2,2,2", "1,1,8")


@pytest.fixture(scope="module")
def tiny():
    # 67 tokens and 2 KV heads divide none of the tensor axes of 4 and 8.
    return native(hf_llama(attention_bias=True))


@pytest.fixture(scope="module")
def batch(tiny):
    return packed_rows(tiny[0], [[5, 9], [16], [3, 4, 5], [2], [7, 7], [1, 14], [], [10]], 16)


def loss_and_logits(config, params, batch, execution):
    model = nnx.merge(graph_definition(config, execution), params)
    inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
    hidden = model.hidden_states(*inputs)
    logprobs = token_logprobs(hidden, model.head(), batch["targets"], config.vocab_size, 5)
    loss_sum, weight = cross_entropy(logprobs, batch["loss_weights"])
    return loss_sum / weight, model(*inputs)


def run(config, params, batch, execution):
    def loss(params, batch):
        return loss_and_logits(config, params, batch, execution)

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    return jax.device_get((value, logits, gradients))


@pytest.fixture(scope="module")
def one_device(tiny, batch):
    return run(*tiny, batch, Execution())


@pytest.mark.parametrize(
    ("shape", "remat"),
    [
        ("8,1,1", "none"),
        ("1,8,1", "none"),
        ("1,2,4", "none"),
        ("2,2,2", "block_sharded"),
        ("1,1,8", "block_sharded"),
    ],
)
def test_meshes_equal_one_device(tiny, batch, one_device, shape, remat):
    config, params = tiny
    mesh = make_mesh(shape)
    placed = jax.device_put(params, param_shardings(config, mesh))
    rows = jax.device_put(batch, batch_sharding(mesh))
    loss, logits, gradients = run(
        config, placed, rows, execution_on(config, mesh, remat=remat, attention_backend="blockwise")
    )
    wanted_loss, wanted_logits, wanted_gradients = one_device
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    used = batch["segment_ids"] > 0
    np.testing.assert_allclose(logits[used], wanted_logits[used], atol=2e-5)
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(wanted_gradients)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * norm),
        gradients,
        wanted_gradients,
    )


@pytest.mark.parametrize("shape", MESHES)
def test_every_device_holds_its_share_of_the_parameters(tiny, shape):
    config, params = tiny
    mesh = make_mesh(shape)
    placed = jax.device_put(params, param_shardings(config, mesh))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(placed))
    norms = config.hidden_size * (2 * config.num_hidden_layers + 1)
    biases = sum(projection["bias"].size for projection in params["layers"]["self_attn"].values())
    ways = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert held <= total / ways + norms + biases


def test_a_parameter_of_no_rule_or_of_two_is_named(tiny):
    abstract = abstract_params(tiny[0])
    tree_axes(abstract, PARAM_AXES)
    with pytest.raises(ValueError, match=r"layers/mlp/router/kernel matches no rule"):
        logical_axes("layers/mlp/router/kernel", PARAM_AXES)
    with pytest.raises(ValueError, match=r"norm/scale matches 2 rules .*norm/sc.*"):
        tree_axes(abstract, {**PARAM_AXES, r"norm/sc.*": ("norm",)})
    with pytest.raises(ValueError, match=r"norm/scale has shape \(32,\); the table says"):
        tree_axes(abstract, {**PARAM_AXES, r"norm/scale": ("norm", "norm")})


@pytest.mark.parametrize(
    ("shape", "overrides", "message"),
    [
        ("1,1,8", {"num_attention_heads": 4}, r"tensor=8.*heads 4.*in 1, 2, 4$"),
        ("1,1,8", {"intermediate_size": 44}, r"tensor=8.*intermediate_size 44.*in 1, 2, 4$"),
        ("1,8,1", {"hidden_size": 36}, r"fsdp=8.*hidden_size 36.*in 1, 2, 3, 4, 6"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused(tiny, shape, overrides, message):
    config = dataclasses.replace(tiny[0], **overrides)
    with pytest.raises(InputError, match=message):
        check_mesh(config, make_mesh(shape))


@pytest.mark.parametrize("shape", ["3,1,1", "3,-1,1", "2,2,1", "16,1,1"])
def test_a_mesh_that_is_not_the_devices_is_refused(shape):
    with pytest.raises(InputError, match=rf"mesh: found '{shape}' on 8 devices; .*1, 2, 4, 8"):
        make_mesh(shape)


def test_minus_one_takes_what_is_left():
    assert dict(make_mesh("1,-1,2").shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert dict(make_mesh("-1,1,1", jax.devices()[:4]).shape)["data"] == 4


def test_parameters_are_made_on_the_mesh(tiny):
    from easylm.models.llama.model import init_params

    config, _ = tiny
    shardings = param_shardings(config, make_mesh("1,2,4"))
    key = jax.random.key(0)
    made = jax.jit(lambda key: init_params(config, key), out_shardings=shardings)(key)
    alone = init_params(config, key)
    jax.tree.map(
        lambda a, s: a.sharding.is_equivalent_to(s, a.ndim) or pytest.fail(), made, shardings
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), made, alone)
    assert jnp.isfinite(made["norm"]["scale"]).all()
