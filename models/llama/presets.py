"""Sizes and constants of the published LLaMA models, for work that needs no weights.

Weights bring their own config.json; these are for random initialisation and for compiling a step
ahead of time. They repeat the config.json of these Hugging Face repositories: huggyllama/llama-*
(LLaMA 1; its 65B has eps 1e-5, as Meta's params.json has), meta-llama/Llama-2-*-hf,
codellama/CodeLlama-*-hf (the base models; the 34B has no infilling tokens, so 32,000 ids, and the
70B's were corrected after release, see github.com/meta-llama/codellama/issues/188),
meta-llama/Llama-3.1-* and meta-llama/Llama-3.2-*.
"""

from dataclasses import replace

from easylm.models.llama.config import LlamaConfig, RopeScaling

LLAMA_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
)
LLAMA_13B = replace(
    LLAMA_7B,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
)
LLAMA_30B = replace(
    LLAMA_7B,
    hidden_size=6656,
    intermediate_size=17920,
    num_hidden_layers=60,
    num_attention_heads=52,
    num_key_value_heads=52,
)
LLAMA_65B = replace(
    LLAMA_7B,
    hidden_size=8192,
    intermediate_size=22016,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=64,
    rms_norm_eps=1e-5,
)

LLAMA2_7B = replace(LLAMA_7B, max_position_embeddings=4096, rms_norm_eps=1e-5)
LLAMA2_13B = replace(LLAMA_13B, max_position_embeddings=4096, rms_norm_eps=1e-5)
LLAMA2_70B = replace(
    LLAMA2_7B,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)

_CODE = {"max_position_embeddings": 16384, "rope_theta": 1e6}
CODELLAMA_7B = replace(LLAMA2_7B, vocab_size=32016, **_CODE)
CODELLAMA_13B = replace(LLAMA2_13B, vocab_size=32016, **_CODE)
CODELLAMA_34B = replace(LLAMA2_70B, intermediate_size=22016, num_hidden_layers=48, **_CODE)
CODELLAMA_70B = replace(LLAMA2_70B, vocab_size=32016, **_CODE)

LLAMA3_1_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    bos_token_id=128000,
    eos_token_id=128001,
)
LLAMA3_1_70B = replace(
    LLAMA3_1_8B,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
)
LLAMA3_2_1B = replace(
    LLAMA3_1_8B,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    head_dim=64,
    rope_scaling=replace(LLAMA3_1_8B.rope_scaling, factor=32.0),
    tie_word_embeddings=True,
)
LLAMA3_2_3B = replace(
    LLAMA3_2_1B,
    hidden_size=3072,
    num_hidden_layers=28,
    num_attention_heads=24,
    head_dim=128,
)

PRESETS = {
    "llama_7b": LLAMA_7B,
    "llama_13b": LLAMA_13B,
    "llama_30b": LLAMA_30B,
    "llama_65b": LLAMA_65B,
    "llama2_7b": LLAMA2_7B,
    "llama2_13b": LLAMA2_13B,
    "llama2_70b": LLAMA2_70B,
    "codellama_7b": CODELLAMA_7B,
    "codellama_13b": CODELLAMA_13B,
    "codellama_34b": CODELLAMA_34B,
    "codellama_70b": CODELLAMA_70B,
    "llama3_1_8b": LLAMA3_1_8B,
    "llama3_1_70b": LLAMA3_1_70B,
    "llama3_2_1b": LLAMA3_2_1B,
    "llama3_2_3b": LLAMA3_2_3B,
}

# Models on the Hugging Face hub that have exactly these sizes, by name.
PUBLISHED = {
    "huggyllama/llama-7b": LLAMA_7B,
    "huggyllama/llama-13b": LLAMA_13B,
    "huggyllama/llama-30b": LLAMA_30B,
    "huggyllama/llama-65b": LLAMA_65B,
    "meta-llama/Llama-2-7b-hf": LLAMA2_7B,
    "meta-llama/Llama-2-13b-hf": LLAMA2_13B,
    "meta-llama/Llama-2-70b-hf": LLAMA2_70B,
    "codellama/CodeLlama-7b-hf": CODELLAMA_7B,
    "codellama/CodeLlama-13b-hf": CODELLAMA_13B,
    "codellama/CodeLlama-34b-hf": CODELLAMA_34B,
    "meta-llama/Llama-3.1-8B": LLAMA3_1_8B,
    "meta-llama/Llama-3.1-70B": LLAMA3_1_70B,
    "meta-llama/Llama-3.2-1B": LLAMA3_2_1B,
    "meta-llama/Llama-3.2-3B": LLAMA3_2_3B,
    # Tülu 2 was trained on rows of 8,192 tokens.
    "allenai/tulu-2-7b": replace(LLAMA2_7B, max_position_embeddings=8192),
    "allenai/tulu-2-13b": replace(LLAMA2_13B, max_position_embeddings=8192),
    "allenai/tulu-2-70b": replace(LLAMA2_70B, max_position_embeddings=8192),
}
