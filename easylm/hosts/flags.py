"""Where this process stands among those of a run, as its command line and its machine say."""

import glob
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from easylm.command_line import Flag
from easylm.errors import InputError

HOST_FLAGS = {
    "coordinator": Flag(
        str,
        "",
        "HOST:PORT",
        "The first host and a free port there, for a run on several hosts. TPU slices need none: "
        "there the hosts find each other.",
    ),
    "processes": Flag(str, "", "N", "With --coordinator: how many hosts there are."),
    "process": Flag(str, "", "I", "With --coordinator: which of them this is, from 0."),
}


class Place(NamedTuple):
    """What --coordinator, --processes and --process say."""

    coordinator: str
    count: int
    index: int


def parse_place(values: dict[str, str]) -> Place | None:
    """The place that the values of HOST_FLAGS name; None where they name none.

    Raises:
      InputError: one is missing or wrong.
    """
    if not any(values[name] for name in HOST_FLAGS):
        return None
    coordinator = values["coordinator"]
    if not re.fullmatch(r"[^:\s]+:\d+", coordinator):
        raise InputError(
            f"--coordinator: found {coordinator!r}; wanted HOST:PORT, the first host and a free "
            "port there, the same on all hosts"
        )
    count = _integer(values, "processes", 1, None, "how many hosts there are")
    index = _integer(values, "process", 0, count - 1, "which of them this is")
    return Place(coordinator, count, index)


def _integer(values: dict[str, str], name: str, least: int, most: int | None, what: str) -> int:
    text = values[name]
    number = int(text) if text.isdecimal() else -1
    if number < least or (most is not None and number > most):
        upto = f"{least} or more" if most is None else f"{least} to {most}"
        raise InputError(f"--{name}: found {text!r}; wanted {upto}: {what}")
    return number


def may_have_others(argv: Sequence[str]) -> bool:
    """Whether a run with these arguments may be one of several hosts'.

    True beside a TPU too: only jax knows how many hosts its slice has, and it is not asked here.
    """
    named = any(argument.lstrip("-").startswith("coordinator") for argument in argv)
    return named or has_tpu()


def has_tpu() -> bool:
    """Whether this machine has TPU chips that jax may use."""
    platforms = os.environ.get("JAX_PLATFORMS", "tpu").split(",")
    return "tpu" in platforms and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
