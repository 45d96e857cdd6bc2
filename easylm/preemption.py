"""The wish that a run stops: SIGTERM, when the machine is taken away, or Ctrl-C."""

import contextlib
import signal
from collections.abc import Callable, Iterator

from easylm.command import say


@contextlib.contextmanager
def stop_noticed() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM and Ctrl-C are only noted; what is yielded says whether one came.

    Run it in the main thread. A second one has its usual effect: the process ends.
    """
    came = False
    before = {}

    def note(number, frame):
        nonlocal came
        came = True
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)
        if number == signal.SIGINT:
            say("\nsaving after this step; Ctrl-C again to stop at once")

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, note)
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
