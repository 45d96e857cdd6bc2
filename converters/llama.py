"""Names and layouts of a LLaMA's tensors: Hugging Face's and ours, one list used both ways.

Hugging Face stores a projection as [out, in], one tensor a layer; ours are [in, out] with heads
and head_dim apart, all layers stacked. RoPE is half-split in both, so no rows are permuted.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from easylm.converters.tensors import BFLOAT16, TensorInfo, refuse
from easylm.models.llama.config import LlamaConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Older files hold RoPE's frequencies; they follow from the config.
_HARMLESS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|rotary_emb\.inv_freq")

Array = TypeVar("Array")  # of numpy or jax


@dataclass(frozen=True)
class Rule:
    """One native parameter and the Hugging Face tensors that make it.

    Attributes:
      template: Hugging Face's name, with {} for the layer.
      path: keys in the native tree.
      num_layers: length of the native parameter's first axis; None where it is not stacked.
      hf_shape: of one tensor.
      native_shape: of the parameter, without the layers axis.
      transposed: whether the axes of the two, heads and head_dim taken as one, are swapped.
    """

    template: str
    path: tuple[str, ...]
    num_layers: int | None
    hf_shape: tuple[int, ...]
    native_shape: tuple[int, ...]
    transposed: bool = False

    def hf_name(self, layer: int) -> str:
        """Hugging Face's name of a layer's tensor; `layer` is ignored where there are none."""
        return self.template.format(layer)

    def hf_names(self) -> list[str]:
        """The names of all layers."""
        return [self.hf_name(layer) for layer in range(self.num_layers or 1)]

    def to_native(self, array: Array) -> Array:
        """One tensor of `hf_shape` in `native_shape`; a view where numpy can."""
        return (array.T if self.transposed else array).reshape(self.native_shape)

    def to_hf(self, array: Array) -> Array:
        """The inverse of `to_native`."""
        if not self.transposed:
            return array.reshape(self.hf_shape)
        return array.reshape(self.hf_shape[::-1]).T


def rules(config: LlamaConfig) -> tuple[Rule, ...]:
    """All parameters of a model; its biases and head only where it has them."""
    vocab, embed, mlp = (config.vocab_size,), (config.hidden_size,), (config.intermediate_size,)
    heads = (config.num_attention_heads, config.head_dim)
    kv_heads = (config.num_key_value_heads, config.head_dim)
    return (
        Rule(EMBEDDING, ("embed_tokens", "embedding"), None, vocab + embed, vocab + embed),
        _norm(config, "input_layernorm"),
        *_linear(config, "self_attn", "q_proj", embed, heads, config.attention_bias),
        *_linear(config, "self_attn", "k_proj", embed, kv_heads, config.attention_bias),
        *_linear(config, "self_attn", "v_proj", embed, kv_heads, config.attention_bias),
        *_linear(config, "self_attn", "o_proj", heads, embed, config.attention_bias),
        _norm(config, "post_attention_layernorm"),
        *_linear(config, "mlp", "gate_proj", embed, mlp, config.mlp_bias),
        *_linear(config, "mlp", "up_proj", embed, mlp, config.mlp_bias),
        *_linear(config, "mlp", "down_proj", mlp, embed, config.mlp_bias),
        Rule("model.norm.weight", ("norm", "scale"), None, embed, embed),
        *(() if config.tie_word_embeddings else (_head(config),)),
    )


def _head(config: LlamaConfig) -> Rule:
    shape = (config.vocab_size, config.hidden_size)
    return Rule(HEAD, ("lm_head", "kernel"), None, shape, shape[::-1], transposed=True)


def _norm(config: LlamaConfig, name: str) -> Rule:
    template, shape = f"model.layers.{{}}.{name}.weight", (config.hidden_size,)
    return Rule(template, ("layers", name, "scale"), config.num_hidden_layers, shape, shape)


def _linear(
    config: LlamaConfig,
    part: str,
    name: str,
    in_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    bias: bool,
) -> list[Rule]:
    """The rules of one projection of every layer: its kernel, and its bias if it has one."""
    prefix, path = f"model.layers.{{}}.{part}.{name}", ("layers", part, name)
    hf_in, hf_out = math.prod(in_shape), math.prod(out_shape)
    layers, native_shape = config.num_hidden_layers, in_shape + out_shape
    found = [
        Rule(f"{prefix}.weight", (*path, "kernel"), layers, (hf_out, hf_in), native_shape, True)
    ]
    if bias:
        found.append(Rule(f"{prefix}.bias", (*path, "bias"), layers, (hf_out,), out_shape))
    return found


def expected_tensors(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name → shape of every tensor of a model."""
    return {name: rule.hf_shape for rule in rules(config) for name in rule.hf_names()}


def check_tensors(config: LlamaConfig, infos: Mapping[str, TensorInfo], where: str) -> list[str]:
    """Compares what a source holds with what the model needs.

    A tied model may come with a head all the same; whether it equals the embedding shows when it
    is read.

    Returns:
      The names of tensors that have no use here and may be ignored.
    Raises:
      InputError: the list of all tensors that are missing, unknown, or of a wrong shape or dtype.
    """
    expected = expected_tensors(config)
    allowed = {**expected, HEAD: _head(config).hf_shape}
    problems = [
        f"no tensor {name}; wanted one of shape {list(shape)}"
        for name, shape in expected.items()
        if name not in infos
    ]
    ignored = []
    for name, info in infos.items():
        if name not in allowed:
            if _HARMLESS.fullmatch(name):
                ignored.append(name)
            else:
                problems.append(f"{info.where}: tensor {name} is unknown; a LLaMA has none")
            continue
        if info.shape != allowed[name]:
            problems.append(
                f"{info.where}: tensor {name}: found shape {list(info.shape)}; config.json says "
                f"{list(allowed[name])}"
            )
        if info.dtype != BFLOAT16 and not np.issubdtype(info.dtype, np.floating):
            problems.append(
                f"{info.where}: tensor {name}: found dtype {info.dtype}; wanted a float"
            )
    refuse(problems, where)
    return ignored
