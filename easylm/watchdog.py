"""A thread that speaks up while a step takes far longer than those before it."""

import contextlib
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

# How often the median a step must take to be reported, and the steps the median is taken of.
FACTOR = 10
REMEMBERED = 50
# Fewer tell nothing yet: the first ones often are slower than the rest.
FEWEST = 5
# A step that is slow while nothing is known of the others: it may hang all the same.
UNKNOWN_SECONDS = 300.0
# No more hosts than these are named.
NAMED_HOSTS = 8

# What a step may be at.
DEVICES = (
    "it waits for the devices, which wait for each other: a host may be lost, or slow with its data"
)
DATA = "it waits for data: this host is slow in reading or building rows"
METRICS = "it waits for metrics to be written: the disk, the bucket or a tracker is slow"


class Watchdog:
    """Reports the step under way when it takes ten times the median of the last 50.

    It does so while the step lasts, and again each time that its time has doubled. Use it in a
    `with closing(...)`.

    Args:
      last_step: the step the run goes on from.
      tell: says a line to people; it is called in a thread.
      last_steps: the last step that each host has finished, as far as is known.
      least_seconds: shorter steps are never reported.
    """

    def __init__(
        self,
        last_step: int,
        *,
        tell: Callable[[str], None],
        last_steps: Callable[[], dict[int, int]],
        least_seconds: float = 5.0,
    ):
        self._tell, self._last_steps, self._least = tell, last_steps, least_seconds
        self._step, self._doing = last_step + 1, DEVICES
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._lock = threading.Lock()  # of all that both threads use
        self._since: float | None = time.monotonic()  # None: no step is under way
        self._report_at, self._reported = UNKNOWN_SECONDS, False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def done(self, step: int, seconds: float) -> None:
        """Step `step` has taken `seconds`; the next one begins."""
        with self._lock:
            was_reported = self._reported
            self._seconds.append(seconds)
            self._step = step + 1
            self._start()
        if was_reported:
            self._tell(f"step {step} is done; it took {_duration(seconds)}")

    def paused(self, function: Callable[_P, _T]) -> Callable[_P, _T]:
        """`function`, during which no step is under way; one begins when it returns."""

        def pausing(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            with self._lock:
                self._since = None
            result = function(*args, **kwargs)
            with self._lock:
                self._start()
            return result

        return pausing

    def waiting(self, batches: Iterator[_T]) -> Iterator[_T]:
        """`batches`, none of which is None; while the next one is waited for, reports say so."""
        while True:
            with self.doing(DATA):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Within the block the step is at `what`; else it is at DEVICES."""
        self._doing = what
        try:
            yield
        finally:
            self._doing = DEVICES

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._thread.join()

    def _start(self) -> None:
        self._since, self._reported = time.monotonic(), False
        self._report_at = UNKNOWN_SECONDS
        if len(self._seconds) >= FEWEST:
            self._report_at = max(self._least, FACTOR * statistics.median(self._seconds))

    def _watch(self) -> None:
        while not self._closed.wait(self._least / 10):
            with self._lock:
                report = self._report()
            if report:
                self._tell(report)

    def _report(self) -> str:
        """What is to be said now, if anything."""
        if self._since is None:
            return ""
        seconds = time.monotonic() - self._since
        if seconds < self._report_at:
            return ""
        while self._report_at <= seconds:
            self._report_at *= 2
        self._reported = True
        known = "none is known yet"
        if len(self._seconds) >= FEWEST:
            known = _duration(statistics.median(self._seconds))
        return (
            f"step {self._step} takes {_duration(seconds)} so far; the median is {known}: "
            f"{self._doing}.{_hosts(self._last_steps())}"
        )


def _duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:,.0f} s"


def _hosts(last_steps: dict[int, int]) -> str:
    """A sentence on the last step of each host, where there are several."""
    if len(last_steps) < 2:
        return ""
    (common, _), *_ = Counter(last_steps.values()).most_common(1)
    others = [host for host in sorted(last_steps) if last_steps[host] != common]
    if not others:
        return f" Last steps: all {len(last_steps)} hosts at {common}."
    named = [f"host {host} at {last_steps[host]}" for host in others[:NAMED_HOSTS]]
    more = len(others) - len(named)
    rest = f" and {more} more elsewhere," if more else ""
    return (
        f" Last steps (of hosts 0-{max(last_steps)}): {', '.join(named)},{rest} "
        f"the others at {common}."
    )
