"""LLaMA as flax.nnx modules: one block, compiled once, scanned over the stacked layers.

The modules know sizes and arithmetic. Where arrays live and which attention kernel runs come in
from outside, as the functions of `Execution`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from easylm.attention.reference import reference_attention
from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.rope import apply_rope, rope_angles

REMAT_POLICIES = {
    "none": None,
    # Keeps the results of matrix products with parameters; recomputes the rest.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # Keeps only the residual stream between blocks; the backward pass runs each block again.
    "block": jax.checkpoint_policies.nothing_saveable,
    # The same, and the kept residual is split over the tensor axis (see sharding.py).
    "block_sharded": jax.checkpoint_policies.nothing_saveable,
}


def _stay(array: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    return array


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the forward pass runs, as opposed to what it computes.

    Attributes:
      compute_dtype: of activations and of the parameters they meet.
      logits_dtype: of the logits that `Llama.__call__` returns.
      remat: a name in REMAT_POLICIES.
      attention: (q, k, v, *, positions, segment_ids) -> [batch, seq, heads, head_dim].
      shard: (array, logical axes) -> the array, placed on the mesh.
      kv_replicas: copies of each K/V head, so that every tensor shard owns a whole one.
      vocab_multiple: the head's vocabulary is padded to a multiple of this.
    """

    compute_dtype: DTypeLike = jnp.float32
    logits_dtype: DTypeLike = jnp.float32
    remat: str = "none"
    attention: Callable[..., jax.Array] = reference_attention
    shard: Callable[[jax.Array, tuple[str | None, ...]], jax.Array] = _stay
    kv_replicas: int = 1
    vocab_multiple: int = 1


