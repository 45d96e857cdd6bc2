"""Finds out by looking what a path holds, and opens it as a source of tensors."""

import json
import re
from collections.abc import Sequence

from easylm import storage
from easylm.converters import safetensors_io, torch_bin
from easylm.converters.easylm_stream import EasyLMSource
from easylm.converters.msgpack_scan import is_document, is_stream
from easylm.converters.safetensors_io import SafetensorsSource
from easylm.converters.tensors import TensorSource
from easylm.converters.torch_bin import TorchBinSource
from easylm.errors import InputError

_WANTED = (
    "wanted a Hugging Face folder (config.json beside model.safetensors or pytorch_model.bin, or "
    "their shards and index), the name org/name of a model on the Hugging Face hub, a checkpoint "
    "of this program, or an EasyLM file (streaming_params*, streaming_train_state*, flax_params)"
)
_STREAM_NAMES = ("streaming_params", "streaming_train_state")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Repositories hold weights of other formats too, often as large again.
TEXT_FILES = ("*.json", "*.model", "merges.txt", "vocab.txt", "chat_template.jinja")
_SAFETENSORS_FILES = [safetensors_io.SINGLE, "model-*-of-*.safetensors"]
_TORCH_FILES = [torch_bin.SINGLE, "pytorch_model-*-of-*.bin"]


def open_source(path: str, hf_config: str | None = None, unpermuted: bool = False) -> TensorSource:
    """Opens the weights at `path`; only their headers are read.

    Args:
      path: a Hugging Face folder or an EasyLM file, local or gs://, or a model's name on the
        Hugging Face hub (`HF_ENDPOINT` says which), of which only the needed files are downloaded.
      hf_config: config.json, or the folder that holds it, for weights that come without one.
      unpermuted: the EasyLM file holds q and k in Hugging Face's order of rows (Yi).
    Raises:
      InputError: there is nothing of a known kind there, or what is there is damaged.
    """
    if is_on_hub(path):
        path = _download_weights(path)
    elif not storage.exists(path):
        raise describe_unknown(path)
    if not storage.is_folder(path):
        return _open_file(path, hf_config, unpermuted)
    if unpermuted:
        raise InputError(f"{path}: --unpermuted is for EasyLM files; this is a folder")
    return _open_folder(path.rstrip("/"), hf_config)


def _open_folder(folder: str, hf_config: str | None) -> TensorSource:
    files = storage.list_files(folder)
    if files.keys() & {safetensors_io.SINGLE, safetensors_io.INDEX}:
        source = SafetensorsSource
    elif files.keys() & {torch_bin.SINGLE, torch_bin.INDEX}:
        source = TorchBinSource
    else:
        raise describe_unknown(folder)
    config_path = f"{folder}/config.json"
    if "config.json" in files and hf_config:
        raise InputError(
            f"{folder}: has a config.json of its own; --hf_config is for weights without one"
        )
    if hf_config:
        config_path = _config_path(hf_config)
    elif "config.json" not in files:
        raise InputError(
            f"{folder}: has weights but no config.json; wanted one there, or --hf_config=PATH of "
            "the same model's"
        )
    return source(folder, read_config(config_path), config_path)


def _open_file(path: str, hf_config: str | None, unpermuted: bool) -> TensorSource:
    name = path.rpartition("/")[2]
    head = storage.read_range(path, 0, min(16, storage.file_size(path)))
    if _is_pickle(name, head):
        raise InputError(
            f"{path}: a Python pickle, which could run any code; never opened. EasyLM keeps "
            "weights in the streaming_params* or streaming_train_state* file beside it"
        )
    if not (name.startswith(_STREAM_NAMES) or is_stream(head) or is_document(head)):
        raise describe_unknown(path)
    if not hf_config:
        raise InputError(
            f"{path}: an EasyLM file does not say how many heads its model has; wanted "
            "--hf_config=PATH of the config.json of the same model in Hugging Face format"
        )
    config_path = _config_path(hf_config)
    return EasyLMSource(path, read_config(config_path), config_path, unpermuted)


def _is_pickle(name: str, head: bytes) -> bool:
    is_binary = len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5
    return is_binary or name.endswith((".pkl", ".pickle"))


def _config_path(hf_config: str) -> str:
    return f"{hf_config.rstrip('/')}/config.json" if storage.is_folder(hf_config) else hf_config


def read_config(path: str) -> dict:
    """A config.json as it stands. Raises InputError where it is missing or no JSON object."""
    try:
        config = json.loads(storage.read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: found a {type(config).__name__}; wanted a JSON object")
    return config


def describe_unknown(path: str) -> InputError:
    """The error for a path that holds no weights of a known kind: what is there, what is wanted."""
    prefix, colons, rest = path.partition("::")
    if colons:
        return InputError(
            f"{path}: the kind is found by looking; give the path without {prefix}::, as {rest}"
        )
    if not storage.exists(path):
        hint = storage.missing_hint(path)
        return InputError(f"{path}: no such file or folder{hint}; {_WANTED}")
    if storage.is_folder(path):
        return InputError(f"{path}: {_describe_folder(storage.list_files(path))}; {_WANTED}")
    if path.endswith((".safetensors", ".bin")):
        return InputError(f"{path}: weights go with the files beside them; give their folder")
    head = storage.read_range(path, 0, min(16, storage.file_size(path)))
    return InputError(f"{path}: a file of no known kind (it begins {head!r}); {_WANTED}")


def _describe_folder(files: dict[str, int]) -> str:
    if not files:
        return "no files in this folder"
    streams = [name for name in files if name.startswith(_STREAM_NAMES)]
    if streams:
        return f"a folder with EasyLM files; give one of them: {', '.join(streams)}"
    shards = [name for name in files if name.endswith((".safetensors", ".bin"))]
    if shards:
        return f"{len(shards)} weight files ({shards[0]}, ...) without their index file"
    if "config.json" in files:
        return "a folder with config.json but no weights"
    shown = ", ".join(list(files)[:5])
    return f"a folder without config.json and weights (found {shown}{', ...' * (len(files) > 5)})"


def is_on_hub(path: str) -> bool:
    """Whether `path` can only be the name org/name of a model on the Hugging Face hub."""
    return not storage.exists(path) and bool(_HUB_NAME.fullmatch(path))


def download(name: str, patterns: Sequence[str]) -> str:
    """Brings files of a model of the hub to the local cache; returns their folder there.

    Args:
      name: org/name.
      patterns: of the names of the files that are wanted; those that are absent are left out.
    Raises:
      InputError: the hub gives no model of that name, and none is in the cache.
    """
    # It takes a quarter of a second to import, which a local path need not wait for.
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=[*patterns])
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, OSError, ValueError) as error:
        raise InputError(
            f"{name}: no such folder here, and the Hugging Face hub gave no model of that name "
            f"({str(error).strip().splitlines()[0].rstrip('.')}). Check the spelling, the network, "
            "HF_ENDPOINT, and for a private or gated model HF_TOKEN"
        ) from error


def _download_weights(name: str) -> str:
    folder = download(name, [*TEXT_FILES, *_SAFETENSORS_FILES])
    if not storage.list_files(folder).keys() & {safetensors_io.SINGLE, safetensors_io.INDEX}:
        folder = download(name, [*TEXT_FILES, *_TORCH_FILES])
    return folder
