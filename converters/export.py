"""Parameters to a Hugging Face folder, one tensor in memory at a time."""

import contextlib
import functools
import json
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from easylm import storage
from easylm.converters.llama import Rule, rules
from easylm.converters.safetensors_io import SafetensorsWriter
from easylm.converters.tensors import contiguous, has_nonfinite, refuse
from easylm.models.llama.config import LlamaConfig

EXPORT_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

Leaf = jax.Array | np.ndarray
GetLeaf = Callable[[tuple[str, ...]], Leaf]


def export_hf(
    params: dict,
    config: LlamaConfig,
    target: str,
    *,
    dtype: str,
    tokenizer_files: Mapping[str, bytes],
    model_card: str,
    progress: bool = True,
) -> None:
    """Writes a model's folder from its parameters; see `export_leaves`.

    Args:
      params: jax or numpy arrays, on any mesh.
    """
    export_leaves(
        lambda path: functools.reduce(operator.getitem, path, params),
        config,
        target,
        dtype=dtype,
        tokenizer_files=tokenizer_files,
        model_card=model_card,
        progress=progress,
    )


def export_leaves(
    get_leaf: GetLeaf,
    config: LlamaConfig,
    target: str,
    *,
    dtype: str,
    tokenizer_files: Mapping[str, bytes],
    model_card: str,
    progress: bool = True,
) -> None:
    """Writes a model's folder: safetensors of at most 5 GB, configs, tokenizer, card, COMPLETE.

    Every process calls this; process 0 writes. A host holds two Hugging Face tensors beside the
    one leaf that `get_leaf` returned last.

    Args:
      get_leaf: path in the native tree → that parameter. Each is asked for once and dropped before
        the next, so it may be loaded only then.
      config: sizes of the model.
      target: a new folder, local or gs://.
      dtype: of the files, "float32" or "bfloat16".
      tokenizer_files: name → content.
      model_card: the README.md.
      progress: whether process 0 shows a bar.
    Raises:
      InputError: the target exists or cannot be written, or parameters are not finite in `dtype`
        (all are listed), which shows only once all are written. The whole folder is removed then,
        and when `get_leaf` raises.
    """
    to_dtype = EXPORT_DTYPES[dtype]
    write_model(
        export_tensors(rules(config), get_leaf, to_dtype),
        config,
        target,
        dtype=dtype,
        files={"README.md": model_card.encode(), **tokenizer_files},
        where=target,
        progress=progress,
    )


def write_model(
    tensors: Iterable[tuple[str, np.ndarray]],
    config: LlamaConfig,
    target: str,
    *,
    dtype: str,
    files: Mapping[str, bytes],
    where: str,
    progress: bool,
) -> None:
    """Writes a model's folder from Hugging Face's tensors; see `export_leaves`.

    Args:
      tensors: (name, array of dtype), in the order of `rules` and, within one, of layers.
      files: name → content, written beside the weights, in place of those made here.
      where: the tensors come from, for messages.
    """
    to_dtype = EXPORT_DTYPES[dtype]
    plan = [(name, rule.hf_shape, to_dtype) for rule in rules(config) for name in rule.hf_names()]
    is_writer = jax.process_index() == 0
    bad = []
    with contextlib.ExitStack() as stack:
        if is_writer:
            folder = stack.enter_context(storage.write_folder(target))
            writer = stack.enter_context(SafetensorsWriter(folder, plan))
        bar = stack.enter_context(
            tqdm(
                total=sum(math.prod(shape) for _, shape, _ in plan) * to_dtype.itemsize,
                desc="export",
                unit="B",
                unit_scale=True,
                disable=not progress or not is_writer,
            )
        )
        # All processes look at all values, so that all raise the same error.
        for name, array in tensors:
            if has_nonfinite(array):
                bad.append(f"tensor {name} holds values that are not finite in {dtype}")
            if is_writer:
                writer.write(name, contiguous(array))
            bar.update(array.nbytes)
        refuse(bad, where)
        if is_writer:
            for name, content in {**_config_files(config, dtype), **files}.items():
                storage.write_bytes(f"{folder}/{name}", content)


def export_tensors(
    model: Sequence[Rule], get_leaf: GetLeaf, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face's tensors by name, parameter by parameter and, within one, layer by layer.

    Yields views with any strides; each is dropped before the next is made.
    """
    for rule in model:
        leaf = get_leaf(rule.path)
        for layer, name in enumerate(rule.hf_names()):
            yield name, rule.to_hf(_fetch(leaf, None if rule.num_layers is None else layer, dtype))
        del leaf


def _fetch(leaf: Leaf, layer: int | None, dtype: np.dtype) -> np.ndarray:
    """One layer of a stacked parameter, or all of another, on this host in `dtype`."""
    if isinstance(leaf, np.ndarray):
        return (leaf if layer is None else leaf[layer]).astype(dtype, copy=False)
    if leaf.is_fully_addressable:
        sharding = None
    else:
        sharding = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return np.asarray(_slicer(layer is None, dtype, sharding)(leaf, layer or 0))


@functools.cache
def _slicer(whole: bool, dtype: np.dtype, sharding: NamedSharding | None) -> Callable:
    return jax.jit(
        lambda leaf, layer: (leaf if whole else leaf[layer]).astype(dtype), out_shardings=sharding
    )


def _config_files(config: LlamaConfig, dtype: str) -> dict[str, bytes]:
    hf = config.to_hf(dtype)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {"_from_model_config": True} | {
        name: hf[name] for name in ids if hf[name] is not None
    }
    return {"config.json": _json(hf), "generation_config.json": _json(generation)}


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
