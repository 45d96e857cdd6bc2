"""What a search for a way to run a config came to, and how it is shown."""

import dataclasses
import sys
from typing import NamedTuple, Protocol

import tqdm

from easylm.command import COLUMNS
from easylm.devices import GIB
from easylm.planning.candidates import Candidate
from easylm.trainers.config import RunConfig

_HEAD = """\
        micro-                  row  memory    of    step seconds    MFU  empty
mesh   batches remat         tokens     GiB   HBM     (estimates) (est.)   rows"""


class Planned(Protocol):
    """What is known of a candidate once it is compiled.

    Attributes:
      fits: whether it does.
      refusal: why the compiler could not compile it; empty where it could.
      total_bytes: that a device needs.
      usable: bytes that it has; None: unknown.
      step_seconds: an estimate, at least; None: unknown.
      serial_seconds: the same if nothing is sent while a device computes; None: unknown.
      mfu_bound: an estimate, at most; None: unknown.
    """

    @property
    def fits(self) -> bool: ...
    @property
    def refusal(self) -> str: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def usable(self) -> int | None: ...
    @property
    def step_seconds(self) -> float | None: ...
    @property
    def serial_seconds(self) -> float | None: ...
    @property
    def mfu_bound(self) -> float | None: ...


class Found(NamedTuple):
    """A candidate and what compiling it said."""

    candidate: Candidate
    planned: Planned


@dataclasses.dataclass
class Search:
    """What a search came to.

    Attributes:
      fitting: the compiled ones that fit, fastest first.
      too_large: how many were compiled and do not fit.
      refused: how many the compiler could not compile.
      pruned: how many cannot fit, since their state alone, or a smaller program, does not.
      slower: how many were left out since one that fits looks faster.
      untried: how many the budget, or an interrupt, left no time for.
      is_interrupted: whether Ctrl-C ended it.
    """

    fitting: list[Found] = dataclasses.field(default_factory=list)
    too_large: int = 0
    refused: int = 0
    pruned: int = 0
    slower: int = 0
    untried: int = 0
    is_interrupted: bool = False

    @property
    def settled(self) -> int:
        """How many candidates are decided."""
        return len(self.fitting) + self.too_large + self.refused + self.pruned + self.slower


class Progress:
    """A line on stderr for each compile; at a terminal, a bar of settled candidates below it."""

    def __init__(self, total: int):
        self._bar = tqdm.tqdm(
            total=total,
            ncols=COLUMNS,
            mininterval=0.0,
            bar_format="{n_fmt}/{total_fmt} |{bar}| {desc}",
            disable=not sys.stderr.isatty(),
        )

    def start(self, one: Candidate, settled: int, time_left: str) -> None:
        """Says what is being compiled, how many are settled, and how much time there is."""
        self._bar.n = settled
        text = f"{one.mesh_text} {one.micro_batches} {one.remat}; {time_left} of the budget left"
        self._bar.set_description_str(text)

    def say(self, text: str) -> None:
        """A line."""
        self._bar.write(text, file=sys.stderr)
        sys.stderr.flush()

    def close(self, settled: int) -> None:
        """Leaves the bar as it is."""
        self._bar.n = settled
        self._bar.set_description_str("")
        self._bar.close()


def outcome(one: Candidate, planned: Planned) -> str:
    """A line of at most 78 columns on what was compiled and whether it fits."""
    what = f"{one.mesh_text:9} micro_batches={one.micro_batches:<3} {one.remat:13}"
    if planned.refusal:
        return f"{what} the compiler cannot compile it"
    usable = "" if planned.usable is None else f" of {planned.usable / GIB:.2f}"
    verdict = "fits" if planned.fits else "does not fit"
    return f"{what} {planned.total_bytes / GIB:7.2f}{usable} GiB: {verdict}"


def search_table(result: Search, config: RunConfig) -> str:
    """What fits, fastest first, what was left out, and the best's overrides; 80 columns."""
    if not result.fitting:
        return "\n".join(["Nothing of what was compiled fits.", *_counts(result)])
    best = result.fitting[0].candidate
    of = ", of an incomplete search" if result.untried else ""
    return "\n".join(
        [
            "What fits, fastest first. Times and MFU are estimates: no step takes less than",
            "the first time; the second holds if nothing is sent while a device computes.",
            _HEAD,
            *map(_line, result.fitting),
            *_counts(result),
            f"The first of them{of}:",
            *(f"  {override}" for override in best.overrides(config)),
        ]
    )


_COUNTS = ("too_large", "refused", "pruned", "slower", "untried")


def search_records(result: Search) -> dict:
    """The same in values of JSON."""
    fitting = [
        {
            **one._asdict(),
            "mesh": one.mesh_text,
            "rows": one.rows,
            "empty_rows": one.empty_rows,
            "total_bytes": planned.total_bytes,
            "usable_bytes": planned.usable,
            "estimated_step_seconds": planned.step_seconds,
            "estimated_serial_seconds": planned.serial_seconds,
            "estimated_mfu_bound": planned.mfu_bound,
        }
        for one, planned in result.fitting
    ]
    counts = {name: getattr(result, name) for name in _COUNTS}
    return {"fitting": fitting, **counts}


def _line(found: Found) -> str:
    one, planned = found
    share = "-" if planned.usable is None else _share(planned)
    seconds = "-"
    if planned.step_seconds is not None:
        seconds = f"{planned.step_seconds:.3g} to {planned.serial_seconds:.3g}"
    mfu = "-" if planned.mfu_bound is None else f"{planned.mfu_bound:.0%}"
    return (
        f"{one.mesh_text:8}{one.micro_batches:6} {one.remat:13}{one.seq_len:7,}"
        f"{planned.total_bytes / GIB:8.2f}{share:>6}{seconds:>16}{mfu:>7}{one.empty_rows:7}"
    )


def _share(planned: Planned) -> str:
    return f"{planned.total_bytes / planned.usable:.0%}"


def _counts(result: Search) -> list[str]:
    """A line for each reason to have left candidates out."""
    reasons = {
        "too_large": "were compiled and do not fit",
        "refused": "the compiler could not compile",
        "pruned": "cannot fit: their state alone, or a smaller program, does not",
        "slower": "look no faster than what fits",
        "untried": "were not tried: "
        + ("interrupted" if result.is_interrupted else "the time is used up (--budget_minutes)"),
    }
    counts = {text: getattr(result, name) for name, text in reasons.items()}
    return [f"{count:5,} {text}" for text, count in counts.items() if count]
