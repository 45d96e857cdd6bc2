"""EasyLM's checkpoints: `streaming_params`, `streaming_train_state`, `flax_params`.

They are presented under Hugging Face's names and in its layout. EasyLM rotates neighbouring pairs
of a head, Hugging Face its two halves, so the rows of q_proj and k_proj change places within each
head; kernels are [in, out] there and [out, in] here.
"""

from dataclasses import dataclass

import numpy as np

from easylm import storage
from easylm.converters.msgpack_scan import Leaf, is_document, scan_document, scan_stream
from easylm.converters.tensors import TensorInfo, files_and_size, refuse
from easylm.errors import InputError
from easylm.models.llama.config import LlamaConfig

Key = tuple[str, ...]
_TRAINING_ONLY = ("step", "opt_state")
_SHOWN_MISSING = 50


@dataclass(frozen=True)
class Weight:
    """What one EasyLM key holds.

    Attributes:
      name: Hugging Face's.
      shape: EasyLM's; a kernel is [in, out].
      heads: how many heads change the order of their rows; 0 for none.
    """

    name: str
    shape: tuple[int, ...]
    heads: int = 0

    @property
    def is_kernel(self) -> bool:
        """Whether Hugging Face holds it transposed; an embedding is no kernel."""
        return len(self.shape) == 2 and not self.name.endswith("embed_tokens.weight")


class EasyLMSource:
    """One EasyLM file, local or gs://. A `TensorSource`.

    Args:
      path: the file.
      config: the Hugging Face config.json of the same model: the file says nothing about heads.
      config_path: where that comes from; its folder is where a tokenizer is looked for.
      unpermuted: the rows of q_proj and k_proj are in Hugging Face's order already (Yi).
    Raises:
      InputError: the file is cut, damaged, or not the weights of that model; all missing, unknown
        and wrongly shaped tensors are listed.
    """

    def __init__(self, path: str, config: dict, config_path: str, unpermuted: bool):
        self.config, self.config_path = config, config_path
        self.folder = config_path.rpartition("/")[0]
        self._path, self._unpermuted = path, unpermuted
        document = is_document(storage.read_range(path, 0, min(16, storage.file_size(path))))
        found, cut = scan_document(path) if document else scan_stream(path)
        leaves, ignored = _weights_only(found)
        wanted = wanted_weights(LlamaConfig.from_hf(config, config_path), config_path)
        refuse(_differences(leaves, wanted, cut, path, config_path), path)
        self._leaves = {weight.name: (leaves[key], weight) for key, weight in wanted.items()}
        file = path.rpartition("/")[2]
        self.tensors = {
            name: TensorInfo(leaf.shape[::-1] if weight.is_kernel else leaf.shape, leaf.dtype, file)
            for name, (leaf, weight) in self._leaves.items()
        }
        size = sum(info.nbytes for info in self.tensors.values())
        self.kind = f"EasyLM {'train state' if ignored else 'parameters'}, " + (
            f"{files_and_size(1, size)} of weights in {len(self.tensors)} tensors"
        )
        if ignored:
            self.kind += f"; {ignored} other entries (optimizer state, step) ignored"

    def read(self, name: str, start_row: int = 0, end_row: int | None = None) -> np.ndarray:
        """Rows `[start_row, end_row)`; of a kernel all bytes are read, and a view may be given."""
        leaf, weight = self._leaves[name]
        if not weight.is_kernel:
            return leaf.read(self._path, start_row, end_row)
        kernel = leaf.read(self._path)
        if weight.heads and not self._unpermuted:
            kernel = halves_from_pairs(kernel, weight.heads)
        return kernel.T[start_row:end_row]


def halves_from_pairs(kernel: np.ndarray, heads: int) -> np.ndarray:
    """Reorders columns [in, heads * head_dim] from RoPE's neighbouring pairs to its two halves."""
    pairs = kernel.reshape(len(kernel), heads, -1, 2)
    halves = np.empty((len(kernel), heads, 2, pairs.shape[2]), kernel.dtype)
    halves[:, :, 0] = pairs[..., 0]
    halves[:, :, 1] = pairs[..., 1]
    return halves.reshape(kernel.shape)


