"""Causal attention over packed rows: one function, several backends that agree."""

import functools

import jax
from jax.sharding import PartitionSpec

from easylm.attention.blockwise import blockwise_attention
from easylm.attention.choice import BACKENDS, choose_backend, obstacle
from easylm.attention.cudnn import cudnn_attention
from easylm.attention.pallas_tpu import flash_attention, splash_attention
from easylm.attention.reference import reference_attention
from easylm.errors import InputError

__all__ = ["BACKENDS", "attention", "choose_backend", "reference_attention"]

# Tokens a block. A CPU is fastest when the scores of a block stay in its cache; on accelerators
# fewer and larger steps win, and 512 still skips most of a row of short packed segments.
_CPU_BLOCK = 128
_ACCELERATOR_BLOCK = 512


def attention(q, k, v, *, positions, segment_ids, backend="auto", mesh=None):
    """Scaled softmax attention: a query sees the keys of its segment that are not later than it.

    Every row holds its segments one after the other, each in order, and segment 0 is padding.
    `reference` reads `positions`; the other backends take the order from the place in the row.

    Args:
      q: queries, `[batch, seq, heads, head_dim]`.
      k: keys, `[batch, seq, kv_heads, head_dim]`; head h uses key head h // (heads // kv_heads).
      v: values, `[batch, seq, kv_heads, head_dim]`.
      positions: `[batch, seq]`, integers, rising within a segment.
      segment_ids: `[batch, seq]`, integers >= 0. What comes out for padding is finite, and differs
        between backends.
      backend: one of BACKENDS, or `auto` for `choose_backend` by the kind of device.
      mesh: with axes data, fsdp and tensor, the devices that share the work: the batch is split
        over data and fsdp, the heads over tensor (kv_heads must divide by it).

    Returns:
      `[batch, seq, heads, head_dim]` in the dtype of q; the softmax is float32.

    Raises:
      InputError: the backend is unknown or cannot run these shapes on these devices, or the
        batch or the heads do not divide over the mesh.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    attend = _bind(backend, device.device_kind, q)
    if mesh is None or mesh.size == 1:
        return attend(q, k, v, positions, segment_ids)
    _check_mesh(mesh, q.shape[0], k.shape[2])
    tokens = PartitionSpec(("data", "fsdp"), None)
    heads = PartitionSpec(("data", "fsdp"), None, "tensor", None)
    # GSPMD cannot split a Pallas or cuDNN call, so each device is handed its own part. No part
    # needs another, hence no replication to check, and Pallas kernels do not declare theirs.
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(heads, heads, heads, tokens, tokens),
        out_specs=heads,
        check_vma=False,
    )(q, k, v, positions, segment_ids)


def _bind(backend, device_kind, q):
    """The backend as a function of q, k, v, positions, segment_ids."""
    _, seq, _, head_dim = q.shape
    shape = (device_kind, head_dim, seq, q.dtype.name)
    if backend == "auto":
        backend = choose_backend(*shape)
    if backend not in BACKENDS:
        raise InputError(
            f"attention: found backend {backend!r}; wanted one of {', '.join(BACKENDS)} or auto"
        )
    reason = obstacle(backend, *shape)
    if reason is not None:
        raise InputError(
            f"attention: backend {backend!r} cannot run here: {reason}. "
            f"'auto' would take {choose_backend(*shape)!r}."
        )
    if backend == "reference":
        return lambda q, k, v, positions, segment_ids: reference_attention(
            q, k, v, positions=positions, segment_ids=segment_ids
        )
    block = _CPU_BLOCK if device_kind == "cpu" else _ACCELERATOR_BLOCK
    by_place = {
        "blockwise": functools.partial(blockwise_attention, block=block),
        "splash": splash_attention,
        "flash": flash_attention,
        "cudnn": cudnn_attention,
    }[backend]
    return lambda q, k, v, _, segment_ids: by_place(q, k, v, segment_ids=segment_ids)


def _check_mesh(mesh, batch, kv_heads):
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % rows:
        raise InputError(
            f"attention: found a batch of {batch} rows; wanted a multiple of {rows}, "
            f"the mesh's data ({mesh.shape['data']}) times fsdp ({mesh.shape['fsdp']})"
        )
    if kv_heads % mesh.shape["tensor"]:
        raise InputError(
            f"attention: found {kv_heads} key/value heads; wanted a multiple of the mesh's "
            f"tensor ({mesh.shape['tensor']})"
        )
