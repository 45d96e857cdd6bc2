"""Where rows come from: files, Hugging Face datasets and TFDS, checked row by row."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from easylm.data.digest import digest_files
from easylm.data.opened import open_path
from easylm.data.rows import CONVERSATIONS, Form
from easylm.data.turns import Problem, Values
from easylm.errors import InputError

_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Source:
    """One part of `data.sources`: what holds rows, and how much of it to take."""

    path: str
    amount: int | float | None = None  # rows, or a fraction of them; None is everything

    def __str__(self) -> str:
        return self.path if self.amount is None else f"{self.path}@{self.amount}"


@dataclass(frozen=True)
class Found:
    """What became of the rows of one source.

    Attributes:
        taken: good rows that are used.
        skipped: bad rows left out, by reason; empty unless bad rows are skipped.
        first: for each of these reasons, the place in the source of its first row.
        unused: good rows, taken or not, by each field of theirs that is not used.
    """

    taken: int
    skipped: dict[str, int]
    first: dict[str, str]
    unused: dict[str, int]


@dataclass
class Rows:
    """The valid rows of some sources, in order.

    Attributes:
        rows: what was read, of the form asked for.
        found: what became of the rows of each source.
    """

    rows: list[Any]
    found: list[Found]

    @property
    def skipped(self) -> Counter[str]:
        """Rows left out, by reason."""
        return sum((Counter(found.skipped) for found in self.found), Counter())


def parse_sources(sources: str, field: str = "data.sources") -> list[Source]:
    """Reads `PATH[@count|@fraction],...`: `a.jsonl@1000,b.json.gz@0.5`.

    PATH is a file of JSON or parquet, local or gs://; `FOLDER[:split]` that save_to_disk or TFDS
    wrote; `owner/name[/config][:split]` of a dataset on the Hugging Face hub; or
    `tfds:NAME[/CONFIG][:VERSION][:split]`. A fraction is written with a point, a count without. A
    local path that exists is taken as it stands, so a file name may contain `@`.

    Args:
        sources: as said.
        field: of the config, for messages.

    Raises:
        InputError: nothing is named, or an amount is not positive or more than everything.
    """
    parsed = []
    for part in (os.path.expanduser(part.strip()) for part in sources.split(",")):
        if not part:
            raise InputError(f"{field}: found {sources!r}; wanted PATH[@count|@fraction],...")
        path, at, text = part.rpartition("@")
        if not at or "/" in text or os.path.exists(part):
            parsed.append(Source(part))
            continue
        amount: int | float | None = None
        if re.fullmatch(r"\d+", text) and int(text) > 0:
            amount = int(text)
        elif re.fullmatch(r"\d*\.\d+|\d+\.\d*", text) and 0 < float(text) <= 1:
            amount = float(text)
        if not path or amount is None:
            raise InputError(
                f"{field}: found {part!r}; wanted PATH, PATH@count with a count of at least "
                f"1, or PATH@fraction with a fraction like 0.25, at most 1.0"
            )
        parsed.append(Source(path, amount))
    return parsed


def read_rows(
    sources: str,
    on_bad_row: str = "refuse",
    seed: int = 0,
    field: str = "data.sources",
    form: Form = CONVERSATIONS,
) -> Rows:
    """Reads and checks every row of every source.

    Args:
        sources: as in `parse_sources`.
        on_bad_row: `refuse` raises for all bad rows at once; `skip` leaves them out and counts
            them by reason.
        seed: chooses the rows where a source gives a count or fraction of them. Each source has
            its own random numbers, so adding one does not change the choice in another.
        field: of the config, for messages.
        form: what the rows are.

    Raises:
        InputError: a source is missing, unreadable or without rows, rows are bad (with the first
            ten problems and the totals by reason), all rows of a source are, or a count exceeds the
            rows.
    """
    if on_bad_row not in ("refuse", "skip"):
        raise InputError(f"data.on_bad_row: found {on_bad_row!r}; wanted 'refuse' or 'skip'")
    parsed = parse_sources(sources, field)
    # All of them are found before the first is read.
    opened = [open_path(source.path) for source in parsed]
    read = [_read(found.values, source, form) for source, found in zip(parsed, opened, strict=True)]
    for source, (rows, bad, _) in zip(parsed, read, strict=True):
        if not rows and not bad.rows:
            raise InputError(f"{field}: no rows in {source.path}; wanted at least one")
        if not rows and on_bad_row == "skip":
            raise InputError(
                f"{field}: no good row in {source.path} ({bad.rows:,} read); wanted at least one. "
                f"Repair it, or leave this source out:\n{bad.table(_SHOWN_PROBLEMS)}"
            )
    bad = _BadRows.of_all([bad for _, bad, _ in read])
    if bad.rows and on_bad_row == "refuse":
        total = bad.rows + sum(len(rows) for rows, _, _ in read)
        table = bad.table(_SHOWN_PROBLEMS)
        raise InputError(
            f"{bad.rows:,} of {total:,} rows of {field} are bad:\n{table}\n"
            "Repair them, or set data.on_bad_row=skip to leave them out."
        )
    all_rows = Rows([], [])
    for index, (source, (rows, bad, unused)) in enumerate(zip(parsed, read, strict=True)):
        taken = _take(rows, source, np.random.default_rng([seed, index]), field)
        all_rows.rows += taken
        all_rows.found.append(Found(len(taken), dict(bad.reasons), bad.first, unused))
    return all_rows


@dataclass
class _BadRows:
    """What is wrong with rows: the first problems in words, and the rows by their first reason.

    `first` has the place in the source of the first row of each reason.
    """

    shown: list[str] = field(default_factory=list)
    problems: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_all(cls, parts: list[_BadRows]) -> _BadRows:
        """What is wrong with all sources."""
        shown = [problem for part in parts for problem in part.shown][:_SHOWN_PROBLEMS]
        problems = sum(part.problems for part in parts)
        return cls(shown, problems, sum((part.reasons for part in parts), Counter()))

    @property
    def rows(self) -> int:
        return self.reasons.total()

    def add(self, where: str, problems: list[Problem], path: str) -> None:
        self.first.setdefault(problems[0].reason, where.removeprefix(f"{path}:"))
        self.reasons[problems[0].reason] += 1
        self.problems += len(problems)
        room = _SHOWN_PROBLEMS - len(self.shown)
        self.shown += [f"{where}: {problem}" for problem in problems[:room]]

    def table(self, shown: int) -> str:
        """The first problems, and how many rows there are for each reason."""
        lines = [f"  {problem}" for problem in self.shown[:shown]]
        if 0 < shown < self.problems:
            lines.append(f"  ... and {self.problems - shown:,} more problems")
        lines += [f"  {count:>9,}  {reason}" for reason, count in self.reasons.most_common()]
        return "\n".join(lines)


def _read(values: Values, source: Source, form: Form) -> tuple[list[Any], _BadRows, dict[str, int]]:
    """The good rows of a source, the bad ones, and how many good ones have which unused field."""
    valid, bad, unused = [], _BadRows(), Counter()
    for where, value, broken in values:
        row, problems = (None, [broken]) if broken else form.read(value, where)
        if problems:
            bad.add(where, problems, source.path)
        else:
            valid.append(row)
            unused.update(form.unused_fields(value))
    return valid, bad, dict(sorted(unused.items()))


def read_values(path: str) -> Values:
    """Reads the values of a source of any kind without looking at what they mean.

    Args:
        path: as in `parse_sources`, without an amount.

    Yields:
        `(where, value, None)`, or `(where, None, problem)` for what is no value, such as a line
        that is not JSON. `where` is `file:line`, or `path:row N` where there are no lines.

    Raises:
        InputError: there is nothing of that name, it is no source of rows, or it is damaged.
    """
    return open_path(path).values


def digest(source: Source) -> str:
    """SHA-256, in hex, of the content that a source names, whatever its amount; reads no rows.

    The same rows in other files, or compressed, or in a bucket, have another digest.

    Raises:
        InputError: as in `read_values`.
    """
    return digest_files(open_path(source.path).files)


def _take(rows: list[Any], source: Source, rng: np.random.Generator, field: str) -> list[Any]:
    """Chooses the amount of rows that the source asks for, in file order."""
    if source.amount is None:
        return rows
    count = source.amount
    if isinstance(count, float):
        count = round(count * len(rows))
    if not 0 < count <= len(rows):
        found = f"{len(rows):,} valid ones. Ask for 1 to {len(rows):,}"
        raise InputError(
            f"{field}: {source}: wanted {count:,} rows; "
            f"found {found if len(rows) > 1 else '1 valid one. Ask for 1'}, or for no amount"
        )
    return [rows[i] for i in np.sort(rng.choice(len(rows), count, replace=False))]
