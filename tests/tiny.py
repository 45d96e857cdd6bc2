"""Tiny LLaMAs of transformers with weights large enough that a wrong mapping shows."""

import numpy as np

from easylm.models.llama.config import LlamaConfig

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def hf_llama(seed: int = 0, **overrides):
    """A transformers LlamaForCausalLM, float32, kernels 0.15 N, norms 1 + 0.1 N, biases 0.1 N.

    transformers' own initialisation (0.02, ones and zeros) hides most mistakes.
    """
    import torch
    import transformers

    config = transformers.LlamaConfig(**{**SIZES, **overrides})
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_((0.1 if name.endswith("bias") else 0.15) * noise)
    return model


def native(model) -> tuple[LlamaConfig, dict]:
    """(config, params) of a transformers model, by a mapping written apart from converters/."""
    hf = model.config.to_dict()
    config = LlamaConfig.from_hf(hf, "the test's model")
    weights = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    embed, dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads

    def stack(name, shape):
        layers = range(config.num_hidden_layers)
        return np.stack([weights[f"model.layers.{i}.{name}"].T.reshape(shape) for i in layers])

    def linear(name, in_shape, out_shape):
        leaf = {"kernel": stack(f"{name}.weight", (*in_shape, *out_shape))}
        if f"model.layers.0.{name}.bias" in weights:
            leaf["bias"] = stack(f"{name}.bias", out_shape)
        return leaf

    sizes = {
        "self_attn.q_proj": ((embed,), (heads, dim)),
        "self_attn.k_proj": ((embed,), (kv_heads, dim)),
        "self_attn.v_proj": ((embed,), (kv_heads, dim)),
        "self_attn.o_proj": ((heads, dim), (embed,)),
        "mlp.gate_proj": ((embed,), (config.intermediate_size,)),
        "mlp.up_proj": ((embed,), (config.intermediate_size,)),
        "mlp.down_proj": ((config.intermediate_size,), (embed,)),
    }
    layers = {"self_attn": {}, "mlp": {}}
    for name, shapes in sizes.items():
        part, projection = name.split(".")
        layers[part][projection] = linear(name, *shapes)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        layers[norm] = {"scale": stack(f"{norm}.weight", (embed,))}
    params = {
        "embed_tokens": {"embedding": weights["model.embed_tokens.weight"]},
        "layers": layers,
        "norm": {"scale": weights["model.norm.weight"]},
    }
    if not config.tie_word_embeddings:
        params["lm_head"] = {"kernel": weights["lm_head.weight"].T}
    return config, params


def packed_rows(config: LlamaConfig, lengths: list[list[int]], seq_len: int, seed: int = 0) -> dict:
    """A batch whose row i holds segments of lengths[i] random tokens, then padding.

    Returns tokens, targets, loss_weights, segment_ids, positions, [rows, seq_len].
    """
    rng = np.random.default_rng(seed)
    shape = (len(lengths), seq_len)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segment_ids")}
    batch["positions"] = np.zeros(shape, np.int32)
    batch["loss_weights"] = np.zeros(shape, np.float32)
    for row, segments in enumerate(lengths):
        start = 0
        for segment, length in enumerate(segments, start=1):
            at = slice(start, start + length)
            tokens = rng.integers(3, config.vocab_size, length)
            batch["tokens"][row, at] = tokens
            batch["targets"][row, start : start + length - 1] = tokens[1:]
            batch["loss_weights"][row, start : start + length - 1] = rng.random(length - 1) < 0.7
            batch["segment_ids"][row, at] = segment
            batch["positions"][row, at] = np.arange(length)
            start += length
    return batch
