"""Where a LLaMA's parameters and activations live on the mesh.

Two tables: parameter path -> names of its axes, and name -> mesh axes. Embedding and head are
stored split along `embed` over both fsdp and tensor, never along the vocabulary, so vocabularies
of any size are stored unpadded on any mesh.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from easylm.attention import attention
from easylm.errors import InputError
from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.model import Execution, abstract_params
from easylm.sharding import ROW_AXES, partition_spec, tree_shardings

PARAM_AXES = {
    r"embed_tokens/embedding": ("vocab_rows", "stored_embed"),
    r"lm_head/kernel": ("stored_embed", "vocab_rows"),
    r"norm/scale": ("norm",),
    r"layers/(input|post_attention)_layernorm/scale": ("layers", "norm"),
    r"layers/self_attn/q_proj/kernel": ("layers", "embed", "heads", "head_dim"),
    r"layers/self_attn/[kv]_proj/kernel": ("layers", "kv_embed", "kv_heads", "head_dim"),
    r"layers/self_attn/o_proj/kernel": ("layers", "heads", "head_dim", "embed"),
    r"layers/self_attn/q_proj/bias": ("layers", "heads", "head_dim"),
    r"layers/self_attn/[kv]_proj/bias": ("layers", "kv_heads", "head_dim"),
    r"layers/self_attn/o_proj/bias": ("layers", "norm"),
    r"layers/mlp/(gate|up)_proj/kernel": ("layers", "embed", "mlp"),
    r"layers/mlp/down_proj/kernel": ("layers", "mlp", "embed"),
    r"layers/mlp/(gate|up)_proj/bias": ("layers", "mlp"),
    r"layers/mlp/down_proj/bias": ("layers", "norm"),
}


def mesh_rules(config: LlamaConfig, mesh: Mesh, remat: str = "none") -> dict:
    """Logical axis -> mesh axes, for this model on this mesh.

    Where `tensor` exceeds the KV heads, the kernels of K and V are stored split along embed and
    repeated to `tensor` heads when used, one for each shard.
    """
    kv_heads_split = config.num_key_value_heads % mesh.shape["tensor"] == 0
    return {
        # parameters
        "layers": None,
        "embed": "fsdp",
        "stored_embed": ("fsdp", "tensor"),
        "vocab_rows": None,
        "heads": "tensor",
        "head_dim": None,
        "kv_embed": "fsdp" if kv_heads_split else ("fsdp", "tensor"),
        "kv_heads": "tensor" if kv_heads_split else None,
        "mlp": "tensor",
        "norm": None,
        # activations
        "batch": ROW_AXES,
        "seq": None,
        "residual_seq": "tensor" if remat == "block_sharded" else None,
        "table_embed": "tensor",
        "vocab": "tensor",
    }


def check_mesh(config: LlamaConfig, mesh: Mesh) -> None:
    """Refuses a mesh that does not divide the model, naming the sizes that would.

    Raises:
      InputError: as said.
    """
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    if tensor not in tensor_sizes(config):
        works = ", ".join(map(str, tensor_sizes(config)))
        raise InputError(
            f"mesh: found tensor={tensor}, which does not divide the model (attention heads "
            f"{config.num_attention_heads}, KV heads {config.num_key_value_heads}, "
            f"intermediate_size {config.intermediate_size}, hidden_size {config.hidden_size}); "
            f"wanted tensor in {works}"
        )
    if config.hidden_size % (fsdp * tensor):
        columns = config.hidden_size // tensor
        works = ", ".join(str(size) for size in range(1, columns + 1) if columns % size == 0)
        raise InputError(
            f"mesh: found fsdp={fsdp} with tensor={tensor}, whose product does not divide "
            f"hidden_size {config.hidden_size}; wanted fsdp in {works}"
        )


def tensor_sizes(config: LlamaConfig) -> list[int]:
    """The lengths of a tensor axis that divide the model, in order; 1 is the first."""
    kv_heads = config.num_key_value_heads
    split = (config.num_attention_heads, config.intermediate_size, config.hidden_size)
    return [
        size
        for size in range(1, config.num_attention_heads + 1)
        if all(length % size == 0 for length in split)
        and (kv_heads % size == 0 or size % kv_heads == 0)
    ]


def param_shardings(config: LlamaConfig, mesh: Mesh) -> dict:
    """The parameter tree with a NamedSharding for each parameter.

    Raises:
      InputError: the mesh does not divide the model.
    """
    check_mesh(config, mesh)
    return tree_shardings(abstract_params(config), PARAM_AXES, mesh_rules(config, mesh), mesh)


def execution_on(
    config: LlamaConfig,
    mesh: Mesh,
    *,
    compute_dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    attention_backend: str = "auto",
) -> Execution:
    """How `config`'s model runs on `mesh`."""
    rules = mesh_rules(config, mesh, remat)

    def shard(array: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        sharding = NamedSharding(mesh, partition_spec(axes, rules))
        return jax.lax.with_sharding_constraint(array, sharding)

    tensor = mesh.shape["tensor"]
    return Execution(
        compute_dtype=compute_dtype,
        remat=remat,
        attention=functools.partial(attention, backend=attention_backend, mesh=mesh),
        shard=shard,
        kv_replicas=max(1, tensor // config.num_key_value_heads),
        vocab_multiple=tensor,
    )
