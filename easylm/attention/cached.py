"""Attention of one new token a row over cached keys and values."""

import jax
import jax.numpy as jnp

from easylm.attention.reference import MASK_VALUE


def cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """Softmax attention of one query a row; scores and softmax are float32.

    Heads stand before slots, so that the cache is read as it lies: the other way round a CPU takes
    three times as long.

    Args:
      q: queries, `[batch, heads, head_dim]`.
      k, v: the cache, `[batch, kv_heads, slots, head_dim]`; query head h uses head
        h // (heads // kv_heads) of it.
      seen: `[batch, slots]` bool, the slots that a row's query sees: one at least.

    Returns:
      `[batch, heads, head_dim]` in the dtype of q.
    """
    batch, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bngd,bnkd->bngk", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None, None, :], scores * head_dim**-0.5, MASK_VALUE)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bngk,bnkd->bngd", probabilities, v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)
