"""Attention by cuDNN on NVIDIA GPUs, through jax.nn."""

import jax


def cudnn_attention(q, k, v, *, segment_ids):
    """Causal attention within segments by cuDNN's flash attention, which groups heads itself.

    jax.nn offers two ways to tell cuDNN what to hide: row lengths, which know no segments, and a
    mask, which becomes a bias. (A packed layout with segment offsets exists below it, private,
    for Hopper alone and with a fixed number of segments a row.) So causality is left to the
    kernel, which skips what it hides, and only the segments go into the mask: one
    `[batch, 1, seq, seq]` bias in the dtype of q, shared by all heads, and its gradient. That
    is 128 MiB each for a row of 8,192 tokens; where it is too much, use `blockwise`.

    Args:
      q: `[batch, seq, heads, head_dim]`, bfloat16 or float16; `easylm.attention.choice` has the
        sizes that work.
      k: `[batch, seq, kv_heads, head_dim]`; head h uses key head h // (heads // kv_heads).
      v: `[batch, seq, kv_heads, head_dim]`.
      segment_ids: `[batch, seq]`, integers.

    Returns:
      `[batch, seq, heads, head_dim]` in the dtype of q.
    """
    same_segment = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(
        q, k, v, mask=same_segment, is_causal=True, implementation="cudnn"
    )
