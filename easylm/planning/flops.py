"""FLOPs of a step, counted from the model: what it asks for, and what the program computes."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from easylm.metrics import model_flops
from easylm.models.llama.config import LlamaConfig
from easylm.trainers.config import RunConfig

# Products with the head that a loss and its gradients take; see easylm/losses.py. Preferences
# weigh a token only when all are summed, so their backward pass computes the logits again; but
# where a row is one chunk, XLA sees that they are the same and keeps them.
_HEAD_PRODUCTS = {"sft": 3, "dpo": 4}
# Products of attention, each over (query, key) pairs: forward, backward. The dense formula keeps
# its probabilities; the others compute them again, the two Pallas kernels twice, since gradients of
# queries and of keys and values are kernels of their own.
_ATTENTION_PRODUCTS = {
    "reference": (2, 4),
    "blockwise": (2, 5),
    "cudnn": (2, 5),
    "splash": (2, 7),
    "flash": (2, 7),
}
# Tokens a block of attention; see easylm/attention/__init__.py and easylm/attention/pallas_tpu.py.
_CPU_BLOCK = 128
_ACCELERATOR_BLOCK = 512
_PALLAS_BLOCKS = (512, 256, 128)


class Flops(NamedTuple):
    """Of rows of a batch, forward and backward, all devices together.

    Attributes:
      model: what the model asks for, as in `easylm.metrics.model_flops`; MFU counts them.
      hardware: of every matrix product that the program computes, with padding, empty rows,
        masked scores, repeated K/V heads and what is computed again. Only products count: the
        rest (norms, softmax, the optimizer) is under 1 % of a model of 7B.
    """

    model: float
    hardware: float


def step_flops(
    config: RunConfig,
    model: LlamaConfig,
    rows: Sequence[Sequence[int]],
    *,
    objective: Literal["sft", "dpo"],
    attention: str,
    platform: str,
    tensor: int,
    rows_at_once: int,
) -> Flops:
    """Counts the FLOPs of a step, or of several whose rows are given one after the other.

    Args:
      config: gives seq_len, remat and loss_chunk.
      model: its sizes.
      rows: lengths of the segments of each row, in the order in which they lie in it; empty for a
        row of padding. A pair of answers is two segments.
      objective: decides how often the head multiplies.
      attention: the backend that runs, a name in `easylm.attention.BACKENDS`.
      platform: "tpu", "gpu" or "cpu".
      tensor: size of the mesh axis.
      rows_at_once: rows of a micro-batch on one device. Blockwise attention skips a pair of blocks
        if none of them needs it: row i is with the others of its group of so many in `rows`.
    """
    lengths = [length for row in rows for length in row]
    asked = model_flops(
        parameters=count_parameters(model),
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        head_dim=model.head_dim,
        tokens=sum(lengths),
        causal_pairs=sum(n * (n + 1) // 2 for n in lengths),
    )
    seq_len = config.data.seq_len
    pairs = _computed_pairs(rows, seq_len, attention, platform, rows_at_once)
    layers = model.num_hidden_layers * (
        len(rows) * seq_len * _kernel_flops(model, tensor, config.remat)
        + pairs * _attention_flops(model, attention, config.remat)
    )
    padded_vocab = -(-model.vocab_size // tensor) * tensor
    chunks = -(-seq_len // config.loss_chunk)
    products = _HEAD_PRODUCTS[objective] if chunks > 1 else _HEAD_PRODUCTS["sft"]
    positions = len(rows) * chunks * -(-seq_len // chunks)  # chunks of one size: `_to_chunks`
    head = products * 2 * positions * model.hidden_size * padded_vocab
    return Flops(asked, layers + head)


def count_parameters(model: LlamaConfig) -> int:
    """What `easylm.models.llama.model.count_parameters` counts, without jax."""
    embed, layers = model.hidden_size, model.num_hidden_layers
    q, kv = (n * model.head_dim for n in (model.num_attention_heads, model.num_key_value_heads))
    biases = model.attention_bias * (q + 2 * kv + embed)
    biases += model.mlp_bias * (2 * model.intermediate_size + embed)
    tables = (1 if model.tie_word_embeddings else 2) * model.vocab_size * embed
    return tables + layers * (sum(_kernels(model, kv).values()) + 2 * embed + biases) + embed


def block_pairs(
    rows: Sequence[Sequence[int]], seq_len: int, block: int, rows_at_once: int = 1
) -> int:
    """Pairs (query, key) of the blocks that `blockwise_attention` does not skip.

    Arguments are those of `step_flops`; `block` is in tokens.
    """
    block = min(block, seq_len)
    starts = np.arange(0, seq_len, block)
    first, last = (np.empty((len(rows), len(starts)), np.int64) for _ in range(2))
    filled = np.empty(first.shape, bool)
    for row, lengths in enumerate(rows):
        ends = np.cumsum(lengths)
        first[row] = np.searchsorted(ends, starts, side="right")
        last[row] = np.searchsorted(ends, starts + block - 1, side="right")
        filled[row] = first[row] < len(lengths)
    # Of padding the diagonal alone is computed.
    shared = (first[:, :, None] == last[:, None, :]) & filled[:, :, None]
    shared = np.tril(shared, -1) | np.eye(len(starts), dtype=bool)
    groups = shared.reshape(-1, rows_at_once, *shared.shape[1:]).any(axis=1)
    return int(groups.sum()) * rows_at_once * block * block


def _computed_pairs(rows, seq_len: int, attention: str, platform: str, rows_at_once: int) -> int:
    """Pairs (query, key) whose scores are computed, over all rows."""
    if attention == "blockwise":
        block = _CPU_BLOCK if platform == "cpu" else _ACCELERATOR_BLOCK
        return block_pairs(rows, seq_len, block, rows_at_once)
    if attention == "reference":
        return len(rows) * seq_len * seq_len
    if attention == "cudnn":  # its blocks are its own; at least what is below the diagonal
        return len(rows) * seq_len * (seq_len + 1) // 2
    block = next(block for block in _PALLAS_BLOCKS if seq_len % block == 0)
    blocks = seq_len // block
    return len(rows) * blocks * (blocks + 1) // 2 * block * block


def _attention_flops(model: LlamaConfig, attention: str, remat: str) -> int:
    """Of a (query, key) pair in a layer. Every policy but none runs the forward pass again."""
    forward, backward = _ATTENTION_PRODUCTS[attention]
    products = forward + backward + (forward if remat != "none" else 0)
    return products * 2 * model.head_dim * model.num_attention_heads


def _kernel_flops(model: LlamaConfig, tensor: int, remat: str) -> int:
    """Of a token in the products of a layer with its kernels."""
    # K and V are computed once for every shard that has no head of its own; see `_project_kv`.
    kv_heads = model.num_key_value_heads * max(1, tensor // model.num_key_value_heads)
    kernels = _kernels(model, kv_heads * model.head_dim)
    products = 3 * sum(kernels.values())  # forward, and two gradients
    if remat in ("block", "block_sharded"):
        # The backward pass needs what enters the last product, not what comes out.
        products += sum(kernels.values()) - kernels["down_proj"]
    return 2 * products


def _kernels(model: LlamaConfig, kv: int) -> dict[str, int]:
    """Sizes of a layer's kernels, where K and V are `kv` wide."""
    embed, q, mlp = (
        model.hidden_size,
        model.num_attention_heads * model.head_dim,
        model.intermediate_size,
    )
    attention = {"q_proj": embed * q, "k_proj": embed * kv, "v_proj": embed * kv}
    mlps = {"gate_proj": embed * mlp, "up_proj": embed * mlp, "down_proj": mlp * embed}
    return {**attention, "o_proj": q * embed, **mlps}
