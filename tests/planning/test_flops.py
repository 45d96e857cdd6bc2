"""Counted FLOPs against XLA's own count, and blocks of attention against those that run."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies

from easylm.attention import attention
from easylm.attention.blockwise import _pairs
from easylm.config import from_config_dict, load
from easylm.models.llama import model as llama
from easylm.models.llama.presets import PRESETS
from easylm.models.llama.rope import rope_angles
from easylm.planning.flops import block_pairs, count_parameters, step_flops
from easylm.sharding import make_mesh
from easylm.trainers.build import build
from easylm.trainers.config import DpoConfig, SftConfig
from easylm.trainers.dpo import dpo_objective
from easylm.trainers.sft import sft_objective
from tests.planning.hlo_programs import compiled
from tests.tiny import packed_rows

# Wide enough that products are nearly all of its work; one block of blockwise attention.
MODEL = dataclasses.replace(
    PRESETS["llama2_7b"],
    vocab_size=640,
    hidden_size=384,
    intermediate_size=768,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
)
SEQ_LEN = 128
ROWS = [[50, 40, 30], [128], []]


class Unrolled(llama.Llama):
    """Blocks one after the other, since XLA counts the body of a loop once."""

    def hidden_states(self, tokens, positions, segment_ids):
        cos, sin = rope_angles(self.config, positions)
        block, stacked = nnx.split(self.layers)
        remat = self.execution.remat

        def attend(q, k, v):
            out = self.execution.attention(q, k, v, positions=positions, segment_ids=segment_ids)
            return out, None

        def step(x, layer):
            return nnx.merge(block, layer)(x, cos, sin, attend)[0]

        if remat != "none":
            # Outside a scan XLA would else merge what is computed again with its first time.
            step = jax.checkpoint(step, policy=llama.REMAT_POLICIES[remat], prevent_cse=True)
        x = self.embed(tokens)
        for i in range(self.config.num_hidden_layers):
            x = step(x, jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
        return self.norm(x)


def config_of(objective, **changes):
    kind = {"sft": SftConfig, "dpo": DpoConfig}[objective]
    config = from_config_dict(kind, load(f"{objective}/quickstart").config)
    data = dataclasses.replace(config.data, seq_len=SEQ_LEN)
    return dataclasses.replace(config, data=data, loss_chunk=SEQ_LEN, **changes)


def xla_flops(objective, config, backend, kv_replicas=1):
    """What XLA counts in the compiled gradient of the loss of a batch."""
    execution = llama.Execution(
        remat=config.remat,
        attention=functools.partial(attention, backend=backend),
        kv_replicas=kv_replicas,
        vocab_multiple=kv_replicas * MODEL.num_key_value_heads,
    )
    graph = nnx.graphdef(
        nnx.eval_shape(lambda: Unrolled(MODEL, execution, rngs=nnx.Rngs(params=0)))
    )
    made = {"sft": sft_objective, "dpo": functools.partial(dpo_objective, pairs_per_row=2)}
    target = made[objective](config, len(ROWS))

    def loss(params, batch):
        return target.loss_fn(nnx.merge(graph, params), batch, jax.random.key(0))[0]

    gradient = jax.jit(jax.value_and_grad(loss))
    program = gradient.lower(llama.abstract_params(MODEL), target.batch).compile()
    return program.cost_analysis()["flops"]


def hardware_flops(objective, config, backend, tensor=1):
    return step_flops(
        config,
        MODEL,
        ROWS,
        objective=objective,
        attention=backend,
        platform="cpu",
        tensor=tensor,
        rows_at_once=len(ROWS),
    ).hardware


@pytest.mark.parametrize(
    "objective, remat, backend, tensor",
    [
        ("sft", "none", "reference", 1),
        ("sft", "dots", "blockwise", 1),
        ("sft", "block", "reference", 1),
        ("dpo", "none", "blockwise", 4),
        ("dpo", "dots", "blockwise", 1),
        ("dpo", "block_sharded", "blockwise", 1),
    ],
)
def test_hardware_flops_are_those_that_xla_counts(objective, remat, backend, tensor):
    config = config_of(objective, remat=remat)
    replicas = max(1, tensor // MODEL.num_key_value_heads)
    # XLA counts additions too, half a percent here.
    theirs = xla_flops(objective, config, backend, replicas)
    assert hardware_flops(objective, config, backend, tensor) == pytest.approx(theirs, rel=0.01)


def test_preferences_compute_logits_twice_where_a_row_is_several_chunks():
    config = config_of("dpo", remat="none")
    chunked = dataclasses.replace(config, loss_chunk=SEQ_LEN // 2)
    logits = 2 * len(ROWS) * SEQ_LEN * MODEL.hidden_size * MODEL.vocab_size
    ours = hardware_flops("dpo", chunked, "blockwise")
    assert ours == hardware_flops("dpo", config, "blockwise") + logits
    # XLA counts the body of a loop once: half of the four products.
    theirs = xla_flops("dpo", chunked, "blockwise") + 4 * logits / 2
    assert ours == pytest.approx(theirs, rel=0.01)


def test_the_tpu_compiler_counts_the_same_for_a_step_over_shards():
    # One block of attention and one chunk of the loss, so that every loop but the one over the
    # layers has one turn; XLA counts the body of that once, as a model of one layer.
    pytest.importorskip("libtpu", reason="the TPU's compiler is not installed")
    devices = topologies.get_topology_desc("v3:2x4", platform="tpu").devices
    mesh = make_mesh("1,1,16", devices)
    config = config_of("sft", remat="block_sharded", compute_dtype="bfloat16")
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, seq_len=512), loss_chunk=512
    )
    model = dataclasses.replace(MODEL, num_attention_heads=16, num_key_value_heads=8)
    objective = sft_objective(config, rows=1)
    step = build(
        config,
        model=model,
        mesh=mesh,
        loss_fn=objective.loss_fn,
        batch=objective.batch,
        total_steps=9,
    )
    program = compiled(step.step, step.state, step.batch)
    ours = step_flops(
        config,
        dataclasses.replace(model, num_hidden_layers=1),
        [[512]],
        objective="sft",
        attention="blockwise",
        platform="tpu",
        tensor=16,
        rows_at_once=1,
    )
    assert ours.hardware == pytest.approx(16 * program.cost_analysis()["flops"], rel=0.03)


def test_pairs_of_blocks_are_those_that_blockwise_attention_computes():
    rows = [[5, 20, 7], [32], [], [3, 3, 3, 3, 3], [1, 30], [16, 16]]
    segments = packed_rows(MODEL, rows, 32)["segment_ids"]
    for block, rows_at_once in ((4, 1), (8, 1), (16, 1), (8, 2), (4, 3)):
        shared = 0
        for group in segments.reshape(-1, rows_at_once, 32 // block, block):
            shared += int(np.sum(_pairs(group.swapaxes(0, 1))[2]))
        counted = block_pairs(rows, 32, block, rows_at_once)
        assert counted == shared * rows_at_once * block * block


def test_a_row_that_is_no_multiple_of_the_block_is_filled_up():
    # Blocks of 128 on a CPU: the pairs (0, 0), (1, 0) and (1, 1) of a row of 130 tokens.
    assert block_pairs([[130]], 130, 128) == 3 * 128 * 128
    assert block_pairs([[128, 2]], 130, 128) == 2 * 128 * 128


@pytest.mark.parametrize("preset", ["llama_7b", "llama2_70b", "llama3_1_8b"])
def test_parameters_are_counted_without_jax(preset):
    odd = dataclasses.replace(PRESETS[preset], vocab_size=32003, attention_bias=True, mlp_bias=True)
    for model in (PRESETS[preset], odd, dataclasses.replace(odd, tie_word_embeddings=True)):
        assert count_parameters(model) == llama.count_parameters(model)


def test_model_flops_leave_padding_out_and_hardware_flops_do_not():
    count = functools.partial(
        step_flops,
        config_of("sft", remat="none"),
        MODEL,
        objective="sft",
        platform="tpu",
        tensor=1,
        rows_at_once=1,
    )
    full = count([[128]], attention="splash")
    half = count([[64], []], attention="splash")
    assert half.hardware == 2 * full.hardware
    assert half.model < full.model / 1.99
