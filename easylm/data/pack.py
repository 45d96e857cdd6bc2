"""Which examples share a row. Pure functions of lengths, seed and epoch; no example is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Rows of example ids.

    Attributes:
        ids: int32 `[examples]`, the examples in the order in which the rows hold them.
        starts: int64 `[rows + 1]`; row r holds `ids[starts[r]:starts[r + 1]]`.
    """

    ids: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> np.ndarray:
        """The example ids of one row, in their order in the row."""
        return self.ids[self.starts[index] : self.starts[index + 1]]

    @classmethod
    def concatenate(cls, plans: Sequence[Plan]) -> Plan:
        """The rows of one plan after those of another."""
        sizes = np.concatenate([np.diff(plan.starts) for plan in plans])
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return cls(np.concatenate([plan.ids for plan in plans]), starts)


def one_per_row(examples: int, seed: int, epoch: int) -> Plan:
    """Every example in a row of its own, shuffled.

    Args:
        examples: how many there are.
        seed: of the run.
        epoch: every epoch has its own order.
    """
    ids = shuffled(examples, seed, epoch).astype(np.int32)
    return Plan(ids, np.arange(examples + 1, dtype=np.int64))


def shuffled(examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch takes its examples, int64 `[examples]`."""
    return _rng(seed, epoch).permutation(examples)


def pack(lengths: np.ndarray, seq_len: int, seed: int, epoch: int) -> Plan:
    """Packs examples into rows of `seq_len`: best fit in shuffled order, then the rows shuffled.

    Each example goes to the fullest row that has room for it, so what shares a row is chance and
    changes with the epoch.

    Args:
        lengths: int `[examples]`, tokens of each example.
        seq_len: tokens of a row.
        seed: of the run.
        epoch: every epoch has its own packing.

    Raises:
        ValueError: a length is not between 1 and `seq_len`.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= seq_len:
        raise ValueError(
            f"lengths between {lengths.min()} and {lengths.max()}; wanted 1 to {seq_len}"
        )
    rng = _rng(seed, epoch)
    order = rng.permutation(len(lengths))  # the first numbers drawn: `shuffled` gives the same
    row_of = _best_fit(lengths[order].tolist(), seq_len)
    rows = int(row_of.max(initial=-1)) + 1
    place = rng.permutation(rows)[row_of]
    # A stable sort keeps the shuffled order within a row.
    ids = order[np.argsort(place, kind="stable")].astype(np.int32)
    starts = np.zeros(rows + 1, np.int64)
    np.cumsum(np.bincount(place, minlength=rows), out=starts[1:])
    return Plan(ids, starts)


def most_in_row(lengths: np.ndarray, seq_len: int) -> int:
    """How many examples at most fit into a row, whatever the packing: the shortest ones.

    Args:
        lengths: int `[examples]`, tokens of each example, none above `seq_len`.
        seq_len: tokens of a row.
    """
    return int(np.searchsorted(np.cumsum(np.sort(lengths)), seq_len, side="right"))


def _best_fit(lengths: list[int], seq_len: int) -> np.ndarray:
    """The row of each length, int64 `[lengths]`.

    `with_room[r]` are the rows with room for r more tokens. Bit r of `rooms` says that there are
    some, so that the least sufficient room is the lowest bit from the length on: one operation
    on a whole number of `seq_len` bits, instead of a search through rows.
    """
    with_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    rooms = 0
    rows = 0
    row_of = np.empty(len(lengths), np.int64)
    for index, length in enumerate(lengths):
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = seq_len, rows
            rows += 1
        row_of[index] = row
        left = room - length
        if left:
            if not with_room[left]:
                rooms |= 1 << left
            with_room[left].append(row)
    return row_of


def _rng(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch])
