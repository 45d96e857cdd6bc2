"""The notice that this machine is about to be taken away: SIGTERM."""

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def sigterm_noticed() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM is only noted; what is yielded says whether it has come.

    Run it in the main thread. A second SIGTERM has its usual effect: the process ends.
    """
    came = False

    def note(signum, frame):
        nonlocal came
        came = True
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, before)
