"""How much memory a run takes: of its devices, or of its process where they do not tell."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import jax


@dataclasses.dataclass(frozen=True)
class Memory:
    """What is known of it at one moment.

    Attributes:
      used: bytes in use now.
      peak: the most that were in use since the process started.
      limit: bytes there are; None where that is not known.
      place: what the bytes are of, for people.
    """

    used: int
    peak: int
    limit: int | None
    place: str

    def describe(self, expected: int | None) -> str:
        """What is in use now and was before.

        Args:
          expected: bytes that the compiler expects a step to take of each device; None: not known.
        """
        text = f"{format_bytes(self.used)} {self.place}, {self._at_peak()} at the peak so far"
        if expected is not None:
            text += f"; the compiler expects {format_bytes(expected)} a device"
        return text

    def describe_peak(self) -> str:
        """What was in use at most."""
        return f"{self._at_peak()} {self.place}"

    def _at_peak(self) -> str:
        limit = f" of {format_bytes(self.limit)}" if self.limit else ""
        return f"{format_bytes(self.peak)}{limit}"


def device_memory() -> Memory | None:
    """Of the fullest of this process's devices; None where they do not tell, as CPUs."""
    return fullest([device.memory_stats() for device in jax.local_devices()])


def fullest(stats: Sequence[Mapping[str, int] | None]) -> Memory | None:
    """The largest numbers among those of several devices; None where one does not tell.

    Args:
      stats: what memory_stats() of each says.
    """
    if None in stats:
        return None
    limits = [one["bytes_limit"] for one in stats if "bytes_limit" in one]
    return Memory(
        max(one["bytes_in_use"] for one in stats),
        max(one["peak_bytes_in_use"] for one in stats),
        min(limits, default=None),
        "on the fullest device",
    )


def process_memory() -> Memory | None:
    """Resident memory of this process, which holds all of its CPU devices; None but on Linux."""
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return None
    # Lines such as "VmHWM:   123 kB".
    sizes = dict(line.split(":", 1) for line in status.read_text().splitlines())
    used, peak = (int(sizes[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return Memory(used, peak, None, "in the whole process")


def compiled_bytes(memory) -> int:
    """Bytes that a compiled program takes of each device.

    Args:
      memory: its memory_analysis(). Outputs that lie where donated arguments lay count once.
    """
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def format_bytes(count: float) -> str:
    """For people, such as "3.11 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"
