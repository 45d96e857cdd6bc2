"""Rows of TensorFlow Datasets that are prepared as ArrayRecord files; needs no TensorFlow."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from easylm import storage
from easylm.data.plain import plain_row
from easylm.data.splits import choose_split
from easylm.data.turns import Problem, Values
from easylm.errors import InputError

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

DESCRIPTION = {"dataset_info.json", "features.json"}
_NAME = re.compile(r"(\w+(?:/[\w.-]+)?(?::\d+\.\d+\.\d+)?)(?::([\w.-]+))?")


def find_builder(path: str) -> tuple[str, str | None]:
    """The folder and split of `tfds:NAME[/CONFIG][:VERSION][:split]`.

    Raises:
        InputError: it is not prepared where TFDS keeps datasets, `~/tensorflow_datasets` or
            `TFDS_DATA_DIR`.
    """
    found = _NAME.fullmatch(path.removeprefix("tfds:"))
    if not found:
        raise InputError(f"{path}: wanted tfds:NAME[/CONFIG][:VERSION][:split]")
    from tensorflow_datasets.core import read_only_builder, registered

    try:
        return str(read_only_builder.builder_from_files(found[1]).data_dir), found[2]
    except registered.DatasetNotFoundError as error:
        causes = " ".join(str(error).split())
        raise InputError(
            f"{path}: not prepared here. {causes}. TFDS_DATA_DIR says where to look; "
            f"`tfds build {found[1]} --file_format=array_record` prepares it where TensorFlow is"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def tfds_files(folder: str, split: str | None) -> list[str]:
    """The files that make the rows of a split, or of `train`; `folder` may be in a bucket.

    Raises:
        InputError: the folder is damaged, a file is missing, or there is no such split.
    """
    with _on_disk(folder, DESCRIPTION) as local:
        splits = _builder(local, folder).info.splits
        names = splits[choose_split(folder, split, list(splits))].filenames
    missing = [name for name in names if not storage.exists(f"{folder}/{name}")]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(names)} files are missing, the first is {missing[0]}"
        )
    return [f"{folder}/{name}" for name in ("features.json", *names)]


def read_tfds(folder: str, split: str | None, path: str) -> Values:
    """Reads the rows of a split, or of `train`; a folder in a bucket is copied to disk meanwhile.

    `where` is `path:row N`, N from 1: `path` is what the user calls the split.

    Raises:
        InputError: as `tfds_files`, or the files are not ArrayRecord or are damaged.
    """
    names = {os.path.basename(file) for file in tfds_files(folder, split)} | DESCRIPTION
    with _on_disk(folder, names) as local:
        yield from _read(_builder(local, folder), split or "train", path)


def _read(builder: DatasetBuilder, split: str, path: str) -> Values:
    from google.protobuf.message import DecodeError

    try:
        source = builder.as_data_source(split=split)
        for i in range(len(source)):
            where = f"{path}:row {i + 1}"
            try:
                yield where, *plain_row(source[i])
            except (DecodeError, ValueError, KeyError) as error:
                found = " ".join(str(error).split())
                yield where, None, Problem("unreadable record", "row", found, "all its features")
    except NotImplementedError as error:
        raise InputError(
            f"{path}: is prepared as {builder.info.file_format.value}, which TensorFlow alone "
            "reads; prepare it again with --file_format=array_record"
        ) from error
    except (RuntimeError, IndexError) as error:
        raise InputError(f"{path}: cannot be read ({error}); copy or prepare it again") from error


def _builder(local: str, folder: str) -> DatasetBuilder:
    import tensorflow_datasets
    from google.protobuf import json_format

    try:
        return tensorflow_datasets.builder_from_directory(local)
    except (json_format.Error, ValueError, KeyError) as error:
        cause = str(error).splitlines()[0]
        raise InputError(
            f"{folder}: dataset_info.json or features.json is damaged ({cause}); copy it again"
        ) from error


@contextlib.contextmanager
def _on_disk(folder: str, names: Iterable[str]) -> Iterator[str]:
    """The folder itself, or a temporary copy of these files of one in a bucket."""
    if not storage.is_bucket(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as local:
        for name in names:
            storage.copy_to_disk(f"{folder}/{name}", os.path.join(local, name))
        yield local
