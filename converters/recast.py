"""A source of tensors straight into a Hugging Face folder; nothing is stacked or kept."""

from collections.abc import Iterator, Mapping

import numpy as np
from jax.typing import DTypeLike

from easylm.converters.export import EXPORT_DTYPES, write_model
from easylm.converters.llama import EMBEDDING, HEAD, check_tensors, rules
from easylm.converters.load import grow_rows, say_growth, source_config
from easylm.converters.tensors import TensorSource
from easylm.errors import InputError
from easylm.models.llama.config import LlamaConfig


def recast(
    source: TensorSource,
    config: LlamaConfig,
    target: str,
    *,
    dtype: str,
    files: Mapping[str, bytes],
) -> None:
    """Writes `source` as a Hugging Face folder, two of its tensors in memory at a time.

    Args:
      source: the tensors, under Hugging Face's names.
      config: sizes of the model; a larger vocabulary than the source's as for `load_params`.
      target: a new folder, local or gs://.
      dtype: of the files, "float32" or "bfloat16".
      files: name → content, written beside the weights, in place of those made here.
    Raises:
      InputError: as `load_params` and `export_leaves`; nothing is left behind then.
    """
    own_config = source_config(source, config)
    check_tensors(own_config, source.tensors, source.folder)
    say_growth(source.folder, own_config.vocab_size, config.vocab_size)
    write_model(
        _tensors(source, own_config, config.vocab_size - own_config.vocab_size, dtype),
        config,
        target,
        dtype=dtype,
        files=files,
        where=source.folder,
        progress=True,
    )


def _tensors(
    source: TensorSource, config: LlamaConfig, new_rows: int, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    to_dtype = EXPORT_DTYPES[dtype]
    if config.tie_word_embeddings and HEAD in source.tensors:
        _require_tied(source)
    for rule in rules(config):
        for name in rule.hf_names():
            rows = new_rows if name in (EMBEDDING, HEAD) else 0
            yield name, _recast_one(source.read(name), rows, to_dtype)


def _recast_one(tensor: np.ndarray, new_rows: int, dtype: DTypeLike) -> np.ndarray:
    if new_rows:
        return np.asarray(grow_rows(tensor, new_rows, dtype))
    return tensor.astype(dtype, copy=False)


def _require_tied(source: TensorSource) -> None:
    if not np.array_equal(source.read(EMBEDDING), source.read(HEAD)):
        raise InputError(
            f"{source.folder}: tensor {HEAD} differs from {EMBEDDING}, but config.json says "
            "tie_word_embeddings"
        )
