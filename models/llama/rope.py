"""Rotary position embedding in the half-split layout of Hugging Face, with float32 angles."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from easylm.models.llama.config import LlamaConfig, RopeScaling


def rope_angles(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every position's angles (Su et al. 2021, arXiv:2104.09864, eq. 14).

    Float32 whatever the compute dtype: in bfloat16, 257 and 256 are one position.

    Args:
      positions: [batch, seq] int32.
    Returns:
      (cos, sin), each [batch, seq, head_dim // 2] float32.
    """
    frequencies = _frequencies(config, positions)[None, None, :]
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x[i], x[i + head_dim // 2]) of every head.

    Args:
      x: [batch, seq, heads, head_dim], any float dtype; rotated in float32.
      cos, sin: [batch, seq, head_dim // 2] float32.
    Returns:
      [batch, seq, heads, head_dim] in x's dtype.
    """
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _frequencies(config: LlamaConfig, positions: jax.Array) -> jax.Array | np.ndarray:
    """[head_dim // 2] float32: radians a position adds to each pair."""
    scaling = config.rope_scaling
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    if scaling is not None and scaling.rope_type == "dynamic":
        return _dynamic_base(config, positions) ** -exponents.astype(np.float32)
    frequencies = config.rope_theta**-exponents
    if scaling is not None and scaling.rope_type == "linear":
        frequencies = frequencies / scaling.factor
    if scaling is not None and scaling.rope_type == "llama3":
        frequencies = _llama3_frequencies(frequencies, scaling)
    return frequencies.astype(np.float32)


def _llama3_frequencies(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Divides wavelengths beyond the original context by `factor`, keeps the short ones.

    Between original / high_freq_factor and original / low_freq_factor the two are blended
    linearly in the number of turns within the original context (Llama 3.1's release).
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _dynamic_base(config: LlamaConfig, positions: jax.Array) -> jax.Array:
    """NTK-aware base: grows once the text is longer than max_position_embeddings."""
    limit, factor = config.max_position_embeddings, config.rope_scaling.factor
    length = jnp.maximum(jnp.max(positions) + 1, limit).astype(jnp.float32)
    stretch = factor * length / limit - (factor - 1)
    return config.rope_theta * stretch ** (config.head_dim / (config.head_dim - 2))
