"""The model against transformers, and against itself: packed, causal, rematerialised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from easylm.models.llama.model import (
    REMAT_POLICIES,
    Execution,
    abstract_params,
    graph_definition,
    init_params,
    logits,
)
from tests.tiny import hf_llama, native, packed_rows

ROPE = {
    "default": {"rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 5e5,
    },
}
VARIANTS = {
    "grouped queries": {},
    "multi-head": {"num_key_value_heads": 8},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim apart": {"head_dim": 6},
    "eps": {"rms_norm_eps": 1e-2},
    **{f"rope {name}": {"rope_parameters": value} for name, value in ROPE.items()},
}


def hf_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def one_segment(tokens):
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return tokens, positions, np.ones_like(tokens)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant):
    model = hf_llama(**VARIANTS[variant])
    config, params = native(model)
    # 100 positions, beyond the 64 of the config and the 16 of llama3's original context.
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 100), dtype=np.int32)
    ours = logits(params, config, *one_segment(tokens))
    np.testing.assert_allclose(ours, hf_logits(model, tokens), atol=2e-5)


def test_gradients_equal_transformers():
    model = hf_llama(attention_bias=True, mlp_bias=True)
    config, params = native(model)
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (2, 20), dtype=np.int32)

    def loss(params):
        ours = logits(params, config, *one_segment(tokens))
        logprobs = jax.nn.log_softmax(ours[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1))

    ours = jax.grad(loss)(params)
    labels = torch.tensor(tokens, dtype=torch.long)
    model(labels, labels=labels).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    _, wanted = native(model)
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(wanted)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * norm), ours, wanted)


@pytest.fixture(scope="module")
def tiny():
    return native(hf_llama())


def test_packed_segments_equal_the_same_segments_apart(tiny):
    config, params = tiny
    batch = packed_rows(config, [[5, 9, 3], [20], [1, 18]], seq_len=24)
    packed = logits(params, config, batch["tokens"], batch["positions"], batch["segment_ids"])
    assert np.isfinite(packed).all()
    for row in range(3):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            at = batch["segment_ids"][row] == segment
            alone = logits(params, config, *one_segment(batch["tokens"][row : row + 1, at]))
            np.testing.assert_allclose(packed[row, at], alone[0], atol=2e-5)


def test_no_token_is_seen_by_earlier_ones_or_by_other_segments(tiny):
    config, params = tiny
    batch = packed_rows(config, [[6, 8]], seq_len=16)
    inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
    before = logits(params, config, *inputs)
    changed = batch["tokens"].copy()
    changed[0, 8] = (changed[0, 8] + 1) % config.vocab_size
    after = logits(params, config, changed, *inputs[1:])
    # Token 8 is the third of the second segment (6..13): 8..13 may differ, the rest may not.
    differs = np.any(np.asarray(before != after), axis=-1)[0]
    np.testing.assert_array_equal(np.flatnonzero(differs), np.arange(8, 14))


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_rematerialisation_changes_no_gradient(tiny, remat):
    config, params = tiny
    batch = packed_rows(config, [[5, 9], [14]], seq_len=16)
    inputs = batch["tokens"], batch["positions"], batch["segment_ids"]

    def loss(params, execution):
        return jnp.sum(logits(params, config, *inputs, execution) ** 2)

    plain = jax.grad(loss)(params, Execution())
    again = jax.grad(loss)(params, Execution(remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3), plain, again)


def test_bfloat16_error_does_not_grow_with_the_position():
    # The predecessor computed RoPE's angles in the compute dtype: nine times the error beyond
    # position 4,096. One head and one layer keep 4,352 positions cheap.
    sizes = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    config, params = native(hf_llama(max_position_embeddings=8192, **sizes))
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, config.vocab_size, (8, 128), dtype=np.int32)

    def mean_error(first_position):
        positions = np.broadcast_to(first_position + np.arange(128, dtype=np.int32), tokens.shape)
        exact, rounded = (
            logits(
                params,
                config,
                tokens,
                positions,
                np.ones_like(tokens),
                Execution(compute_dtype=dtype),
            )
            for dtype in (jnp.float32, jnp.bfloat16)
        )
        return float(jnp.mean(jnp.abs(exact - rounded)))

    assert mean_error(6000) < 1.05 * mean_error(0)


def test_dtypes_of_parameters_compute_and_logits_are_apart(tiny):
    config, params = tiny
    execution = Execution(compute_dtype=jnp.bfloat16, logits_dtype=jnp.float32)
    model = nnx.merge(graph_definition(config, execution), params)
    inputs = one_segment(np.ones((1, 4), np.int32))
    assert model.embed_tokens.embedding[...].dtype == jnp.float32
    assert model.hidden_states(*inputs).dtype == jnp.bfloat16
    assert model(*inputs).dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(abstract_params(config, jnp.bfloat16))} == {
        jnp.dtype(jnp.bfloat16)
    }


def test_initial_parameters_have_the_spread_of_the_config(tiny):
    config, _ = tiny
    params = init_params(config, jax.random.key(0))
    assert np.std(params["embed_tokens"]["embedding"]) == pytest.approx(0.02, rel=0.1)
    kernels = params["layers"]["mlp"]["gate_proj"]["kernel"]
    assert np.std(kernels) == pytest.approx(0.02, rel=0.1)
    assert not np.array_equal(kernels[0], kernels[1])
    assert (params["norm"]["scale"] == 1).all()


def test_padded_head_columns_do_not_reach_the_logits(tiny):
    config, params = tiny
    inputs = one_segment(np.arange(10, dtype=np.int32)[None])
    padded = logits(params, config, *inputs, Execution(vocab_multiple=8))
    assert padded.shape == (1, 10, 67)
    np.testing.assert_array_equal(padded, logits(params, config, *inputs))
