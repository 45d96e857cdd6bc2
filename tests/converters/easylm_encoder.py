"""EasyLM's checkpoint files, written byte by byte from their specification.

A stream is a concatenation of msgpack arrays `[key, value]`: the key an array of texts, the value a
bin whose bytes are a msgpack document. An array is the extension 1 around `[shape, dtype, data]`;
one of more than `chunk_bytes` (1 GiB in flax) is a map of flat chunks. A document, `flax_params`,
is the nested map of such arrays itself.
"""

import msgpack
import numpy as np

CHUNK_BYTES = 1 << 30


def array_ext(array: np.ndarray, code: int = 1) -> msgpack.ExtType:
    """One array as flax's extension type."""
    payload = [list(array.shape), array.dtype.name, np.ascontiguousarray(array).tobytes()]
    return msgpack.ExtType(code, msgpack.packb(payload, use_bin_type=True))


def leaf(value, chunk_bytes: int = CHUNK_BYTES):
    """What msgpack is given for one leaf of a tree."""
    if isinstance(value, np.generic):
        return array_ext(np.asarray(value), code=3)
    if not isinstance(value, np.ndarray):
        return value
    if value.nbytes <= chunk_bytes:
        return array_ext(value)
    flat = value.reshape(-1)
    step = max(1, chunk_bytes // value.itemsize)
    parts = [flat[start : start + step] for start in range(0, flat.size, step)]
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): length for i, length in enumerate(value.shape)},
        "chunks": {str(i): array_ext(part) for i, part in enumerate(parts)},
    }


def record(key: tuple[str, ...], value, chunk_bytes: int = CHUNK_BYTES) -> bytes:
    """One record of a stream."""
    document = msgpack.packb(leaf(value, chunk_bytes), use_bin_type=True)
    return msgpack.packb([list(key), document], use_bin_type=True)


def flatten(tree: dict, prefix: tuple[str, ...] = ()) -> dict:
    """Nested dict → key path → leaf, in the order of insertion; empty dicts vanish."""
    flat = {}
    for name, value in tree.items():
        key = (*prefix, name)
        flat.update(flatten(value, key) if isinstance(value, dict) else {key: value})
    return flat


def stream(tree: dict, lexicographic: bool, chunk_bytes: int = CHUNK_BYTES) -> bytes:
    """A whole stream; trainers wrote it sorted, converters in the order of insertion."""
    flat = flatten(tree)
    keys = sorted(flat) if lexicographic else list(flat)
    return b"".join(record(key, flat[key], chunk_bytes) for key in keys)


def document(tree: dict, chunk_bytes: int = CHUNK_BYTES) -> bytes:
    """A `flax_params` file."""

    def encode(value):
        if isinstance(value, dict):
            return {name: encode(inside) for name, inside in value.items()}
        return leaf(value, chunk_bytes)

    return msgpack.packb(encode(tree), use_bin_type=True)


def from_hf(weights: dict[str, np.ndarray], heads: int, kv_heads: int) -> dict:
    """EasyLM's tree of a model given under Hugging Face's names and in its layout."""
    layers = 1 + max(int(name.split(".")[2]) for name in weights if ".layers." in name)

    def kernel(name, permuted_heads=0):
        array = weights[name + ".weight"]
        if permuted_heads:
            halves = array.reshape(permuted_heads, 2, -1, array.shape[1])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        return {"kernel": np.ascontiguousarray(array.T)}

    def layer(i):
        at = f"model.layers.{i}"
        return {
            "attention": {
                "wq": kernel(f"{at}.self_attn.q_proj", heads),
                "wk": kernel(f"{at}.self_attn.k_proj", kv_heads),
                "wv": kernel(f"{at}.self_attn.v_proj"),
                "wo": kernel(f"{at}.self_attn.o_proj"),
            },
            "feed_forward": {
                "w1": kernel(f"{at}.mlp.gate_proj"),
                "w2": kernel(f"{at}.mlp.down_proj"),
                "w3": kernel(f"{at}.mlp.up_proj"),
            },
            "attention_norm": kernel(f"{at}.input_layernorm"),
            "ffn_norm": kernel(f"{at}.post_attention_layernorm"),
        }

    return {
        "transformer": {
            "wte": {"embedding": weights["model.embed_tokens.weight"]},
            "h": {str(i): layer(i) for i in range(layers)},
            "ln_f": kernel("model.norm"),
        },
        "lm_head": kernel("lm_head"),
    }


def train_state(params: dict) -> dict:
    """A training state with Adam's moments, as gradient accumulation wrote it."""

    def zeros(tree):
        return {
            name: zeros(value) if isinstance(value, dict) else np.zeros_like(value)
            for name, value in tree.items()
        }

    adam = {
        "0": {
            "count": np.array(7, np.int32),
            "mu": {"params": zeros(params)},
            "nu": {"params": zeros(params)},
        },
        "2": {"count": np.array(7, np.int32)},
    }
    return {
        "step": 14,
        "params": {"params": params},
        "opt_state": {
            "mini_step": np.int32(0),
            "gradient_step": np.array(7, np.int32),
            "inner_opt_state": {"0": {}, "1": adam},
            "acc_grads": {"params": zeros(params)},
        },
    }
