"""Steps that really are slow, and what is said of them while they last."""

import itertools
import re
import time
from contextlib import closing

import pytest

from easylm.watchdog import METRICS, Watchdog


def steps(watchdog, count, seconds=0.002):
    """`count` steps that took `seconds`."""
    for step in range(1, count + 1):
        watchdog.done(step, seconds)


@pytest.fixture
def said():
    return []


def watching(said, last_steps=dict, least_seconds=0.1):
    return closing(
        Watchdog(0, tell=said.append, last_steps=last_steps, least_seconds=least_seconds)
    )


def wait_for(said, count):
    """Waits until so many lines have been said."""
    deadline = time.monotonic() + 30
    while len(said) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(said) >= count, said


def seconds_of(line):
    """How long the step takes, by what is said."""
    return float(re.match(r"step \d+ takes ([0-9.]+) s so far; ", line)[1])


def test_a_slow_step_is_reported_while_it_lasts_and_each_time_its_time_has_doubled(said):
    with watching(said) as watchdog:
        steps(watchdog, 6)
        wait_for(said, 3)
        assert all(line.startswith("step 7 takes ") for line in said)
        assert "the median is 0.002 s: it waits for the devices" in said[0]
        times = [seconds_of(line) for line in said]
        assert times[0] >= 0.1 and times[1] >= 0.2 and times[2] >= 0.4
        watchdog.done(7, 0.51)
        assert said[3] == "step 7 is done; it took 0.51 s"
        wait_for(said, 5)
        assert said[4].startswith("step 8 takes ")


def test_one_that_was_not_reported_ends_without_a_word(said):
    with watching(said, least_seconds=20.0) as watchdog:
        steps(watchdog, 8)
    assert said == []


def test_ten_times_the_median_counts_where_that_is_longer(said):
    with watching(said) as watchdog:
        steps(watchdog, 6, seconds=0.05)
        wait_for(said, 1)
        assert seconds_of(said[0]) >= 0.5
        assert "the median is 0.05 s" in said[0]


def test_the_median_is_of_the_last_fifty_steps(said):
    with watching(said) as watchdog:
        for step in range(1, 101):
            watchdog.done(step, 0.001 if step <= 60 else 10.0)
        time.sleep(0.2)
        assert said == []


def test_what_is_no_step_is_not_reported_and_the_next_step_begins_behind_it(said):
    def evaluate(value, *, other):
        time.sleep(1)
        return value + other

    with watching(said) as watchdog:
        steps(watchdog, 6)
        assert watchdog.paused(evaluate)(1, other=2) == 3
        assert said == []
        wait_for(said, 1)
        assert seconds_of(said[0]) < 1


def test_the_first_steps_may_be_slow(said):
    with watching(said) as watchdog:
        steps(watchdog, 4)
        time.sleep(0.3)
        assert said == []


def test_waiting_for_data_and_for_metrics_are_told_apart(said):
    def batches():
        yield from "abcdef"
        wait_for(said, 1)
        yield "g"

    with watching(said) as watchdog:
        slow = watchdog.waiting(batches())
        for step, _ in enumerate(itertools.islice(slow, 6), 1):
            watchdog.done(step, 0.002)
        assert next(slow) == "g"
        assert "it waits for data" in said[0]
        assert list(slow) == []
        watchdog.done(7, 0.002)
        said.clear()
        with watchdog.doing(METRICS):
            wait_for(said, 1)
        assert "it waits for metrics to be written" in said[0]


@pytest.mark.parametrize(
    "last_steps, expected",
    [
        ({0: 6}, "slow with its data."),
        ({0: 6, 1: 6, 2: 6}, " Last steps: all 3 hosts at 6."),
        (
            {host: 5 if host == 3 else 6 for host in range(8)},
            " Last steps (of hosts 0-7): host 3 at 5, the others at 6.",
        ),
        (
            {host: 4 if host % 8 == 3 else 6 for host in range(88)},
            " Last steps (of hosts 0-87): host 3 at 4, host 11 at 4, host 19 at 4, host 27 at 4, "
            "host 35 at 4, host 43 at 4, host 51 at 4, host 59 at 4, and 3 more elsewhere, the "
            "others at 6.",
        ),
    ],
)
def test_each_hosts_last_step_is_told(said, last_steps, expected):
    with watching(said, last_steps=lambda: last_steps) as watchdog:
        steps(watchdog, 6)
        wait_for(said, 1)
        assert said[0].endswith(expected)