def wanted_weights(config: LlamaConfig, config_path: str) -> dict[Key, Weight]:
    """Every key that an EasyLM file of a model of this size has."""
    if config.attention_bias or config.mlp_bias:
        raise InputError(
            f"{config_path}: attention_bias or mlp_bias is true; EasyLM's LLaMA has no biases, so "
            "this config belongs to another model"
        )
    embed, mlp, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    wanted = {
        ("transformer", "wte", "embedding"): Weight("model.embed_tokens.weight", (vocab, embed)),
        ("transformer", "ln_f", "kernel"): Weight("model.norm.weight", (embed,)),
    }
    if not config.tie_word_embeddings:
        wanted[("lm_head", "kernel")] = Weight("lm_head.weight", (embed, vocab))
    layer = {
        "attention/wq": ("self_attn.q_proj", (embed, heads * config.head_dim), heads),
        "attention/wk": ("self_attn.k_proj", (embed, kv_heads * config.head_dim), kv_heads),
        "attention/wv": ("self_attn.v_proj", (embed, kv_heads * config.head_dim), 0),
        "attention/wo": ("self_attn.o_proj", (heads * config.head_dim, embed), 0),
        "feed_forward/w1": ("mlp.gate_proj", (embed, mlp), 0),
        "feed_forward/w2": ("mlp.down_proj", (mlp, embed), 0),
        "feed_forward/w3": ("mlp.up_proj", (embed, mlp), 0),
        "attention_norm": ("input_layernorm", (embed,), 0),
        "ffn_norm": ("post_attention_layernorm", (embed,), 0),
    }
    for i in range(config.num_hidden_layers):
        for place, (name, shape, permuted) in layer.items():
            key = ("transformer", "h", str(i), *place.split("/"), "kernel")
            wanted[key] = Weight(f"model.layers.{i}.{name}.weight", shape, permuted)
    return wanted


def _weights_only(found: dict[Key, object]) -> tuple[dict[Key, object], int]:
    """The model's entries without their "params" prefixes, and how many entries others are."""
    weights = {}
    for key, leaf in found.items():
        while key[0] == "params" and len(key) > 1:
            key = key[1:]
        if key[0] not in _TRAINING_ONLY:
            weights[key] = leaf
    return weights, len(found) - len(weights)


def _differences(
    leaves: dict[Key, object], wanted: dict[Key, Weight], cut: str, path: str, config_path: str
) -> list[str]:
    """What is wrong with a file's contents, as lines for the user."""
    if ("score", "kernel") in leaves:
        raise InputError(
            f"{path}: holds score/kernel, the head of a reward or value model, which gives a score "
            "instead of tokens; wanted a language model with lm_head/kernel"
        )
    problems = [cut] if cut else []
    missing = [key for key in wanted if key not in leaves]
    if missing:
        names = ", ".join("/".join(key) for key in missing[:_SHOWN_MISSING])
        hidden = len(missing) - _SHOWN_MISSING
        problems.append(
            f"{len(missing)} of {len(wanted)} tensors are missing, so the file is cut short or of "
            f"another model than {config_path}: {names}"
            + (f" and {hidden} more" if hidden > 0 else "")
        )
    if not cut:
        problems += [
            f"{'/'.join(key)}: not a tensor of a LLaMA of the size in {config_path}"
            for key in leaves
            if key not in wanted
        ]
    for key, weight in wanted.items():
        leaf = leaves.get(key)
        if key not in leaves or (isinstance(leaf, Leaf) and leaf.shape == weight.shape):
            continue
        shape = list(leaf.shape) if isinstance(leaf, Leaf) else leaf
        problems.append(f"{'/'.join(key)}: found {shape}; {config_path} wants {list(weight.shape)}")
    return problems
