"""Attention by the Pallas kernels for TPU that ship with jax.

`splash` is the kernel for TPU v4 and later. TPU v3 and older cannot run it: their Mosaic compiler
multiplies no bfloat16 matrices, and only the older `flash` kernel compiles there in float32.
Both take causality from the index in the row, both skip what is above the diagonal.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as flash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask


def splash_attention(q, k, v, *, segment_ids):
    """Causal attention within segments by the splash kernel; K/V heads are read in place.

    Args:
      q: `[batch, seq, heads, head_dim]`; `easylm.attention.choice` has the sizes that work.
      k: `[batch, seq, kv_heads, head_dim]`; head h uses key head h // (heads // kv_heads).
      v: `[batch, seq, kv_heads, head_dim]`.
      segment_ids: `[batch, seq]`, integers.

    Returns:
      `[batch, seq, heads, head_dim]` in the dtype of q.
    """
    _, seq, heads, head_dim = q.shape
    block = _block(seq)
    causal = splash_mask.CausalMask((seq, seq))
    kernel = splash_kernel.make_splash_mha(
        splash_mask.MultiHeadMask([causal] * heads),
        block_sizes=splash_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
    )
    # The kernel has no scale of its own.
    scaled = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype)
    out = jax.vmap(kernel)(
        scaled.swapaxes(1, 2),
        k.swapaxes(1, 2),
        v.swapaxes(1, 2),
        splash_kernel.SegmentIds(q=segment_ids, kv=segment_ids),
    )
    return out.swapaxes(1, 2)


def flash_attention(q, k, v, *, segment_ids):
    """Causal attention within segments by the flash kernel, in float32 whatever the dtype.

    The kernel wants as many key heads as query heads. It runs once for every query head of a
    group, on the same K and V: nothing is repeated, and the gradients of K and V are summed as
    they come. (vmap instead of the loop needs over 40 % more temporaries for a group of 8,
    because the gradients of K and V then exist once for every member.)

    Args:
      q: `[batch, seq, heads, head_dim]`; `easylm.attention.choice` has the sizes that work.
      k: `[batch, seq, kv_heads, head_dim]`; head h uses key head h // (heads // kv_heads).
      v: `[batch, seq, kv_heads, head_dim]`.
      segment_ids: `[batch, seq]`, integers.

    Returns:
      `[batch, seq, heads, head_dim]` in the dtype of q.
    """
    batch, seq, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    k, v = (x.swapaxes(1, 2).astype(jnp.float32) for x in (k, v))

    def attend(member):
        return flash_kernel.flash_attention(
            member,
            k,
            v,
            segment_ids=flash_kernel.SegmentIds(q=segment_ids, kv=segment_ids),
            causal=True,
            sm_scale=head_dim**-0.5,
            block_sizes=_flash_blocks(_block(seq)),
        )

    grouped = q.reshape(batch, seq, kv_heads, heads // kv_heads, head_dim)
    out = jax.lax.map(attend, grouped.transpose(3, 0, 2, 1, 4).astype(jnp.float32))
    return out.transpose(1, 3, 2, 0, 4).reshape(q.shape).astype(q.dtype)


def _flash_blocks(block):
    return flash_kernel.BlockSizes(
        block_q=block,
        block_k_major=block,
        block_k=block,
        block_b=1,
        block_q_major_dkv=block,
        block_k_major_dkv=block,
        block_k_dkv=block,
        block_q_dkv=block,
        block_k_major_dq=block,
        block_k_dq=block,
        block_q_dq=block,
    )


def _block(seq):
    """Tokens a block: the largest of 512, 256 and 128 that divides seq; 1024 overflows VMEM."""
    return next(block for block in (512, 256, 128) if seq % block == 0)
