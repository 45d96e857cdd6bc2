"""A benchmark's contestants as processes that take a step each time they are sent a line."""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

GB = 1e9
# Without a TPU's or GPU's library, whose memory is not what is measured.
_ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


class Worker:
    """A process, as the benchmark sees it; see `answer` for the other side.

    Args:
      module: run with `arguments`.

    Attributes:
      first: what it says before any step.
    """

    def __init__(self, module: str, *arguments: str):
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=_ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.first = self._answer()

    def step(self, what: str = "") -> dict:
        """Lets it take one step."""
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} failed; it says why above")
        return json.loads(line)


def answer(first: dict, take: Callable[[str], dict]) -> None:
    """Says `first`, then answers each line with what `take` returns."""
    say(first)
    for line in sys.stdin:
        say(take(line.strip()))


def say(what: dict) -> None:
    """Sends a line to the benchmark."""
    print(json.dumps(what), flush=True)


class Clock:
    """Wall and CPU time from its making on."""

    def __init__(self):
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def read(self) -> dict:
        """Wall and CPU seconds, and the peak memory of the process so far in bytes."""
        return {
            "seconds": time.perf_counter() - self._wall,
            "cpu_seconds": time.process_time() - self._cpu,
            "peak": memory("VmHWM"),
        }


def timed(step: Callable[..., float], *arguments: object) -> dict:
    """Takes a step: its loss, and what `Clock` reads."""
    clock = Clock()
    loss = step(*arguments)
    return {"loss": loss, **clock.read()}


def memory(field: str) -> int:
    """Bytes of this process: VmRSS, resident now, or VmHWM, the most that ever was."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def forget_peak() -> None:
    """Lets the peak memory of this process count from here."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
