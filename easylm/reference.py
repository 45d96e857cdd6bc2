"""Log-probabilities of the reference model, kept by what the pairs are, not by where they stand."""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import os
import secrets
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from easylm import storage
from easylm.errors import InputError

# A part in a bucket is a few slow requests, so several are read side by side.
_THREADS = 8


@dataclass(frozen=True, eq=False)
class ReferenceTable:
    """What the reference model gives the two answers of each pair; sorted by id when made.

    Equal ids are equal pairs, so the first entry of an id is kept and any other is left out.

    Attributes:
        ids: of the pairs, uint64 `[pairs]`, rising.
        chosen: log-probabilities of the chosen answers, in nats, summed over the scored tokens;
            float32 `[pairs]`.
        rejected: the same of the rejected answers.

    Raises:
        FloatingPointError: a log-probability is not finite.
        ValueError: arrays of other types, or of different lengths.
    """

    ids: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    def __post_init__(self):
        _require_ids(self.ids)
        for values in (self.chosen, self.rejected):
            if values.dtype != np.float32 or values.shape != self.ids.shape:
                raise ValueError(
                    f"log-probabilities {values.dtype}{values.shape}; wanted "
                    f"float32{self.ids.shape}, one for each id"
                )
        wrong = np.count_nonzero(~np.isfinite(self.chosen) | ~np.isfinite(self.rejected))
        if wrong:
            raise FloatingPointError(
                f"the reference model gives {wrong} of {len(self.ids)} pairs a log-probability "
                "that is not finite; wanted a model whose weights and outputs are"
            )
        ids, first = np.unique(self.ids, return_index=True)
        for name, values in (
            ("ids", ids),
            ("chosen", self.chosen[first]),
            ("rejected", self.rejected[first]),
        ):
            object.__setattr__(self, name, values)

    @classmethod
    def union(cls, tables: Iterable[ReferenceTable]) -> ReferenceTable:
        """The pairs of all; one that is in several keeps what the first of them says."""
        tables = [cls.empty(), *tables]
        return cls(
            np.concatenate([table.ids for table in tables]),
            np.concatenate([table.chosen for table in tables]),
            np.concatenate([table.rejected for table in tables]),
        )

    @classmethod
    def empty(cls) -> ReferenceTable:
        """The table without a pair."""
        nothing = np.empty(0, np.float32)
        return cls(np.empty(0, np.uint64), nothing, nothing)

    def __len__(self) -> int:
        return len(self.ids)

    def has(self, ids: np.ndarray) -> np.ndarray:
        """Which pairs are here; ids uint64 `[n]` in any order -> bool `[n]`."""
        _require_ids(ids)
        return np.isin(ids, self.ids)

    def lookup(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(chosen, rejected), float32 `[n]` each, of the pairs `ids`, uint64 `[n]` in any order.

        Raises:
            InputError: some are not here.
        """
        missing = ids[~self.has(ids)]
        if len(missing):
            raise InputError(
                f"{len(missing):,} of {len(ids):,} pairs have no reference log-probabilities (the "
                f"first has the id {missing[0]:016x}); wanted the pairs they were computed for"
            )
        places = np.searchsorted(self.ids, ids)
        return self.chosen[places], self.rejected[places]

    def merge(self, other: ReferenceTable) -> ReferenceTable:
        """The pairs of both; one that is in both keeps what this table says."""
        return ReferenceTable.union([self, other])

    def without(self, other: ReferenceTable) -> ReferenceTable:
        """The pairs that `other` does not have."""
        new = ~other.has(self.ids)
        return ReferenceTable(self.ids[new], self.chosen[new], self.rejected[new])

    def save(self, path: str) -> None:
        """Writes one .npz file, local or gs://; it is whole or absent, and replaces another.

        Equal tables give equal bytes.

        Args:
            path: of the file; its folder is made where it is missing.

        Raises:
            InputError: the disk or the bucket refuses.
        """
        _write_whole(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes."""
        arrays = {"ids": self.ids, "chosen": self.chosen, "rejected": self.rejected}
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    @classmethod
    def load(cls, path: str) -> ReferenceTable:
        """Reads the table that `save` wrote.

        Raises:
            InputError: the file is missing, cannot be read, or is damaged.
        """
        return cls.from_bytes(storage.read_bytes(path), path)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> ReferenceTable:
        """The table that `to_bytes` made.

        Args:
            data: its bytes.
            where: they come from, for messages.

        Raises:
            InputError: they are damaged.
        """
        try:
            # numpy may trip over a damaged header before it sees the checksum.
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"the checksum of {damaged} is wrong")
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                return cls(arrays["ids"], arrays["chosen"], arrays["rejected"])
        except _DAMAGE as error:
            raise InputError(
                f"{where}: the stored reference log-probabilities are damaged ({error})"
            ) from error


# RuntimeError is zipfile's word for features that no file of ours uses.
_DAMAGE = (
    zipfile.BadZipFile,
    EOFError,
    FloatingPointError,
    KeyError,
    RuntimeError,
    ValueError,
)


class ReferenceParts:
    """Tables in a folder, one a piece of a long computation, so that it can go on after a stop.

    Several processes, and several runs, may add to one folder and read it at once.

    Args:
        folder: local or gs://; need not exist.
    """

    def __init__(self, folder: str):
        self._folder = folder.rstrip("/")

    def add(self, name: str, table: ReferenceTable) -> None:
        """Keeps a table under a name, in place of another of that name.

        Args:
            name: of a file, without its ending. Whoever uses one name must mean the same pairs.
            table: what is kept.

        Raises:
            InputError: the disk or the bucket refuses.
        """
        table.save(f"{self._folder}/{name}.npz")

    def load(self) -> ReferenceTable:
        """All parts as one table; of a pair in several, the part whose name sorts first counts.

        Raises:
            InputError: a part cannot be read, or is damaged.
        """
        paths = [f"{self._folder}/{name}" for name in self._names()]
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
            return ReferenceTable.union(threads.map(_load_part, paths))

    def _names(self) -> list[str]:
        if not storage.is_folder(self._folder):
            return []
        if storage.is_bucket(self._folder):
            names: Iterable[str] = storage.list_files(self._folder)
        else:
            # Not by `list_files`, which looks at each file: those being written vanish meanwhile.
            with storage.explained(self._folder):
                names = os.listdir(os.path.expanduser(self._folder))
        return sorted(name for name in names if name.endswith(".npz"))


def _load_part(path: str) -> ReferenceTable:
    try:
        return ReferenceTable.load(path)
    except InputError as error:
        raise InputError(f"{error}; delete this file, and what it held is computed again") from None


def _require_ids(ids: np.ndarray) -> None:
    # numpy compares signed with unsigned integers as float64, which takes different ids for equal.
    if ids.dtype != np.uint64 or ids.ndim != 1:
        raise ValueError(f"ids {ids.dtype}{ids.shape}; wanted uint64, one axis")


def _write_whole(path: str, data: bytes) -> None:
    """Writes a file that nobody sees before it is whole; its folder is made where missing."""
    if storage.is_bucket(path):
        storage.write_bytes(path, data)
        return
    path = os.path.abspath(os.path.expanduser(path))
    folder, name = os.path.split(path)
    beside = f"{folder}/.{name}.{secrets.token_hex(4)}.incomplete"
    with storage.explained(path), contextlib.ExitStack() as undo:
        os.makedirs(folder, exist_ok=True)
        with open(beside, "xb") as file:
            undo.callback(os.remove, beside)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        undo.pop_all()
