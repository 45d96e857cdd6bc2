"""Models to start from or convert, of any kind this project reads, behind one small interface.

Opening reads headers and sizes alone, and jax loads only where the weights are a native checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from tqdm import tqdm

from easylm import storage
from easylm.converters import safetensors_io, torch_bin
from easylm.converters.easylm_stream import EasyLMSource
from easylm.converters.llama import check_tensors
from easylm.converters.sources import TEXT_FILES, download, open_source, read_config
from easylm.converters.tensors import BFLOAT16, TensorSource
from easylm.errors import InputError
from easylm.models.llama.config import LlamaConfig
from easylm.tokenizer import load_tokenizer, load_tokenizer_files, tokenizer_files_in

if TYPE_CHECKING:
    import jax.numpy as jnp
    from transformers import PreTrainedTokenizerFast

_HF_WEIGHTS = {safetensors_io.SINGLE, safetensors_io.INDEX, torch_bin.SINGLE, torch_bin.INDEX}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What is known of a model without its weights.

    Attributes:
      kind: what it is, for people.
      where: its place, for messages.
      config: its sizes.
      tokenizer_files: of the tokenizer that came with it, name -> content; empty if none did.
    """

    kind: str
    where: str
    config: LlamaConfig
    tokenizer_files: dict[str, bytes]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that came with it, as it came: with a chat template only if it has one.

        Raises:
          InputError: none came, or it is none that this project can read.
        """
        files = self.tokenizer_files
        if not files:
            raise InputError(
                f"{self.where}: no tokenizer came with these weights (wanted tokenizer.json or "
                "tokenizer.model); name one with data.tokenizer"
            )
        if "tokenizer.json" not in files and "tokenizer.model" in files:
            return load_tokenizer(f"{self.where}/tokenizer.model", chat_template=None)
        return load_tokenizer_files(files, self.where)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights(Description):
    """A model somewhere on a disk, in a bucket or on the hub, not yet read.

    Attributes:
      dtype: "bfloat16" if all its tensors are, else "float32".
      run_config: of the run that trained it; None where that is not known.
      load: (config, shardings, dtype) -> parameters on the mesh; a config with a larger
        vocabulary gets rows that are the mean of the old ones.
      export: (config, target, dtype, tokenizer files, model card) writes a Hugging Face folder, a
        tensor or a stacked parameter in memory at a time; the config as for `load`.
    """

    dtype: str
    run_config: dict | None
    load: Callable[[LlamaConfig, dict, jnp.dtype], dict]
    export: Callable[[LlamaConfig, str, str, dict[str, bytes], str], None]


def open_weights(path: str, *, hf_config: str = "", unpermuted: bool = False) -> Weights:
    """Finds out what `path` holds.

    Args:
      path: a native checkpoint (a workdir, its checkpoints folder or one step), the hf folder of
        a run, of whose exports it means the newest complete one, or anything that `open_source`
        takes.
      hf_config: config.json, or its folder, of weights that come without one.
      unpermuted: see `open_source`.
    Raises:
      InputError: nothing of a known kind is there, it is damaged, or no LLaMA.
    """
    export = _newest_export(path)
    if export is not None:
        weights = _from_source(open_source(export, hf_config or None, unpermuted))
        return dataclasses.replace(weights, kind=f"{weights.kind}, newest in {export}")
    step_folder = _find_native(path)
    if step_folder is None:
        return _from_source(open_source(path, hf_config or None, unpermuted))
    if hf_config or unpermuted:
        raise InputError(
            f"{path}: a native checkpoint, which has its config and one order of rows; leave out "
            "hf_config and unpermuted"
        )
    return _from_native(step_folder)


def describe_on_hub(name: str) -> Description:
    """What the hub says of a model; its weights stay there.

    Args:
      name: org/name; see `is_on_hub`.
    Raises:
      InputError: there is no such model, or it is no LLaMA.
    """
    folder = download(name, TEXT_FILES)
    return Description(
        kind="on the Hugging Face hub, weights not downloaded",
        where=folder,
        config=LlamaConfig.from_hf(read_config(f"{folder}/config.json"), f"{name}/config.json"),
        tokenizer_files=tokenizer_files_in(folder),
    )


def _newest_export(path: str) -> str | None:
    """The newest complete hf/STEP where `path` is the hf of a run that exported every so often."""
    if not storage.is_folder(path) or storage.list_files(path).keys() & _HF_WEIGHTS:
        return None
    path = path.rstrip("/")
    steps = [name for name in storage.list_folders(path) if name.isdecimal()]
    complete = [s for s in steps if storage.exists(f"{path}/{s}/{storage.COMPLETE}")]
    return f"{path}/{max(complete, key=int)}" if complete else None


def _find_native(path: str) -> str | None:
    if not storage.is_folder(path) or storage.list_files(path).keys() & _HF_WEIGHTS:
        return None
    # Its libraries take seconds to import, which other weights need not wait for.
    from easylm.checkpoint import find_checkpoint

    return find_checkpoint(path)


def _from_source(source: TensorSource) -> Weights:
    folder = source.folder or "."
    config = LlamaConfig.from_hf(source.config, source.config_path)
    check_tensors(config, source.tensors, folder)

    def load(wanted, shardings, dtype):
        from easylm.converters.load import load_params

        return load_params(source, wanted, shardings, dtype)

    def export(wanted, target, dtype, tokenizer_files, model_card):
        from easylm.converters.recast import recast

        files = tokenizer_files
        # An EasyLM file lies in a folder of its own; the config's may be of the base model.
        if not isinstance(source, EasyLMSource):
            kept = storage.list_files(folder).keys() & {"README.md", "generation_config.json"}
            files = files | {name: storage.read_bytes(f"{folder}/{name}") for name in kept}
        files = {"README.md": model_card.encode(), **files}
        recast(source, wanted, target, dtype=dtype, files=files)

    all_bfloat16 = all(info.dtype == BFLOAT16 for info in source.tensors.values())
    return Weights(
        kind=source.kind,
        where=folder,
        config=config,
        dtype="bfloat16" if all_bfloat16 else "float32",
        run_config=None,
        tokenizer_files=tokenizer_files_in(folder),
        load=load,
        export=export,
    )


def _from_native(step_folder: str) -> Weights:
    import jax

    from easylm.checkpoint import abstract_params_in, read_bundle, tokenizer_files_of
    from easylm.converters import native

    bundle = read_bundle(step_folder)
    config = LlamaConfig.from_hf(bundle["model_config"], f"{step_folder}/bundle")
    arrays = jax.tree.leaves(abstract_params_in(step_folder))
    size = sum(array.size * array.dtype.itemsize for array in arrays)

    def load(wanted, shardings, dtype):
        return native.load_native(step_folder, config, wanted, shardings, dtype)

    def export(wanted, target, dtype, tokenizer_files, model_card):
        native.export_native(
            step_folder, config, wanted, target,
            dtype=dtype, tokenizer_files=tokenizer_files, model_card=model_card,
        )  # fmt: skip

    return Weights(
        kind=f"native checkpoint {step_folder}, {tqdm.format_sizeof(size)}B of weights",
        where=step_folder,
        config=config,
        dtype="bfloat16" if all(array.dtype == BFLOAT16 for array in arrays) else "float32",
        run_config=bundle["run_config"],
        tokenizer_files=tokenizer_files_of(bundle),
        load=load,
        export=export,
    )
