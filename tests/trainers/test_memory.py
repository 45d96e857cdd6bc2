"""What a run says of its memory."""

import numpy as np

from easylm.trainers.memory import Memory, device_memory, fullest, process_memory

GIB = 2**30


def test_the_memory_of_the_process_and_its_peak_follow_what_it_holds():
    before = process_memory()
    held = np.ones(200 << 20, np.uint8)
    during = process_memory()
    assert during.used - before.used > 190 << 20
    assert during.peak > during.used - (1 << 20)
    del held
    after = process_memory()
    assert after.used < during.used - (190 << 20)
    assert after.peak > during.used - (1 << 20)  # Linux counts in batches of pages


def test_cpu_devices_tell_nothing():
    assert device_memory() is None


def test_of_several_devices_the_fullest_counts():
    stats = [
        {"bytes_in_use": 3 * GIB, "peak_bytes_in_use": 9 * GIB, "bytes_limit": 16 * GIB},
        {"bytes_in_use": 4 * GIB, "peak_bytes_in_use": 8 * GIB, "bytes_limit": 15 * GIB},
    ]
    memory = fullest(stats)
    assert memory == Memory(4 * GIB, 9 * GIB, 15 * GIB, "on the fullest device")
    assert memory.describe(7 * GIB) == (
        "4.00 GiB on the fullest device, 9.00 GiB of 15.00 GiB at the peak so far; "
        "the compiler expects 7.00 GiB a device"
    )
    assert memory.describe_peak() == "9.00 GiB of 15.00 GiB on the fullest device"
    assert fullest([*stats, None]) is None


def test_a_device_without_a_limit():
    memory = fullest([{"bytes_in_use": GIB, "peak_bytes_in_use": 2 * GIB}])
    assert memory.describe_peak() == "2.00 GiB on the fullest device"
