"""Attention over a cache equals the reference on the tokens that the cache holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm.attention import reference_attention
from easylm.attention.cached import cached_attention

BATCH, SLOTS, HEAD_DIM = 3, 20, 8


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_equals_the_reference_on_the_seen_slots(kv_heads, dtype, tolerance):
    rng = np.random.default_rng(kv_heads)
    q = jnp.asarray(rng.normal(size=(BATCH, 8, HEAD_DIM)), dtype)
    k, v = (
        jnp.asarray(rng.normal(size=(BATCH, kv_heads, SLOTS, HEAD_DIM)), dtype) for _ in range(2)
    )
    seen = rng.random((BATCH, SLOTS)) < 0.5
    # What is not seen may hold anything.
    k, v = (jnp.where(seen[:, None, :, None], array, 1e4).astype(dtype) for array in (k, v))
    out = jax.jit(cached_attention)(q, k, v, seen)
    assert out.dtype == dtype
    for row in range(BATCH):
        keys, values = (
            array[row : row + 1, :, seen[row]].swapaxes(1, 2).astype(jnp.float32)
            for array in (k, v)
        )
        same = np.ones(keys.shape[:2], np.int32)
        wanted = reference_attention(
            q[row : row + 1, None].astype(jnp.float32),
            keys,
            values,
            positions=np.ones((1, 1), np.int32),
            segment_ids=np.ones((1, 1), np.int32),
            key_positions=same,
            key_segment_ids=same,
        )
        np.testing.assert_allclose(
            out[row].astype(jnp.float32), wanted[0, 0], atol=tolerance, rtol=tolerance
        )
