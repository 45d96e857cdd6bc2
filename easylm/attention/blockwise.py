"""Causal attention block by block in plain XLA: linear memory on any device.

The sequence is cut into blocks. One scan runs over the pairs (query block, key block) on and
below the diagonal, so what causality hides is never computed, and the program has one small
loop body whatever the length. A pair in which no query shares a segment with a key (most of
them, when short examples are packed into long rows) is skipped at run time.

Softmax is accumulated over the blocks with a running maximum and sum (Milakov and Gimelshein,
"Online normalizer calculation for softmax", 2018); the backward pass computes the probabilities
again from the saved log of the sum (Dao et al., "FlashAttention", 2022).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from easylm.attention.reference import MASK_VALUE

# Pads the sequence to whole blocks; real segment ids are never negative.
_FILL_SEGMENT = -1


def blockwise_attention(q, k, v, *, segment_ids, block=512):
    """Causal attention within segments, never holding a `[seq, seq]` array.

    Args:
      q: `[batch, seq, heads, head_dim]`.
      k: `[batch, seq, kv_heads, head_dim]`; head h uses key head h // (heads // kv_heads).
      v: `[batch, seq, kv_heads, head_dim]`.
      segment_ids: `[batch, seq]`, integers >= 0, the tokens of a segment next to each other and
        in order.
      block: tokens in a block of queries or keys; any seq is padded to a multiple of it.

    Returns:
      `[batch, seq, heads, head_dim]` in the dtype of q; sums are float32.
    """
    batch, seq, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    block = min(block, seq)
    # Tied to q, or jax computes the masks of all pairs of blocks before the loop over layers.
    q, segment_ids = jax.lax.optimization_barrier((q, segment_ids))
    q_blocks, k_blocks, v_blocks = (
        _to_blocks(x, block)
        for x in (q.reshape(batch, seq, kv_heads, heads // kv_heads, head_dim), k, v)
    )
    segments = _to_blocks(segment_ids[..., None], block, fill=_FILL_SEGMENT)[..., 0]
    out = _attend(q_blocks, k_blocks, v_blocks, segments)
    out = jnp.moveaxis(out, (0, -2), (1, 2)).reshape(batch, -1, heads, head_dim)
    return out[:, :seq]


def _to_blocks(x, block, fill=0):
    """`[batch, seq, ..., d]` -> `[blocks, batch, ..., tokens, d]`, a block contiguous."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % block)
    padded = jnp.pad(x, padding, constant_values=fill)
    split = padded.reshape(x.shape[0], -1, block, *x.shape[2:])
    return jnp.moveaxis(split, (1, 2), (0, -2))


def _pairs(segments):
    """The scanned pairs: query block, key block, and whether any query shares a segment.

    The diagonal comes first in every row of blocks: there each query sees at least itself, so
    from then on the running maximum is a real score and hidden keys get exactly zero.
    """
    blocks = segments.shape[0]
    rows = np.concatenate([np.full(i + 1, i) for i in range(blocks)])
    columns = np.concatenate([np.arange(i, -1, -1) for i in range(blocks)])
    # Segments are contiguous: two blocks share one exactly when the last tokens of the key block
    # belong to the segment of the first tokens of the query block. Padding needs no more than its
    # diagonal, which keeps what nobody reads finite.
    first, last = segments[rows, :, 0], segments[columns, :, -1]
    shared = ((first == last) & (first > 0)).any(axis=-1)
    return rows, columns, shared | (rows == columns)


_matmul = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _rows(x):
    """`[batch, kv_heads, group, tokens, d]` -> `[batch, kv_heads, group * tokens, d]`.

    With one axis to sum over, XLA's CPU backend multiplies as it is; two it transposes first.
    """
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _masked_scores(q, k, q_segments, k_segments, q_block, k_block):
    """Float32 scores `[batch, kv_heads, group, query, key]` of one pair of blocks."""
    scores = _matmul("bnrd,bnkd->bnrk", _rows(q), k).reshape(*q.shape[:-1], k.shape[-2])
    q_places, k_places = (n * q.shape[-2] + jnp.arange(q.shape[-2]) for n in (q_block, k_block))
    causal = q_places[None, :, None] >= k_places[None, None, :]
    seen = (q_segments[:, :, None] == k_segments[:, None, :]) & causal
    return jnp.where(seen[:, None, None], scores * q.shape[-1] ** -0.5, MASK_VALUE)


