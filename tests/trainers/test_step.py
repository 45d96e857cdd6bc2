"""One optimizer step: micro-batches, meshes, and where things live."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from easylm.models.llama.model import (
    Execution,
    abstract_params,
    count_parameters,
    graph_definition,
)
from easylm.models.llama.presets import LLAMA2_7B
from easylm.models.llama.sharding import execution_on, param_shardings
from easylm.sharding import batch_sharding, make_mesh
from easylm.trainers.sft import sft_loss
from easylm.trainers.step import (
    TrainState,
    abstract_batch,
    init_state,
    jit_step,
    make_train_step,
    state_shardings,
)
from tests.tiny import hf_llama, native, packed_rows


@pytest.fixture(scope="module")
def tiny():
    return native(hf_llama())


@pytest.fixture(scope="module")
def batch(tiny):
    # Rows of very different weight, so that a mean of means would show.
    return packed_rows(tiny[0], [[16], [3], [2, 2], [15], [9, 6], [4], [12], [5, 5]], 16)


def jitted(config, params, mesh, micro_batches, **execution):
    """(the jitted step of AdamW, its optimizer, its shardings)."""
    optimizer = optax.adamw(1e-2)
    shardings = state_shardings(params, param_shardings(config, mesh), optimizer, mesh)
    execution = execution_on(config, mesh, attention_backend="blockwise", **execution)
    graph = graph_definition(config, execution)
    step = make_train_step(
        graph, sft_loss(loss_chunk=7), optimizer, micro_batches=micro_batches, seed=0
    )
    return jit_step(step, shardings, mesh), optimizer, shardings


def steps(tiny, batch, *, mesh="1,1,1", micro_batches=1, count=3):
    """Parameters and losses after `count` AdamW steps."""
    config, params = tiny
    devices = jax.devices() if mesh != "1,1,1" else jax.devices()[:1]
    mesh = make_mesh(mesh, devices)
    step, optimizer, shardings = jitted(config, params, mesh, micro_batches)
    state = init_state(jax.device_put(params, shardings.params), optimizer, shardings)
    rows = jax.device_put(batch, batch_sharding(mesh))
    losses = []
    for _ in range(count):
        state, metrics = step(state, rows)
        losses.append(jax.device_get(metrics))
    return jax.device_get(state.params), losses


@pytest.fixture(scope="module")
def plain(tiny, batch):
    return steps(tiny, batch)


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batches": 2},
        {"micro_batches": 8},
        {"mesh": "1,2,4"},
        {"mesh": "2,2,2", "micro_batches": 2},
    ],
)
def test_micro_batches_and_meshes_equal_one_device(tiny, batch, plain, options):
    params, losses = steps(tiny, batch, **options)
    np.testing.assert_allclose(losses[0]["loss"], plain[1][0]["loss"], rtol=1e-6)
    for ours, wanted in zip(losses, plain[1], strict=True):
        for name in wanted:
            np.testing.assert_allclose(ours[name], wanted[name], rtol=2e-4, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-4), params, plain[0])


def test_the_loss_is_the_mean_over_target_tokens(tiny, batch, plain):
    config, params = tiny
    from easylm.models.llama.model import logits

    inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
    logprobs = jax.nn.log_softmax(logits(params, config, *inputs))
    picked = np.take_along_axis(np.asarray(logprobs), batch["targets"][..., None], -1)[..., 0]
    weights = batch["loss_weights"]
    assert plain[1][0]["loss"] == pytest.approx(-(picked * weights).sum() / weights.sum(), rel=1e-5)
    assert plain[1][0]["target_tokens"] == weights.sum()
    assert plain[1][0]["tokens"] == (batch["segment_ids"] > 0).sum()


def test_moments_lie_where_their_parameters_lie(tiny):
    config, params = tiny
    mesh = make_mesh("1,2,4")
    optimizer = optax.adamw(1e-3)
    shardings = state_shardings(params, param_shardings(config, mesh), optimizer, mesh)
    state = init_state(jax.device_put(params, shardings.params), optimizer, shardings)
    adam = state.opt_state[0]
    for moments in (adam.mu, adam.nu):
        jax.tree.map(
            lambda m, p: np.testing.assert_equal(
                m.sharding.is_equivalent_to(p.sharding, p.ndim), True
            ),
            moments,
            state.params,
        )
    assert adam.count.sharding.is_fully_replicated


def test_the_step_consumes_its_state(tiny, batch):
    config, params = tiny
    mesh = make_mesh("1,1,1", jax.devices()[:1])
    optimizer = optax.sgd(1e-2)
    shardings = state_shardings(params, param_shardings(config, mesh), optimizer, mesh)
    graph = graph_definition(config, Execution())
    step = make_train_step(graph, sft_loss(loss_chunk=16), optimizer, micro_batches=1, seed=0)
    state = init_state(jax.device_put(params, shardings.params), optimizer, shardings)
    after, _ = jit_step(step, shardings, mesh)(state, batch)
    assert state.params["norm"]["scale"].is_deleted()
    assert int(after.step) == 1
    assert jnp.isfinite(after.params["norm"]["scale"]).all()


def test_gradients_of_micro_batches_are_summed_in_place():
    """Of the parameters' size there is one array of gradients, not one more for a part."""
    config = dataclasses.replace(
        LLAMA2_7B,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=64,
    )
    mesh, params = make_mesh("1,1,1", jax.devices()[:1]), abstract_params(config)

    def temporaries(micro_batches):
        step, optimizer, _ = jitted(config, params, mesh, micro_batches, remat="block")
        opt_state = jax.eval_shape(optimizer.init, params)
        state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state)
        compiled = step.lower(state, abstract_batch(4, 8)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    size = 4 * count_parameters(config)
    assert size < temporaries(1)
    assert temporaries(4) < temporaries(1) + size / 2
