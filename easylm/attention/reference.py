"""Attention as its formula: one dense matrix of scores, no tricks."""

import jax
import jax.numpy as jnp

# Finite, so that a row that sees nothing gives the mean of the values instead of NaN.
MASK_VALUE = -1e30


def reference_attention(
    q, k, v, *, positions, segment_ids, key_positions=None, key_segment_ids=None
):
    """Softmax attention over all keys at once; memory grows with query times key length.

    A query sees a key when both have the same segment id and the key's position is not later
    than the query's. Without `key_positions` and `key_segment_ids` the keys are the queries'
    own tokens; with them the keys may have any length, as a cache of earlier tokens has (give
    the unused slots of a cache a segment id that no query has).

    Args:
      q: queries, `[batch, query, heads, head_dim]`.
      k: keys, `[batch, key, kv_heads, head_dim]`; query head h uses key head
        h // (heads // kv_heads), and no key is copied for that.
      v: values, `[batch, key, kv_heads, head_dim]`.
      positions: `[batch, query]`, integers.
      segment_ids: `[batch, query]`, integers.
      key_positions: `[batch, key]`, integers.
      key_segment_ids: `[batch, key]`, integers.

    Returns:
      `[batch, query, heads, head_dim]` in the dtype of q; scores and softmax are float32.
    """
    key_positions = positions if key_positions is None else key_positions
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    batch, query, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, query, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bqngd,bknd->bngqk", grouped, k, preferred_element_type=jnp.float32)
    seen = (segment_ids[:, :, None] == key_segment_ids[:, None, :]) & (
        positions[:, :, None] >= key_positions[:, None, :]
    )
    scores = jnp.where(seen[:, None, None], scores * head_dim**-0.5, MASK_VALUE)
    probabilities = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum(
        "bngqk,bknd->bqngd", probabilities.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return out.reshape(q.shape).astype(q.dtype)