# (q, k, v of one layer, after RoPE) -> (their attention, what the caller keeps of the layer:
# nothing in training, keys and values when more tokens are to follow).
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Linear(nnx.Module):
    """y = x W + b over the named axes; W is stored float and cast to the compute dtype."""

    def __init__(self, in_shape, out_shape, *, bias: bool, std: float, dtype, rngs: nnx.Rngs):
        shape = (*in_shape, *out_shape)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros(out_shape, dtype)) if bias else None

    def __call__(self, x: jax.Array, equation: str) -> jax.Array:
        y = _multiply(x, self.kernel[...].astype(x.dtype), equation)
        return y if self.bias is None else y + _as_last_axes(self.bias[...], y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply(x: jax.Array, kernel: jax.Array, equation: str) -> jax.Array:
    """jnp.einsum(equation, x, kernel), where [batch, seq] lead x and the result.

    The gradients are those of einsum. Only, autodiff writes that of the kernel as gradient times
    x with two summed axes, for which XLA's CPU backend first writes the wider of the two out
    transposed: a quarter of the time of a small model's step.
    """
    return jnp.einsum(equation, x, kernel)


def _multiply_forward(x, kernel, equation):
    return jnp.einsum(equation, x, kernel), (x, kernel)


def _multiply_backward(equation, saved, gradient):
    x, kernel = saved
    x_axes, kernel_axes, out_axes = re.split(",|->", equation)
    d_x = jnp.einsum(f"{out_axes},{kernel_axes}->{x_axes}", gradient, kernel)
    return d_x, jnp.einsum(f"{x_axes},{out_axes}->{kernel_axes}", x, gradient)


_multiply.defvjp(_multiply_forward, _multiply_backward)


def _as_last_axes(x: jax.Array, like: jax.Array) -> jax.Array:
    """x with leading axes of size 1 up to the rank of `like`, in its dtype."""
    return jnp.expand_dims(x, tuple(range(like.ndim - x.ndim))).astype(like.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32 (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4)."""

    def __init__(self, size: int, eps: float, dtype):
        self.scale = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (normed * _as_last_axes(self.scale[...], normed)).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig, execution: Execution, *, dtype, rngs: nnx.Rngs):
        self.execution = execution
        embed = (config.hidden_size,)
        q_heads = (config.num_attention_heads, config.head_dim)
        kv_heads = (config.num_key_value_heads, config.head_dim)
        bias, std = config.attention_bias, config.initializer_range
        linear = functools.partial(Linear, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.q_proj = linear(embed, q_heads)
        self.k_proj = linear(embed, kv_heads)
        self.v_proj = linear(embed, kv_heads)
        self.o_proj = linear(q_heads, embed)

    def __call__(self, x, cos, sin, attend: Attend):
        """The output, and what `attend` keeps of this layer; see `Attend`."""
        shard, replicas = self.execution.shard, self.execution.kv_replicas
        q = self.q_proj(x, "bse,ehd->bshd")
        k = _project_kv(self.k_proj, x, replicas, shard)
        v = _project_kv(self.v_proj, x, replicas, shard)
        q, k, v = (shard(y, ("batch", "seq", "heads", "head_dim")) for y in (q, k, v))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        out, kept = attend(q, k, v)
        return self.o_proj(out, "bshd,hde->bse"), kept


def _project_kv(proj: Linear, x: jax.Array, replicas: int, shard) -> jax.Array:
    """K or V of every position; where shards outnumber KV heads, each shard gets its own copy.

    The kernel is repeated, not the activations, so a shard multiplies by one head only.
    """
    if replicas == 1:
        return proj(x, "bse,ehd->bshd")
    # Gathered over tensor, repeated, split by heads: in one move the compiler gathers fsdp too.
    kernel = jnp.repeat(shard(proj.kernel[...], ("embed", None, None)), replicas, axis=1)
    kernel = shard(kernel, ("embed", "heads", "head_dim"))
    y = jnp.einsum("bse,ehd->bshd", x, kernel.astype(x.dtype))
    if proj.bias is None:
        return y
    return y + _as_last_axes(jnp.repeat(proj.bias[...], replicas, axis=0), y)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    def __init__(self, config: LlamaConfig, execution: Execution, *, dtype, rngs: nnx.Rngs):
        self.execution = execution
        embed, mlp = (config.hidden_size,), (config.intermediate_size,)
        bias, std = config.mlp_bias, config.initializer_range
        linear = functools.partial(Linear, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.gate_proj = linear(embed, mlp)
        self.up_proj = linear(embed, mlp)
        self.down_proj = linear(mlp, embed)

    def __call__(self, x: jax.Array) -> jax.Array:
        shard = self.execution.shard
        gate = shard(self.gate_proj(x, "bse,em->bsm"), ("batch", "seq", "mlp"))
        up = shard(self.up_proj(x, "bse,em->bsm"), ("batch", "seq", "mlp"))
        return self.down_proj(jax.nn.silu(gate) * up, "bsm,me->bse")


class Block(nnx.Module):
    """One decoder layer, pre-norm."""

    def __init__(self, config: LlamaConfig, execution: Execution, *, dtype, rngs: nnx.Rngs):
        self.execution = execution
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, execution, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, execution, dtype=dtype, rngs=rngs)

    def __call__(self, x, cos, sin, attend: Attend):
        """The next residual, and what `attend` keeps of this layer; see `Attend`."""
        residual = ("batch", "residual_seq", None)
        attended, kept = self.self_attn(self.input_layernorm(x), cos, sin, attend)
        x = self.execution.shard(x + attended, residual)
        x = self.execution.shard(x + self.mlp(self.post_attention_layernorm(x)), residual)
        return x, kept


class Embedding(nnx.Module):
    """The token table, [vocab, embed]."""

    def __init__(self, config: LlamaConfig, *, dtype, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        std = config.initializer_range
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), shape, dtype))


class Llama(nnx.Module):
    """A decoder-only LLaMA of any generation.

    Args:
      config: sizes and constants.
      execution: dtypes, remat, attention and placement.
      dtype: of the parameters made here.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        config: LlamaConfig,
        execution: Execution = Execution(),
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config, self.execution = config, execution

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_layers(rngs):
            return Block(config, execution, dtype=dtype, rngs=rngs)

        self.embed_tokens = Embedding(config, dtype=dtype, rngs=rngs)
        self.layers = make_layers(rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        shapes, std = ((config.hidden_size,), (config.vocab_size,)), config.initializer_range
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(*shapes, bias=False, std=std, dtype=dtype, rngs=rngs)
        )

    def __call__(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array):
        """Logits of every position.

        Args:
          tokens, positions, segment_ids: [batch, seq] int32. Tokens see earlier tokens of their
            own segment; positions rise within a segment; segment 0 is padding.
        Returns:
          [batch, seq, vocab] in the logits dtype.
        """
        return self.logits(self.hidden_states(tokens, positions, segment_ids))

    def hidden_states(self, tokens, positions, segment_ids) -> jax.Array:
        """Final, normed states [batch, seq, embed] in the compute dtype; arguments as above."""
        execution = self.execution
        cos, sin = rope_angles(self.config, positions)
        block, stacked = nnx.split(self.layers)

        def attend(q, k, v):
            out = execution.attention(q, k, v, positions=positions, segment_ids=segment_ids)
            return out, None

        def step(x, layer):
            return nnx.merge(block, layer)(x, cos, sin, attend)

        if execution.remat != "none":
            # Inside a scan nothing can be merged across iterations, so CSE needs no barrier.
            policy = REMAT_POLICIES[execution.remat]
            step = jax.checkpoint(step, policy=policy, prevent_cse=False)
        x, _ = jax.lax.scan(step, self.embed(tokens), stacked)
        return execution.shard(self.norm(x), ("batch", "seq", None))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """The rows [batch, seq, embed] of the token table, in the compute dtype."""
        shard, dtype = self.execution.shard, self.execution.compute_dtype
        # Rows are looked up on every device, so they stay whole and only the columns are split.
        # Cast after the look-up: its gradient sums many rows, which takes float32.
        table = shard(self.embed_tokens.embedding[...], (None, "table_embed"))
        x = shard(table[tokens], ("batch", "seq", "table_embed"))
        return shard(x.astype(dtype), ("batch", "residual_seq", None))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[batch, seq, vocab] in the logits dtype, of hidden states [batch, seq, embed]."""
        dtype = self.execution.logits_dtype
        logits = jnp.einsum("bse,ev->bsv", hidden, self.head(), preferred_element_type=dtype)
        return logits[..., : self.config.vocab_size]

    def head(self) -> jax.Array:
        """The output matrix [embed, padded vocab] in the compute dtype.

        Columns from config.vocab_size on are zeros that make the vocabulary divide the mesh;
        whoever normalises over the vocabulary must leave them out.
        """
        if self.lm_head is None:
            kernel = self.embed_tokens.embedding[...].T
        else:
            kernel = self.lm_head.kernel[...]
        padding = -self.config.vocab_size % self.execution.vocab_multiple
        kernel = jnp.pad(kernel.astype(self.execution.compute_dtype), ((0, 0), (0, padding)))
        # In two moves, a gather over fsdp and an exchange over tensor: asked for in one, the
        # compiler gathers the whole matrix on every device.
        kernel = self.execution.shard(kernel, ("table_embed", None))
        return self.execution.shard(kernel, (None, "vocab"))


def init_params(config: LlamaConfig, key: jax.Array, dtype: DTypeLike = jnp.float32) -> dict:
    """Random parameters, as the nested dict that checkpoints and converters speak of.

    Kernels and embeddings are normal with `initializer_range`, norms one, biases zero, as in
    Hugging Face. Run it under jit with out_shardings to make them on the mesh.
    """
    return nnx.to_pure_dict(nnx.state(Llama(config, dtype=dtype, rngs=nnx.Rngs(params=key))))


def abstract_params(config: LlamaConfig, dtype: DTypeLike = jnp.float32) -> dict:
    """The tree of `init_params` as jax.ShapeDtypeStruct; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))


def count_parameters(config: LlamaConfig) -> int:
    """The number of parameters of a model."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def graph_definition(config: LlamaConfig, execution: Execution = Execution()) -> nnx.GraphDef:
    """The static half of the model: `nnx.merge(graph_definition(...), params)` is a Llama."""
    model = nnx.eval_shape(lambda: Llama(config, execution, rngs=nnx.Rngs(params=0)))
    return nnx.graphdef(model)


def logits(params, config, tokens, positions, segment_ids, execution=Execution()) -> jax.Array:
    """[batch, seq, vocab] logits of `params`; a shorthand for merge and call."""
    return nnx.merge(graph_definition(config, execution), params)(tokens, positions, segment_ids)
