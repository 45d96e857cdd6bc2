"""The kernels for other hardware, as far as a CPU can run them.

Pallas kernels run here instruction by instruction in jax's interpreter. cuDNN cannot: what is
checked is what we hand to it, through the XLA form of the same jax function.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

from easylm.attention.cudnn import cudnn_attention
from easylm.attention.pallas_tpu import flash_attention, splash_attention
from tests.attention.cases import assert_close, exact, qkv, rows, with_gradients

PACKED = [(1, 100), (2, 1), (3, 120), (0, 35)]


@pytest.fixture
def interpreted(monkeypatch):
    # Not pltpu.force_tpu_interpret_mode: in jax 0.10 it cannot run a kernel under vmap.
    compiled = pallas.pallas_call
    monkeypatch.setattr(
        pallas,
        "pallas_call",
        lambda *args, **kwargs: compiled(*args, **(kwargs | {"interpret": True})),
    )
    # The kernels add ranks to each other inside.
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("kernel", [splash_attention, flash_attention])
@pytest.mark.parametrize("layouts", [[[(1, 256)]], [PACKED, PACKED[::-1]]])
def test_pallas_kernels_agree_with_float64(interpreted, kernel, layouts):
    segment_ids, positions = rows(*layouts)
    inputs = qkv(segment_ids, heads=4, kv_heads=2, head_dim=64)
    found = with_gradients(functools.partial(kernel, segment_ids=segment_ids), *inputs)
    assert_close(found, exact(*inputs, segment_ids, positions), 5e-6)


def test_flash_returns_the_dtype_it_was_given(interpreted):
    segment_ids, positions = rows([(1, 128)])
    inputs = qkv(segment_ids, heads=2, kv_heads=2, head_dim=64, dtype=jnp.bfloat16)
    found = with_gradients(functools.partial(flash_attention, segment_ids=segment_ids), *inputs)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    assert_close(found, exact(*inputs, segment_ids, positions), 5e-3)


@pytest.mark.parametrize("kernel", [splash_attention, flash_attention])
def test_pallas_kernels_leak_nothing(interpreted, kernel):
    segment_ids, _ = rows([(1, 100), (2, 100), (0, 56)])
    q, k, v, d_out = qkv(segment_ids, heads=4, kv_heads=2, head_dim=64)
    inside = segment_ids == 2
    d_out = jnp.where(inside[..., None, None], d_out, 0)
    gradients = with_gradients(functools.partial(kernel, segment_ids=segment_ids), q, k, v, d_out)
    for gradient in gradients[1:]:
        assert np.all(np.asarray(gradient)[~inside] == 0)
        assert np.any(np.asarray(gradient)[inside] != 0)


def test_what_cudnn_is_told_hides_segments_and_future(monkeypatch):
    as_xla = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *args, **kwargs: as_xla(*args, **(kwargs | {"implementation": "xla"})),
    )
    segment_ids, positions = rows(PACKED, PACKED[::-1])
    inputs = qkv(segment_ids, heads=4, kv_heads=2, head_dim=16)
    found = with_gradients(functools.partial(cudnn_attention, segment_ids=segment_ids), *inputs)
    assert_close(found, exact(*inputs, segment_ids, positions), 3e-6)
