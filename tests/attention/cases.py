"""Rows of segments, and attention written once more in float64 to judge the backends by."""

import jax
import jax.numpy as jnp
import numpy as np


def rows(*layouts):
    """`segment_ids` and `positions` `[batch, seq]` from lists of (segment id, length)."""
    segment_ids = [np.repeat(*zip(*layout, strict=True)) for layout in layouts]
    positions = [np.concatenate([np.arange(n) for _, n in layout]) for layout in layouts]
    return np.stack(segment_ids).astype(np.int32), np.stack(positions).astype(np.int32)


def qkv(segment_ids, heads, kv_heads, head_dim, dtype=jnp.float32):
    """Random q, k, v and the gradient of the output, standard normal, for these rows."""
    rng = np.random.default_rng(0)
    shapes = [(*segment_ids.shape, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def exact(q, k, v, d_out, segment_ids, positions):
    """Output and the gradients of q, k, v in float64, by the derivative of the formula."""
    q, k, v, d_out = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v, d_out))
    batch, seq, kv_heads, head_dim = k.shape
    group = q.shape[2] // kv_heads
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(head_dim)
    seen = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (
        positions[:, :, None] >= positions[:, None, :]
    )
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True)) * seen[:, None]
    weights /= weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bhqk,bkhd->bqhd", weights, v)
    d_weights = np.einsum("bqhd,bkhd->bhqk", d_out, v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True))
    d_scores /= np.sqrt(head_dim)
    d_q = np.einsum("bhqk,bkhd->bqhd", d_scores, k)
    d_k = np.einsum("bhqk,bqhd->bkhd", d_scores, q)
    d_v = np.einsum("bhqk,bqhd->bkhd", weights, d_out)
    grouped = (batch, seq, kv_heads, group, head_dim)
    return out, d_q, d_k.reshape(grouped).sum(axis=3), d_v.reshape(grouped).sum(axis=3)


def with_gradients(attend, q, k, v, d_out):
    """What `exact` returns, by the backend `attend(q, k, v)`."""

    @jax.jit
    def run(q, k, v, d_out):
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(d_out)

    return run(q, k, v, d_out)


def assert_close(found, wanted, tolerance):
    """Every array within `tolerance` of the largest number in the wanted one, or of 1."""
    names = ("out", "d_q", "d_k", "d_v")
    for name, f, w in zip(names, found, wanted, strict=True):
        f, w = (np.asarray(x, np.float64) for x in (f, w))
        worst = np.abs(f - w).max() / max(1, np.abs(w).max())
        assert worst <= tolerance, f"{name}: off by {worst:.1e} of its largest number"
