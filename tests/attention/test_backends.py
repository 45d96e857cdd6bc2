"""The backends against float64, and what packed segments may not do to each other."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm.attention import attention, reference_attention
from easylm.attention.blockwise import blockwise_attention
from tests.attention.cases import assert_close, exact, qkv, rows, with_gradients

LAYOUTS = {
    "one segment": [[(1, 300)], [(1, 300)]],
    "packed": [[(1, 90), (2, 1), (3, 150), (0, 59)], [(1, 10), (2, 230), (3, 60)]],
    "padding row": [[(0, 300)], [(1, 128), (2, 128), (0, 44)]],
}


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize(
    ("group", "layout"),
    [(1, "one segment"), (4, "one segment"), (1, "packed"), (2, "packed"), (4, "padding row")],
)
def test_agrees_with_float64(backend, group, layout):
    segment_ids, positions = rows(*LAYOUTS[layout])
    *inputs, d_out = qkv(segment_ids, heads=4, kv_heads=4 // group, head_dim=16)
    attend = functools.partial(
        attention, positions=positions, segment_ids=segment_ids, backend=backend
    )
    is_token = (segment_ids > 0)[..., None, None]  # nobody reads what comes out for padding
    out, *gradients = with_gradients(attend, *inputs, d_out * is_token)
    wanted, *wanted_gradients = exact(*inputs, d_out * is_token, segment_ids, positions)
    assert np.isfinite(out).all()
    assert_close((out * is_token, *gradients), (wanted * is_token, *wanted_gradients), 3e-6)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_bfloat16_stays_within_its_rounding(backend):
    segment_ids, positions = rows(*LAYOUTS["packed"])
    inputs = qkv(segment_ids, heads=4, kv_heads=2, head_dim=64, dtype=jnp.bfloat16)
    attend = functools.partial(
        attention, positions=positions, segment_ids=segment_ids, backend=backend
    )
    found = with_gradients(attend, *inputs)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    assert_close(found, exact(*inputs, segment_ids, positions), 1e-2)


@pytest.mark.parametrize("seq", [1, 8, 9, 30])
def test_blockwise_takes_any_length(seq):
    segment_ids, positions = rows([(1, seq)])
    inputs = qkv(segment_ids, heads=2, kv_heads=1, head_dim=8)
    attend = functools.partial(blockwise_attention, segment_ids=segment_ids, block=8)
    found = with_gradients(attend, *inputs)
    assert_close(found, exact(*inputs, segment_ids, positions), 3e-6)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_nothing_leaks_out_of_a_segment(backend):
    """Not a bit: the gradient with respect to the other segments is exactly zero."""
    segment_ids, positions = rows([(1, 100), (2, 130), (3, 60), (0, 10)])
    q, k, v, _ = qkv(segment_ids, heads=2, kv_heads=1, head_dim=16)
    inside = segment_ids == 2

    def loss(q, k, v):
        out = attention(q, k, v, positions=positions, segment_ids=segment_ids, backend=backend)
        return (out[inside] ** 2).sum()

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v):
        assert np.all(np.asarray(gradient)[~inside] == 0)
        assert np.any(np.asarray(gradient)[inside] != 0)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_nothing_leaks_back_from_the_future(backend):
    segment_ids, positions = rows([(1, 200)])
    q, k, v, _ = qkv(segment_ids, heads=2, kv_heads=1, head_dim=16)

    def loss(k, v):
        out = attention(q, k, v, positions=positions, segment_ids=segment_ids, backend=backend)
        return (out[:, :120] ** 2).sum()

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1)))(k, v):
        assert np.all(np.asarray(gradient)[:, 120:] == 0)
        assert np.any(np.asarray(gradient)[:, 119] != 0)


def test_reference_reads_keys_of_another_length():
    """One query at a time over a cache with unused slots gives the rows of the whole."""
    segment_ids, positions = rows([(1, 12)], [(1, 12)])
    q, k, v, d_out = qkv(segment_ids, heads=4, kv_heads=2, head_dim=8)
    whole = exact(q, k, v, d_out, segment_ids, positions)[0]
    unused = np.full((2, 5), -1, np.int32)
    junk = np.full((2, 5, 2, 8), 7.0, np.float32)
    out = reference_attention(
        q[:, 9:],
        jnp.concatenate([k, junk], axis=1),
        jnp.concatenate([v, junk], axis=1),
        positions=positions[:, 9:],
        segment_ids=segment_ids[:, 9:],
        key_positions=np.concatenate([positions, unused + 1], axis=1),
        key_segment_ids=np.concatenate([segment_ids, unused], axis=1),
    )
    np.testing.assert_allclose(out, whole[:, 9:], atol=1e-6)


def test_a_query_that_sees_nothing_is_finite():
    segment_ids, positions = rows([(1, 4)])
    q, k, v, d_out = qkv(segment_ids, heads=2, kv_heads=1, head_dim=8)
    attend = functools.partial(
        reference_attention,
        positions=positions,
        segment_ids=segment_ids,
        key_segment_ids=segment_ids + 1,
    )
    assert all(np.isfinite(x).all() for x in with_gradients(attend, q, k, v, d_out))


def _temporary_bytes(backend, seq):
    segment_ids, positions = rows([(1, seq)])
    attend = functools.partial(
        attention, positions=positions, segment_ids=segment_ids, backend=backend
    )

    def loss(q, k, v):
        return attend(q, k, v).sum()

    shape = jax.ShapeDtypeStruct((1, seq, 2, 16), jnp.float32)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_blockwise_memory_grows_with_the_length_and_not_its_square():
    blockwise = [_temporary_bytes("blockwise", seq) for seq in (2048, 4096, 8192)]
    for shorter, longer in itertools.pairwise(blockwise):
        assert longer < 2.2 * shorter
    # The same measure sees the square where there is one: scores of two heads.
    assert _temporary_bytes("reference", 2048) > 2 * 2048 * 2048 * 4


def test_blockwise_skips_blocks_that_share_no_segment():
    """Values there never enter the computation: infinities would turn into NaN."""
    segment_ids, _ = rows([(1, 16), (2, 16)])
    q, k, v, _ = qkv(segment_ids, heads=2, kv_heads=1, head_dim=8)
    poisoned = v.at[:, :8].set(jnp.inf)
    clean, found = (
        blockwise_attention(q, k, values, segment_ids=segment_ids, block=8)
        for values in (v, poisoned)
    )
    np.testing.assert_array_equal(found[:, 16:], clean[:, 16:])


def test_blockwise_inside_checkpoint_and_scan():
    segment_ids, positions = rows([(1, 20), (2, 13)])
    inputs = qkv(segment_ids, heads=2, kv_heads=2, head_dim=8)
    attend = functools.partial(
        attention, positions=positions, segment_ids=segment_ids, backend="blockwise"
    )

    def stacked(q, k, v):
        body = jax.checkpoint(lambda x, _: (attend(x, k, v), None))
        return jax.lax.scan(body, q, None, length=2)[0]

    def unrolled(q, k, v):
        return attend(attend(q, k, v), k, v)

    wanted = with_gradients(unrolled, *inputs)
    assert_close(with_gradients(stacked, *inputs), wanted, 1e-5)
