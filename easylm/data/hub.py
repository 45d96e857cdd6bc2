"""Hugging Face datasets, saved or of the hub, as the Arrow files that hold their rows."""

from __future__ import annotations

import functools
import json
import re

from easylm import storage
from easylm.data.splits import choose_split
from easylm.errors import InputError

SAVED = {"state.json", "dataset_dict.json"}
_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w.-]*))?")
_FILE_NAME = re.compile(r"\.(jsonl?|gz|parquet|arrow|csv|tsv|txt|zip|zst|bz2|xz)$")


def saved_files(folder: str, split: str | None) -> list[str]:
    """The Arrow files of a folder that `save_to_disk` wrote, local or in a bucket.

    Args:
        folder: of a Dataset, or of a DatasetDict: then of its split `split`, or else `train`.
        split: of a DatasetDict; a Dataset has but the one it was saved from.

    Raises:
        InputError: there is no such split, or the folder is damaged.
    """
    if storage.exists(f"{folder}/dataset_dict.json"):
        splits = _read(f"{folder}/dataset_dict.json", "splits")
        folder = f"{folder}/{choose_split(folder, split, splits)}"
    elif split:
        only = _read(f"{folder}/state.json", "_split")
        choose_split(folder, split, [only] if only else [])
    if _read(f"{folder}/state.json", "_indices_data_files"):
        raise InputError(
            f"{folder}: holds rows and a selection of them, as old versions of datasets wrote it; "
            "load it with load_from_disk and save it again with save_to_disk"
        )
    files = [
        f"{folder}/{file['filename']}" for file in _read(f"{folder}/state.json", "_data_files")
    ]
    for file in files:
        if not storage.exists(file):
            raise InputError(f"{file}: no such file, though state.json beside it names it")
    return files


def _read(path: str, name: str) -> list | str | None:
    text = storage.read_bytes(path)
    try:
        return json.loads(text).get(name)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: no JSON object ({error}); copy the folder again") from error


def is_file_name(name: str) -> bool:
    """Whether a name ends like that of a file of rows."""
    return bool(_FILE_NAME.search(name))


def is_hub_name(name: str) -> bool:
    """Whether a name that is nothing local may be `owner/name[/config]` of the hub."""
    return bool(_NAME.fullmatch(name)) and not is_file_name(name)


@functools.cache  # so that the rows that are read are the rows that were hashed
def hub_files(name: str, split: str | None) -> list[str]:
    """The Arrow files of a dataset of the hub, downloaded and converted where they are not yet.

    Args:
        name: `owner/name` or `owner/name/config`; `HF_ENDPOINT` says of which hub.
        split: or `train`.

    Raises:
        InputError: the hub gives no such dataset, or it has no such split.
    """
    import datasets
    import pyarrow
    from huggingface_hub import errors

    repository, config = _NAME.fullmatch(name).groups()
    try:
        splits = datasets.load_dataset(repository, config)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = _one_line(error.__cause__ or error)
        raise InputError(
            f"{name}: was downloaded, but its files are damaged or do not go together ({cause}); "
            "download them and name those that are good"
        ) from error
    except (
        datasets.exceptions.DatasetsError,
        errors.HfHubHTTPError,
        pyarrow.ArrowException,
        OSError,
        RuntimeError,
        ValueError,
    ) as error:
        raise InputError(
            f"{name}: no such file or folder here, and the Hugging Face hub gave no dataset of "
            f"that name ({_one_line(error)}). Check the spelling (owner/name[/config][:split]), "
            "the network, HF_ENDPOINT, and for a private or gated dataset HF_TOKEN"
        ) from error
    rows = splits[choose_split(name, split, list(splits))]
    return [file["filename"] for file in rows.cache_files]


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
