"""Event loops that wait for what they run before they close."""

import asyncio

import pytest

from easylm.patience import patient_loops


def test_a_loop_waits_for_its_tasks_and_their_errors(caplog):
    done = []

    async def work(fails):
        await asyncio.sleep(0.05)
        done.append(fails)
        if fails:
            raise KeyError("later")

    async def first_failure():
        tasks = [asyncio.ensure_future(work(fails)) for fails in (False, True)]
        await asyncio.sleep(0)
        raise ValueError(f"first of {len(tasks)}")

    with patient_loops():
        loop = asyncio.new_event_loop()
    with pytest.raises(ValueError, match="first"):
        loop.run_until_complete(first_failure())
    assert done == []
    loop.close()
    assert done == [False, True]
    assert loop.is_closed()
    assert caplog.text == ""  # asyncio logs an error that nobody looked at
    loop.close()


def test_other_loops_stay_as_they_are():
    before = type(asyncio.new_event_loop())
    with pytest.raises(KeyError), patient_loops():
        raise KeyError
    assert type(asyncio.new_event_loop()) is before