def _update(carry, blocks, indices):
    """The carried arrays with one block of each replaced; XLA does it in place."""
    return tuple(
        jax.lax.dynamic_update_index_in_dim(x, new, n, axis=0)
        for x, new, n in zip(carry, blocks, indices, strict=True)
    )


@jax.custom_vjp
def _attend(q, k, v, segments):
    return _forward(q, k, v, segments)[0]


def _forward(q, k, v, segments):
    """Returns the output blocks and the log of the softmax sums `[blocks, ..., tokens]`."""

    def step(carry, pair):
        i, j, shared = pair

        def attend(out, maximum, total):
            scores = _masked_scores(q[i], k[j], segments[i], segments[j], i, j)
            new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
            shrink = jnp.exp(maximum - new_maximum)
            weights = jnp.exp(scores - new_maximum[..., None])
            update = _matmul("bnrk,bnkd->bnrd", _rows(weights.astype(v.dtype)), v[j])
            new_total = total * shrink + weights.sum(axis=-1)
            return out * shrink[..., None] + update.reshape(out.shape), new_maximum, new_total

        blocks = [x[i] for x in carry]
        blocks = jax.lax.cond(shared, attend, lambda *unchanged: unchanged, *blocks)
        return _update(carry, blocks, (i, i, i)), None

    rows_shape = q.shape[:-1]
    start = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full(rows_shape, MASK_VALUE, jnp.float32),
        jnp.zeros(rows_shape, jnp.float32),
    )
    (out, maximum, total), _ = jax.lax.scan(step, start, _pairs(segments))
    return (out / total[..., None]).astype(q.dtype), maximum + jnp.log(total)


def _attend_forward(q, k, v, segments):
    out, log_total = _forward(q, k, v, segments)
    return out, (q, k, v, segments, out, log_total)


def _attend_backward(saved, d_out):
    q, k, v, segments, out, log_total = saved
    # Row sums of probabilities times their gradient (FlashAttention, eq. 4); on a CPU, an einsum
    # is much faster than a product and its sum.
    row_sums = jnp.einsum(
        "...d,...d->...", out.astype(jnp.float32), d_out.astype(jnp.float32), precision="highest"
    )

    def step(carry, pair):
        i, j, shared = pair

        def differentiate(d_q, d_k, d_v):
            scores = _masked_scores(q[i], k[j], segments[i], segments[j], i, j)
            probabilities = jnp.exp(scores - log_total[i][..., None])
            d_rows = _rows(d_out[i])
            d_probabilities = _matmul("bnrd,bnkd->bnrk", d_rows, v[j]).reshape(scores.shape)
            d_scores = probabilities * (d_probabilities - row_sums[i][..., None])
            d_scores = _rows((d_scores * q.shape[-1] ** -0.5).astype(q.dtype))
            probabilities = _rows(probabilities.astype(d_out.dtype))
            return (
                d_q + _matmul("bnrk,bnkd->bnrd", d_scores, k[j]).reshape(d_q.shape),
                d_k + _matmul("bnrk,bnrd->bnkd", d_scores, _rows(q[i])),
                d_v + _matmul("bnrk,bnrd->bnkd", probabilities, d_rows),
            )

        blocks = [x[n] for x, n in zip(carry, (i, j, j), strict=True)]
        blocks = jax.lax.cond(shared, differentiate, lambda *unchanged: unchanged, *blocks)
        return _update(carry, blocks, (i, j, j)), None

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    (d_q, d_k, d_v), _ = jax.lax.scan(step, start, _pairs(segments))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)
