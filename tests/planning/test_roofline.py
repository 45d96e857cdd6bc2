"""The least time of a step, worked out by hand."""

import pytest

from easylm.devices import DeviceSpec
from easylm.planning.flops import Flops
from easylm.planning.roofline import roofline

DEVICE = DeviceSpec(
    memory=16, usable=15, peak_flops=100.0, memory_bandwidth=10.0, interconnect_bandwidth=4.0
)


def bounded(*, hardware=4000, traffic=20, wire=4):
    return roofline(
        DEVICE,
        num_devices=8,
        flops=Flops(model=2000, hardware=hardware),
        traffic=traffic,
        wire=wire,
        tokens=300,
        steps=720,
    )


def test_compute_bounds_a_step():
    assert bounded() == (
        5.0,  # 4000 / (8 * 100)
        2.0,  # 20 / 10
        1.0,  # 4 / 4
        "compute",
        5.0,
        6.0,  # 5 of compute, then 1 of interconnect
        0.5,  # 2000 of the 4000 FLOPs are the model's
        60.0,  # 300 / 5
        1.0,  # 720 steps of 5 s
        8.0,
    )


def test_memory_bounds_a_step():
    slow = bounded(traffic=100)
    assert (slow.memory_seconds, slow.bound, slow.step_seconds) == (10.0, "memory", 10.0)
    assert slow.serial_seconds == 11.0
    assert slow.mfu_bound == 0.25 and slow.device_hours == 16.0


def test_interconnect_bounds_a_step():
    slow = bounded(wire=80)
    assert (slow.interconnect_seconds, slow.bound, slow.hours) == (20.0, "interconnect", 4.0)
    assert slow.mfu_bound == pytest.approx(0.125)


def test_a_device_of_unknown_peaks_promises_nothing():
    unknown = roofline(None, num_devices=8, flops=Flops(1, 2), traffic=1, wire=1, tokens=1, steps=1)
    assert set(unknown) == {None}
