"""Native checkpoints onto a mesh, or parameter by parameter into a Hugging Face folder."""

from collections.abc import Mapping

import jax
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from easylm.checkpoint import read_params
from easylm.converters.export import export_leaves
from easylm.converters.load import grow_rows, say_growth
from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.model import abstract_params

# Parameters with a row or column for each word, and which axis that is.
_VOCABULARY_AXES = {("embed_tokens", "embedding"): 0, ("lm_head", "kernel"): 1}


def load_native(
    step_folder: str, stored: LlamaConfig, config: LlamaConfig, shardings: dict, dtype: DTypeLike
) -> dict:
    """The parameters of a checkpoint, restored straight into their places on the mesh.

    Args:
      step_folder: of the checkpoint.
      stored: its sizes.
      config: the sizes wanted: the same, or a larger vocabulary, whose new rows of embedding and
        head are the mean of the old ones.
      shardings: a NamedSharding for each parameter.
      dtype: of the result.
    Raises:
      InputError: the checkpoint is damaged, or the vocabulary is smaller than its own.
    """
    say_growth(step_folder, stored.vocab_size, config.vocab_size)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract_params(stored, dtype),
        shardings,
    )
    params = read_params(step_folder, abstract)
    for part, key in _VOCABULARY_AXES:
        if part in params:
            new_rows = config.vocab_size - stored.vocab_size
            params[part][key] = _grow((part, key), params[part][key], new_rows)
    return params


def export_native(
    step_folder: str,
    stored: LlamaConfig,
    config: LlamaConfig,
    target: str,
    *,
    dtype: str,
    tokenizer_files: Mapping[str, bytes],
    model_card: str,
) -> None:
    """Writes a checkpoint as a Hugging Face folder, one of its parameters in memory at a time.

    Args and errors are those of `load_native` and `export_leaves`.
    """
    say_growth(step_folder, stored.vocab_size, config.vocab_size)
    shapes = abstract_params(stored, dtype)
    device = SingleDeviceSharding(jax.devices()[0])

    def get_leaf(path: tuple[str, ...]) -> jax.Array:
        leaf = shapes
        for key in path:
            leaf = leaf[key]
        tree = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        for key in reversed(path):
            tree = {key: tree}
        leaf = read_params(step_folder, tree)
        for key in path:
            leaf = leaf[key]
        return _grow(path, leaf, config.vocab_size - stored.vocab_size)

    export_leaves(
        get_leaf,
        config,
        target,
        dtype=dtype,
        tokenizer_files=tokenizer_files,
        model_card=model_card,
    )


def _grow(path: tuple[str, ...], leaf: jax.Array, new_rows: int) -> jax.Array:
    if not new_rows or path not in _VOCABULARY_AXES:
        return leaf
    axis = _VOCABULARY_AXES[path]

    def grow(leaf):
        rows = leaf.swapaxes(0, axis)
        return grow_rows(rows, new_rows, leaf.dtype).swapaxes(0, axis)

    # No mesh axis divides the vocabulary, so the place of a parameter also fits a longer one.
    return jax.jit(grow, out_shardings=leaf.sharding)(leaf)
