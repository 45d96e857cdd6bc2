"""Event loops that wait for what they run before they close."""

import asyncio
import contextlib
from collections.abc import Iterator


class _PatientLoop(asyncio.SelectorEventLoop):
    def close(self) -> None:
        tasks = [] if self.is_closed() else asyncio.all_tasks(self)
        if tasks:
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()


class _PatientPolicy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _PatientLoop()


@contextlib.contextmanager
def patient_loops() -> Iterator[None]:
    """Within it, a new event loop that is closed waits for its tasks, whatever becomes of them.

    Orbax reads all arrays at once and closes its loop when the first of them fails. The others then
    find it closed, and each prints a traceback, around the message that says what is wrong.
    """
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_PatientPolicy())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)
