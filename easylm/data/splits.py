"""The split at the end of a source's name: `folder:test`."""

from __future__ import annotations

import re

from easylm import storage
from easylm.errors import InputError

_SPLIT = re.compile(r"(.+):([\w.-]+)")


def split_off(path: str) -> tuple[str, str | None]:
    """Takes `place:split` apart; what exists as it stands names no split."""
    found = _SPLIT.fullmatch(path)
    if not found or storage.exists(path):
        return path.rstrip("/") or path, None
    return found[1].rstrip("/"), found[2]


def choose_split(place: str, split: str | None, splits: list[str]) -> str:
    """`split`, or `train` where none is named. Raises InputError where it is not in `splits`."""
    if (split or "train") in splits:
        return split or "train"
    problem = f"no split {split!r}" if split else "no split is named and none is called 'train'"
    have = f"has {', '.join(map(repr, sorted(splits)))}" if splits else "has no splits"
    advice = f"{place}:{min(splits)}" if splits else place
    raise InputError(f"{place}: {problem}; it {have}. Write {advice}")
